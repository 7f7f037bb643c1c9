"""evomoe-merge: a checkpoint whose experts are in a folder beside it -> one ordinary file.

`fairseq-generate` and the other tools read such a checkpoint as it is; merged, it can be moved
without the folder, and read where this package is not installed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_evomoe.tools import checkpoint


def run(args: argparse.Namespace) -> None:
    """Read everything, write one file."""
    checkpoint.refuse_existing(args.output)
    state = checkpoint.load(args.checkpoint)
    checkpoint.write(state, args.output)
    parameters = sum(t.numel() for t in state["model"].values())
    print(f"{args.output}: {len(state['model'])} entries, {parameters:,} values")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Make one ordinary file of a checkpoint written with --expert-parallel-save "
        "sharded."
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint; its folder of experts beside it")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    checkpoint.command("evomoe-merge", parser, run, argv)


if __name__ == "__main__":
    main()
