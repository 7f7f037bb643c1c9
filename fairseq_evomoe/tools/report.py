"""`evomoe-report`: a model's cost per token (flops), its training (page), its routing (trace)."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fairseq_evomoe.tools import page, trace
from fairseq_evomoe.tools.checkpoint import (
    build,
    command,
    flags_of,
    in_place_of,
    load,
    refuse_existing,
)
from fairseq_evomoe.tools.cost import BYTES, per_token


def flops(path: Path, *, context: int, dtype: str, data: str | None = None) -> dict:
    """Return the costs of the model in a checkpoint by kind; see `cost.Cost`.

    Args:
        path: the checkpoint.
        context: number of positions that a token attends to.
        dtype: dtype of the weights, a key of `cost.BYTES`.
        data: folder with the dictionaries. None means the folder named in the checkpoint.
    """
    flags = flags_of(load(path))
    model, _, _ = build(path, data)
    return per_token(model, flags, context=context, dtype=dtype)


def table(rows: dict) -> str:
    """Format the rows as text, with numbers in millions."""
    head = f"{'per token':10}{'MMAC':>10}{'dense':>10}{'MB read':>10}{'dense':>10}"
    head += f"{'M weights':>11}{'dense':>10}"
    lines = [head]
    order = [*(k for k in rows if k != "total"), "total"]
    for kind in order:
        r = rows[kind]
        values = [r["macs"], r["dense_macs"], r["bytes"], r["dense_bytes"]]
        sizes = [r["parameters"], r["dense_parameters"]]
        line = f"{kind:10}" + "".join(f"{v / 1e6:10.3f}" for v in values)
        lines.append(line + f"{sizes[0] / 1e6:11.3f}{sizes[1] / 1e6:10.3f}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    if args.what in ("page", "trace"):
        {"page": page, "trace": trace}[args.what].run(args)
        return
    if args.context < 1:
        raise ValueError(f"--context {args.context}: give a number of positions, 1 or more")
    if args.json:
        refuse_existing(args.json)
    rows = flops(args.checkpoint, context=args.context, dtype=args.dtype, data=args.data)
    print(table(rows))
    if args.json:
        with in_place_of(args.json) as partial:
            partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    what = made.add_subparsers(dest="what", required=True)
    flops_parser = what.add_parser("flops", help="MACs, weights read and stored per token")
    flops_parser.add_argument("checkpoint", type=Path)
    flops_parser.add_argument(
        "--context", type=int, default=512, help="number of positions that a token attends to"
    )
    flops_parser.add_argument(
        "--dtype", choices=BYTES, default="fp32", help="dtype of the weights, to count bytes"
    )
    flops_parser.add_argument("--data", help="folder with the dictionaries")
    flops_parser.add_argument("--json", type=Path, help="also write the rows to this file")
    page.add_flags(what.add_parser("page", help="runs, experts and scores on one HTML page"))
    trace.add_flags(what.add_parser("trace", help="experts of every token as JSON lines"))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-report", parser(), run, argv)


if __name__ == "__main__":
    main()
