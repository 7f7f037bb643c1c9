"""The routing of single tokens as JSON lines, which other tools can read.

A line is one token in one MoE layer. Its first fields are those of Megatron-Core's routing trace
(`RouterTracer`: step, stage, block, layer, rank, num_tokens, topk, top_indices) for a step of one
token, so that programs that read such traces read this one; a line may have another number of
experts than the next. The other fields say which token it is: `token`, `id`, `sentence` (number of
the sample in the data set), `position` (from 1, without padding), and how it was routed: `weights`
of the experts in `top_indices`, and `entropy` of the gate's probabilities in nats.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import RoutingPlan, TokenBatch
from fairseq_evomoe.tools import validation
from fairseq_evomoe.tools.checkpoint import build, in_place_of, refuse_existing
from fairseq_evomoe.tools.specialists import experts_of_tokens


def records(
    plan: RoutingPlan, tokens: TokenBatch, samples: Tensor, dictionary: Any
) -> Iterator[dict[str, Any]]:
    """What a trace says of each real token of a batch in one layer.

    Args:
        plan: of the layer's gate.
        tokens: of the batch.
        samples: number of each row of the batch in the data set, (B,) int64.
        dictionary: of the tokens.
    """
    entropy = -(plan.probs * plan.probs.clamp_min(1e-30).log()).sum(-1)
    rows = zip(
        experts_of_tokens(plan),
        tokens.token.tolist(),
        samples[tokens.sentence.cpu()].tolist(),
        tokens.place.tolist(),
        entropy.tolist(),
        strict=True,
    )
    for experts, token, sentence, position, nats in rows:
        yield {
            "num_tokens": 1,
            "topk": len(experts),
            "top_indices": [[expert for expert, _ in experts]],
            "token": dictionary[token],
            "id": token,
            "sentence": sentence,
            "position": position,
            "weights": [round(w, 6) for _, w in experts],
            "entropy": round(nats, 6),
        }


@torch.no_grad()
def write(model: Any, task: Any, to: TextIO, *, subset: str, max_tokens: int) -> int:
    """Write the trace of a data set and return its number of lines.

    Raises:
        ValueError: no line was written, because no batch fits or the experts have not split.
    """
    model.eval()
    layers = [layer for _, layer in moe_layers(model)]
    seen: dict[str, tuple[RoutingPlan, TokenBatch]] = {}
    lines = 0

    def keep(name: str) -> Any:
        return lambda gate, args, plan: seen.update({name: (plan, args[2])})

    hooks = [layer.gate.register_forward_hook(keep(layer.name)) for layer in layers]
    try:
        batches = validation.batches(model, task, subset, max_tokens)
        for step, sample in enumerate(tqdm(batches, desc=subset, unit="batch", disable=None)):
            model(**sample["net_input"])
            for layer in layers:
                if layer.name not in seen:
                    continue
                block, number = layer.name.split(".")
                reads = task.target_dictionary if block == "decoder" else task.source_dictionary
                place = {"step": step, "stage": "pre_dispatch", "block": block}
                place |= {"layer": int(number), "rank": 0}
                for found in records(*seen.pop(layer.name), sample["id"], reads):
                    to.write(json.dumps(place | found, ensure_ascii=False) + "\n")
                    lines += 1
    finally:
        for hook in hooks:
            hook.remove()
    if not lines:
        raise ValueError(
            f"--subset {subset}: no token was routed: either no batch fits (raise --max-tokens) or "
            "the model has no experts yet"
        )
    return lines


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `evomoe-report trace`."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines to write")
    parser.add_argument("--data", help="folder with the binarised data and its dictionaries")
    parser.add_argument("--subset", default="valid", help="which of its sets")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens in a batch")


def run(args: argparse.Namespace) -> None:
    """Carry out `evomoe-report trace`."""
    refuse_existing(args.output)
    model, cfg, task = build(args.checkpoint, args.data)
    if not moe_layers(model):
        raise ValueError(f"{args.checkpoint} has no experts, so there is no routing to trace")
    task.load_dataset(args.subset, task_cfg=cfg.task)
    with in_place_of(args.output) as partial, partial.open("w", encoding="utf-8") as to:
        lines = write(model, task, to, subset=args.subset, max_tokens=args.max_tokens)
    print(f"wrote {lines:,} lines to {args.output}")
