"""Time of the MoE layer relative to the least that it could take.

    python -m benchmarks.speed.moe_layer --threads 2 --csv benchmarks/results/moe_layer.csv

In the sparse stage, the whole layer (gate, plan, experts, combine) is compared with a dense FFN of
the same active FLOPs. In the dense stage, it is compared with the two GEMMs of a dense FFN with E
times the hidden width. The `density` cases run the experts alone, under a random plan with that
fraction of all (token, expert) pairs, and are compared with the same two GEMMs. The layer and its
floor take turns in every round, and the median of the rounds' ratios is reported with the 20th and
80th percentile, because single times on a shared machine mean little. FLOPs per round are 2 T D F k
per GEMM. `ms_traffic` is a second floor: the time in which a copy moves as many bytes as the layer
has to (`traffic`). Freed memory stays in the process for both, as it does in training.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.timing import append, copy_rate, interleave, machine, milliseconds, ratios
from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.kernels.pages import keep_freed_memory
from fairseq_evomoe.models.ffn import DenseFFN, build_moe_layer
from fairseq_evomoe.modules.moe_layer import EvoMoELayer
from fairseq_evomoe.schedule import EvolutionSchedule

FIELDS = (
    "benchmark case mode ratio_p50 ratio_p20 ratio_p80 ms ms_floor ms_traffic gflops_floor tokens "
    "width hidden experts threads dtype device torch date"
).split()


def dense_ffn(width: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


def moe_layer(width: int, hidden: int, experts: int, gate: str, top_k: int) -> EvoMoELayer:
    cfg = MoEConfig(moe_freq=1, moe_expert_count=experts, moe_gate=gate, moe_top_k=top_k)
    dense = DenseFFN(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width), activation=F.relu)
    layer = build_moe_layer(cfg, None, "encoder.0", dense=dense)
    layer.set_schedule(EvolutionSchedule())
    # a random gate of this scale spreads tokens evenly, as a trained gate does
    nn.init.normal_(layer.gate.weight)
    return layer.train()


class Routed(nn.Module):
    """The experts alone, under a fixed random plan of a given density."""

    def __init__(self, layer: EvoMoELayer, tokens: int, density: float) -> None:
        super().__init__()
        self.bank = layer.experts
        experts = layer.cfg.moe_expert_count
        pairs = round(density * tokens * experts)
        active = torch.zeros(tokens * experts, dtype=torch.bool)
        active[torch.randperm(tokens * experts)[:pairs]] = True
        active = active.view(tokens, experts)
        weights = torch.rand(tokens, experts) * active
        here = layer.experts.w1.device
        self.routing = Routing(weights.to(here), active.to(here))

    def forward(self, x: Tensor) -> Tensor:
        return self.bank(x.flatten(0, 1), self.routing).view_as(x)


def step(module: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    direction = torch.randn_like(x.detach())

    def run() -> None:
        if not backward:
            with torch.no_grad():
                module(x)
            return
        module.zero_grad(set_to_none=True)
        x.grad = None
        y = module(x)
        y.backward(direction)

    return run


def traffic(tokens: int, width: int, hidden: int, experts: int, backward: bool) -> int:
    """Number of values that pass between memory and processor at least, if all experts have tokens.

    Forward, the weights and x are read and y is written. Backward, the weights, x and dy are read,
    and dx and the weights' gradients are written. Hidden values may stay in a cache, or be computed
    again, and are not counted.
    """
    weights, x = 2 * experts * width * hidden, tokens * width
    return 3 * weights + 5 * x if backward else weights + 2 * x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--cases", nargs="+", help="names of cases (default: all)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    torch.manual_seed(1)
    T, D, H, E = args.tokens, args.width, args.hidden, args.experts
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    x = torch.randn(T // 32, 32, D).to(**to).requires_grad_()

    cases: list[tuple[str, nn.Module, nn.Module, int]] = []
    for k in (1, 2):
        gate = "switch" if k == 1 else "topk"
        layer = moe_layer(D, H, E, gate, k).to(**to)
        cases.append((f"sparse top-{k}", layer, dense_ffn(D, k * H), k))
    dense = moe_layer(D, H, E, "dense", 1).to(**to)
    cases.append(("dense stage", dense, dense_ffn(D, E * H), E))
    for density in (0.25, 0.5, 0.75, 0.9):
        routed = Routed(dense, T, density)
        cases.append((f"density {density}", routed, dense_ffn(D, E * H), E))

    # a copy reads and writes
    values_per_ms = 2 * copy_rate(device=args.device) / to["dtype"].itemsize / 1e3
    rows = []
    for name, ours, floor, k in cases:
        if args.cases and name not in args.cases:
            continue
        floor.to(**to)
        for mode, backward in (("forward", False), ("forward+backward", True)):
            times = interleave(
                {"ours": step(ours, x, backward), "floor": step(floor, x, backward)}, args.rounds
            )
            floor_ms = milliseconds(times["floor"])
            flops = 2 * 2 * T * D * H * k * (3 if backward else 1)
            row = {
                **{"benchmark": "moe_layer", "case": name, "mode": mode},
                **ratios(times, "ours", "floor"),
                **{"ms": milliseconds(times["ours"]), "ms_floor": floor_ms},
                "ms_traffic": round(traffic(T, D, H, E, backward) / values_per_ms, 4),
                "gflops_floor": round(flops / floor_ms / 1e6, 1),
                **{"tokens": T, "width": D, "hidden": H, "experts": E},
                **{"dtype": args.dtype},
                **machine(args.device),
            }
            rows.append(row)
            print(json.dumps({k_: row[k_] for k_ in FIELDS[1:10]}), flush=True)
    append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
