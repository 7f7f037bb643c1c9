"""`evomoe-prune`: drop the experts that a validation set hardly uses.

One pass counts how many (token, expert) pairs each expert gets; every MoE layer then keeps its
most used experts, the same number in each, and a second pass measures what that costs. Both losses
are printed. Optimizer state stays behind. Hash gates are refused: each of their experts has words
that nobody else knows.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates import HashGate
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
    """Experts that stay, in order: layer name -> list of indices, equally many in each layer.

    Args:
        load: layer name -> shares, (E,).
        keep: that many; None: as many as the layer that needs most has with a share of at least
            `min_share` / E, and `least`.
    """
    experts = len(next(iter(load.values())))
    if keep is None:
        used = [int((share >= min_share / experts).sum()) for share in load.values()]
        keep = max(least, *used)
    most = {n: share.sort(descending=True, stable=True).indices for n, share in load.items()}
    return {n: sorted(order[:keep].tolist()) for n, order in most.items()}


def fewest(cfg: MoEConfig) -> int:
    """The least number of experts with which a layer's flags still make sense."""
    needs = {"gshard": 2, "topk": cfg.moe_top_k, "dts": cfg.dts_top_k}
    at_least = needs.get(cfg.moe_gate, 1)
    if cfg.moe_gate == "expert_choice":
        return max(at_least, math.ceil(cfg.moe_capacity_factor))
    return at_least


def prune_state(state: dict[str, Tensor], layer: EvoMoELayer, name: str, kept: list[int]) -> None:
    """Cut one layer's entries of a model's state down to the `kept` experts, in place."""
    rows = torch.tensor(kept)
    # a shared expert stands before the routed ones and stays
    bank = torch.tensor([0, *(e + 1 for e in kept)]) if layer.experts.shared else rows
    for part, _ in layer.experts.named_parameters():
        key = f"{name}.experts.{part}"
        state[key] = state[key][bank].clone()
    for part in ("weight", "bias_steps", "distilled"):
        key = f"{name}.gate.{part}"
        if key in state:
            state[key] = state[key][rows].clone()
    words = f"{name}.gate.token_bias"
    if words in state:
        state[words] = state[words][:, rows].clone()
    table = f"{name}.gate.table"
    if table in state and (state[table] >= 0).all():
        # words stay with their expert; those of a dropped one go where the router would have them
        place = torch.full((layer.cfg.moe_expert_count,), -1)
        place[rows] = torch.arange(len(kept))
        router = state[f"{name}.gate.words"].float() @ state[f"{name}.gate.distilled"].float().t()
        moved = place[state[table]]
        state[table] = torch.where(moved >= 0, moved, router.argmax(-1))


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
    """(the pruned checkpoint, a report with the losses before and after).

    Raises:
        ValueError: the model has no experts to drop, or its gate cannot lose any.
    """
    checkpoint = load(path)
    model, cfg, task = build(path, data)
    layers = dict(moe_layers(model))
    if not layers:
        raise ValueError(f"{path} holds no MoE layer")
    if any(isinstance(m.gate, HashGate) for m in layers.values()):
        raise ValueError("--moe-gate hash: its experts have words of their own, none can go")
    if any(m.clock.stage == Stage.DIVERSIFY for m in layers.values()):
        raise ValueError(f"{path} is from before the split: it has one expert, none can go")
    experts = next(iter(layers.values())).cfg.moe_expert_count
    least = max(fewest(m.cfg) for m in layers.values())
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
    moe = MoEConfig.from_args(model_flags := cfg.model)
    changes: dict[str, Any] = {"moe_expert_count": left}
    if not moe.dts_parity and moe.moe_gate == "dts":
        # the threshold is relative to 1/E: hold its absolute value
        changes["dts_threshold"] = moe.threshold * left
    changes["dts_max_experts"] = min(moe.dts_max_experts, left)
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
        f"wrote {args.output}: {report['experts_before']} -> {report['experts_after']} experts a "
        f"layer; loss on {report['subset']} {report['loss_before']} -> {report['loss_after']}"
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("checkpoint", type=Path)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--data", help="binarised data; default: the folder named in the checkpoint")
    made.add_argument("--valid-subset", default="valid")
    made.add_argument("--max-tokens", type=int, default=4096, help="tokens a batch")
    made.add_argument("--keep", type=int, help="experts to keep in each layer")
    made.add_argument(
        "--min-share",
        type=float,
        default=0.1,
        help="without --keep: keep experts with at least this share of the even load 1/E",
    )
    made.add_argument("--json", type=Path, help="write the report there as well")
    made.add_argument("--cpu", action="store_true")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-prune", parser(), run, argv)


if __name__ == "__main__":
    main()
