"""Time of moving tokens to their experts and back, relative to a copy of the same bytes.

    python -m benchmarks.speed.permute --device cuda --dtype bfloat16 --tokens 16384 --width 1024

`dispatch` gathers the rows of the active pairs in expert order, and `combine` adds them up,
weighed, token by token. On a GPU both are Triton kernels, on a CPU they are torch's `index_select`
and `index_add`. `share_of_copy` is the rate of the bytes that must be read and written over the
rate of a copy of a tensor that large.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.speed.dispatch import routing
from benchmarks.speed.timing import append, interleave, machine, milliseconds, ratios
from fairseq_evomoe.kernels.experts.pairs import expert_order

FIELDS = (
    "case routing tokens experts width share_of_copy p20 p80 ms dtype threads device torch date"
).split()


def steps(x: Tensor, active: Tensor, weights: Tensor) -> dict[str, Callable[[], object]]:
    """The two moves, each with the copy of as many bytes."""
    pairs = int(active.sum())
    if x.is_cuda:
        from fairseq_evomoe.kernels.experts.dispatch_triton import combine, dispatch
        from fairseq_evomoe.kernels.experts.pairs_triton import sort_pairs

        place = sort_pairs(active, pairs).place
        rows = dispatch(x, place, pairs)
        there = lambda: dispatch(x, place, pairs)
        back = lambda: combine(rows, weights, place)
    else:
        token, _ = expert_order(active)
        weight = weights.t().masked_select(active.t()).to(x.dtype)[:, None]
        rows = x.index_select(0, token)
        there = lambda: x.index_select(0, token)
        back = lambda: torch.zeros_like(x).index_add_(0, token, rows * weight)
    # both moves read one side and write the other, a copy reads and writes the same
    middle = x.new_empty((len(x) + pairs) // 2, x.size(1)).normal_()
    target = torch.empty_like(middle)
    return {"dispatch": there, "combine": back, "copy": lambda: target.copy_(middle)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.manual_seed(1)
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    rows = []
    for kind in ("top1", "top2"):
        active = routing(kind, args.tokens, args.experts).to(args.device)
        x = torch.randn(args.tokens, args.width).to(**to)
        weights = torch.rand(args.tokens, args.experts, device=args.device) * active
        times = interleave(steps(x, active, weights), args.rounds)
        for case in ("dispatch", "combine"):
            share = ratios(times, "copy", case)
            rows.append(
                {
                    **{"case": case, "routing": kind, "tokens": args.tokens},
                    **{"experts": args.experts, "width": args.width},
                    "share_of_copy": share["ratio_p50"],
                    **{"p20": share["ratio_p20"], "p80": share["ratio_p80"]},
                    **{"ms": milliseconds(times[case]), "dtype": args.dtype},
                    **machine(args.device),
                }
            )
            print({k: rows[-1][k] for k in FIELDS[:9]}, flush=True)
    append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
