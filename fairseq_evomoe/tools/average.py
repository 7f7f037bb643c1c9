"""`evomoe-average`: one checkpoint whose weights are the mean of several.

Floating-point weights are averaged in float32. Everything else, the evolution state of the MoE
layers first of all, is the last checkpoint's: half a stage means nothing. Checkpoints from before
and after the split of the experts, or with different stages, are refused.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fairseq_evomoe.tools.checkpoint import EXTRA, command, load, refuse_existing, write


def newest(folder: Path, count: int) -> list[Path]:
    """The `count` newest `checkpoint_<epoch>_<update>.pt` or `checkpoint<epoch>.pt` of a folder.

    Raises:
        ValueError: there are fewer.
    """
    found = []
    for path in folder.glob("checkpoint*.pt"):
        match = re.fullmatch(r"checkpoint(?:_\d+_(\d+)|(\d+))\.pt", path.name)
        if match:
            by_update = match[1] is not None
            found.append((by_update, int(match[1] or match[2]), path))
    # updates and epochs do not compare: where both kinds lie, the finer one counts
    finer = [f for f in found if f[0]] or found
    if len(finer) < count:
        raise ValueError(
            f"{folder} holds {len(finer)} numbered checkpoints, {count} are needed: lower --last, "
            "or save more (--save-interval-updates N --keep-interval-updates M)"
        )
    return [path for *_, path in sorted(finer)[-count:]]


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """The last checkpoint's contents, with the mean weights of all.

    Raises:
        ValueError: the checkpoints are of different models or stages.
    """
    result = load(paths[-1])
    model = result["model"]
    stages = {k: v[1:2].tolist() for k, v in model.items() if k.endswith(EXTRA)}
    floating = [k for k, v in model.items() if v.is_floating_point() and not k.endswith(EXTRA)]
    total = {k: torch.zeros_like(model[k], dtype=torch.float32) for k in floating}
    for path in tqdm(paths, unit="checkpoint", disable=None):
        other = load(path)["model"]
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in model.items()}:
            raise ValueError(f"{path} holds other weights than {paths[-1]}: average one run only")
        if {k: other[k][1:2].tolist() for k in stages} != stages:
            raise ValueError(
                f"{path} is in another stage than {paths[-1]}: "
                "average checkpoints of one stage only"
            )
        for k in floating:
            total[k] += other[k].float()
    for k in floating:
        model[k] = (total[k] / len(paths)).to(model[k].dtype)
    # moments belong to the weights of one run, not to a mean
    result.pop("last_optimizer_state", None)
    return result


def run(args: argparse.Namespace) -> None:
    paths = args.inputs
    if args.last is not None:
        if len(paths) != 1 or not paths[0].is_dir() or args.last < 1:
            raise ValueError("--last N (1 or more) goes with exactly one folder")
        paths = newest(paths[0], args.last)
    refuse_existing(args.output)
    write(average(paths), args.output)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("inputs", nargs="+", type=Path, help="checkpoints, or one folder and --last")
    made.add_argument("--last", type=int, help="the newest N numbered checkpoints of the folder")
    made.add_argument("--output", type=Path, required=True)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-average", parser(), run, argv)


if __name__ == "__main__":
    main()
