"""`evomoe-average`: average the weights of several checkpoints.

Floating-point weights are averaged in float32. Everything else is copied from the last checkpoint,
in particular the evolution state of the MoE layers, because a stage cannot be averaged.
Checkpoints in different stages are refused, for example one from before and one from after the
split of the experts.
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
    """Return the `count` newest numbered checkpoints of a folder, oldest first.

    They are named `checkpoint_<epoch>_<update>.pt` or `checkpoint<epoch>.pt`.

    Raises:
        ValueError: the folder holds fewer than `count`.
    """
    found = []
    for path in folder.glob("checkpoint*.pt"):
        match = re.fullmatch(r"checkpoint(?:_\d+_(\d+)|(\d+))\.pt", path.name)
        if match:
            by_update = match[1] is not None
            found.append((by_update, int(match[1] or match[2]), path))
    # Update and epoch numbers cannot be compared. If a folder has both kinds, use the finer one.
    finer = [f for f in found if f[0]] or found
    if len(finer) < count:
        raise ValueError(
            f"{folder} holds {len(finer)} numbered checkpoints, but {count} are needed; lower "
            "--last, or save more (--save-interval-updates N --keep-interval-updates M)"
        )
    return [path for *_, path in sorted(finer)[-count:]]


def average(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the contents of the last checkpoint with the mean weights of all checkpoints.

    Raises:
        ValueError: the checkpoints belong to different models, are in different stages, or hold
            weights in int8.
    """
    result = load(paths[-1])
    model = result["model"]
    if any(v.dtype == torch.int8 for v in model.values()):
        raise ValueError(
            f"{paths[-1]} was converted to int8 for inference; average the checkpoints that "
            "evomoe-export made such files from, and convert their mean"
        )
    stages = {k: v[1:2].tolist() for k, v in model.items() if k.endswith(EXTRA)}
    floating = [k for k, v in model.items() if v.is_floating_point() and not k.endswith(EXTRA)]
    total = {k: torch.zeros_like(model[k], dtype=torch.float32) for k in floating}
    for path in tqdm(paths, unit="checkpoint", disable=None):
        other = load(path)["model"]
        if {k: v.shape for k, v in other.items()} != {k: v.shape for k, v in model.items()}:
            raise ValueError(
                f"the weights of {path} differ in name or shape from those of {paths[-1]}; average "
                "checkpoints of one run only"
            )
        if {k: other[k][1:2].tolist() for k in stages} != stages:
            raise ValueError(
                f"{path} is in a different stage than {paths[-1]}; "
                "average checkpoints of one stage only"
            )
        for k in floating:
            total[k] += other[k].float()
    for k in floating:
        model[k] = (total[k] / len(paths)).to(model[k].dtype)
    # optimizer moments belong to the weights of one checkpoint and do not fit their mean
    result.pop("last_optimizer_state", None)
    return result


def run(args: argparse.Namespace) -> None:
    paths = args.inputs
    if args.last is not None:
        if len(paths) != 1 or not paths[0].is_dir() or args.last < 1:
            raise ValueError("--last N needs an N of 1 or more and exactly one folder as input")
        paths = newest(paths[0], args.last)
    refuse_existing(args.output)
    write(average(paths), args.output)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument(
        "inputs", nargs="+", type=Path, help="checkpoints, or one folder if --last is given"
    )
    made.add_argument("--last", type=int, help="average the N newest checkpoints of the folder")
    made.add_argument("--output", type=Path, required=True)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-average", parser(), run, argv)


if __name__ == "__main__":
    main()
