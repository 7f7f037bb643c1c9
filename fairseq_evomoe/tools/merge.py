"""`evomoe-merge`: merge a checkpoint and the folder of its experts into one ordinary file.

`fairseq-generate` and the other tools also read the checkpoint unmerged. The merged file can be
moved without the folder, and it can be read where this package is not installed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fairseq_evomoe.tools import checkpoint


def run(args: argparse.Namespace) -> None:
    """Read the checkpoint with its experts and write one file."""
    checkpoint.refuse_existing(args.output)
    state = checkpoint.load(args.checkpoint)
    checkpoint.write(state, args.output)
    parameters = sum(t.numel() for t in state["model"].values())
    print(f"{args.output}: {len(state['model'])} entries, {parameters:,} values")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Merge a checkpoint written with --expert-parallel-save sharded into one "
        "ordinary file."
    )
    parser.add_argument(
        "checkpoint", type=Path, help="checkpoint, in the same folder as the folder of its experts"
    )
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    checkpoint.command("evomoe-merge", parser, run, argv)


if __name__ == "__main__":
    main()
