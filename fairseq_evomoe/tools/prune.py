"""`evomoe-prune`: drop the experts that a validation set hardly uses.

A first pass counts how many (token, expert) pairs each expert gets. Every MoE layer then keeps its
most used experts, the same number in each layer, and a second pass measures the loss of the pruned
model. Both losses are printed. Optimizer state is left out. Hash gates are refused because each
token id is assigned to one fixed expert, so that none can be dropped.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.modules.moe_layer import EvoMoELayer, moe_layers
from fairseq_evomoe.schedule import Stage
from fairseq_evomoe.tools.checkpoint import (
    build,
    command,
    flags_of,
    in_place_of,
    load,
    refuse_existing,
    with_flags,
    write,
)
from fairseq_evomoe.tools.validation import measure


def keep_most_used(
    load: dict[str, Tensor], *, keep: int | None, min_share: float, least: int
) -> dict[str, list[int]]:
    """Choose the experts that stay, the same number in each layer.

    Args:
        load: layer name -> each expert's share of the load, (E,).
        keep: number of experts to keep per layer. If it is None, count in each layer the experts
            with a share of at least `min_share` / E, and keep the largest count, or `least` if that
            is larger.
        min_share, least: see `keep`.

    Returns:
        Layer name -> sorted indices of the experts that stay.
    """
    experts = len(next(iter(load.values())))
    if keep is None:
        used = [int((share >= min_share / experts).sum()) for share in load.values()]
        keep = max(least, *used)
    most = {n: share.sort(descending=True, stable=True).indices for n, share in load.items()}
    return {n: sorted(order[:keep].tolist()) for n, order in most.items()}


def prune_state(state: dict[str, Tensor], layer: EvoMoELayer, name: str, kept: list[int]) -> None:
    """Cut one layer's entries of a model's state down to the `kept` experts, in place."""
    experts = torch.tensor(kept)
    # a shared expert stands before the routed ones and stays
    entries = torch.tensor([0, *(e + 1 for e in kept)]) if layer.experts.shared else experts
    for part in layer.experts.stacked:
        key = f"{name}.experts.{part}"
        state[key] = state[key][entries].clone()
    layer.gate.prune(state, f"{name}.gate.", experts)


def prune(
    path: Path,
    *,
    keep: int | None,
    min_share: float,
    subset: str,
    max_tokens: int,
    data: str | None = None,
    cpu: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the pruned checkpoint, and a report with the losses before and after pruning.

    Raises:
        ValueError: the model has no experts to drop, its gate needs all of them, or `keep` is out
            of range.
    """
    checkpoint = load(path)
    model, cfg, task = build(path, data)
    layers = dict(moe_layers(model))
    if not layers:
        raise ValueError(f"{path} holds no MoE layer")
    if not all(m.gate.can_lose_experts for m in layers.values()):
        raise ValueError("--moe-gate hash: each token id has a fixed expert; none can be dropped")
    if any(m.phase.stage == Stage.DIVERSIFY for m in layers.values()):
        raise ValueError(f"{path} is from before the split; prune a later checkpoint")
    experts = next(iter(layers.values())).cfg.moe_expert_count
    least = max(m.gate.min_experts(m.cfg) for m in layers.values())
    if keep is not None and not least <= keep <= experts:
        raise ValueError(
            f"--keep {keep}: choose {least} (what the gate's flags need) to {experts} (all)"
        )
    cfg.common.cpu = cpu or cfg.common.cpu
    task.load_dataset(subset)
    before = measure(model, task, cfg, subset=subset, max_tokens=max_tokens)
    kept = keep_most_used(before.load, keep=keep, min_share=min_share, least=least)

    left = len(next(iter(kept.values())))
    flags = flags_of(checkpoint)
    model_flags = cfg.model
    some_layer = next(iter(layers.values()))
    changes = some_layer.gate.flags_after_pruning(some_layer.cfg, left)
    for name, layer in layers.items():
        prune_state(checkpoint["model"], layer, name, kept[name])
    checkpoint["cfg"]["model"] = with_flags(flags, **changes)
    checkpoint.pop("last_optimizer_state", None)

    for key, value in changes.items():
        setattr(model_flags, key, value)
    smaller = task.build_model(model_flags, from_checkpoint=True)
    smaller.load_state_dict(checkpoint["model"], strict=True)
    after = measure(smaller, task, cfg, subset=subset, max_tokens=max_tokens)
    report = {
        "subset": subset,
        "experts_before": experts,
        "experts_after": left,
        "loss_before": before.loss,
        "loss_after": after.loss,
        "kept": kept,
        "load_before": {n: [round(v, 5) for v in x.tolist()] for n, x in before.load.items()},
    }
    return checkpoint, report


def run(args: argparse.Namespace) -> None:
    for path in (args.output, args.json):
        if path is not None:
            refuse_existing(path)
    if args.min_share < 0:
        raise ValueError(f"--min-share {args.min_share}: must be >= 0")
    checkpoint, report = prune(
        args.checkpoint,
        keep=args.keep,
        min_share=args.min_share,
        subset=args.valid_subset,
        max_tokens=args.max_tokens,
        data=args.data,
        cpu=args.cpu,
    )
    write(checkpoint, args.output)
    if args.json:
        with in_place_of(args.json) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"wrote {args.output}: {report['experts_before']} -> {report['experts_after']} experts per "
        f"layer; loss on {report['subset']} {report['loss_before']} -> {report['loss_after']}"
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--data", help="binarised data; default: the folder named in the checkpoint")
    made.add_argument("--valid-subset", default="valid")
    made.add_argument("--max-tokens", type=int, default=4096, help="tokens per batch")
    made.add_argument("--keep", type=int, help="experts to keep in each layer")
    made.add_argument(
        "--min-share",
        type=float,
        default=0.1,
        help="without --keep, keep experts with at least this fraction of the even load 1/E",
    )
    made.add_argument("--json", type=Path, help="also write the report to this file")
    made.add_argument("--cpu", action="store_true")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-prune", parser(), run, argv)


if __name__ == "__main__":
    main()
