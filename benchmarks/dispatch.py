"""Ways to bring tokens to experts: ours beside what other code does, top-1, whole layer forward.

    python benchmarks/dispatch.py --threads 2 --csv benchmarks/results/dispatch.csv

- official: EvoMoE's own code restated: one-hot masks (T, E, T), every expert on T slots;
- gshard: one-hot masks (T, E, C) with C = 2 T / E slots, tokens beyond them dropped (fairscale,
  DeepSpeed);
- grouped_mm: tokens sorted by expert, torch's grouped matrix product, rows added back;
- dense: an FFN of the same active FLOPs, the floor.

All use the same weights and the same routing and are checked against each other (gshard where it
drops nothing). Peak memory is of a process that does nothing else, less that of the floor's.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from timing import append, interleave, machine, milliseconds, ratios  # noqa: E402

from fairseq_evomoe.kernels import routing  # noqa: E402
from fairseq_evomoe.kernels.grouped_ffn import grouped_ffn  # noqa: E402

FIELDS = (
    "case tokens experts width hidden ratio_p50 ratio_p20 ratio_p80 ms peak_mb "
    "threads device torch date"
).split()


class Layer:
    """Weights, tokens and a routing that all ways share."""

    def __init__(self, tokens: int, experts: int, width: int, hidden: int) -> None:
        torch.manual_seed(1)
        self.x = torch.randn(tokens, width)
        self.w1 = torch.randn(experts, hidden, width) / width**0.5
        self.w2 = torch.randn(experts, width, hidden) / hidden**0.5
        self.b1, self.b2 = torch.zeros(experts, hidden), torch.zeros(experts, width)
        # as even as a balanced router makes it, so that no way of dispatch drops a token
        self.expert = torch.randperm(tokens) % experts
        self.weight = torch.rand(tokens)
        self.tokens, self.experts = tokens, experts

    def ours(self) -> Tensor:
        active = F.one_hot(self.expert, self.experts).bool()
        token, counts = routing.sort_pairs(active)
        return grouped_ffn(
            self.x, self.w1, self.b1, self.w2, self.b2,
            weight=self.weight[token], token=token, counts=counts, activation=F.relu,
        )  # fmt: skip

    def _slots(self, capacity: int) -> Tensor:
        chosen = F.one_hot(self.expert, self.experts)
        place = (chosen.cumsum(0) - 1)[torch.arange(self.tokens), self.expert]
        kept = place < capacity
        masks = torch.zeros(self.tokens, self.experts, capacity)
        masks[kept.nonzero()[:, 0], self.expert[kept], place[kept]] = 1
        return masks

    def _einsum(self, capacity: int) -> Tensor:
        masks = self._slots(capacity)
        rows = torch.einsum("tec,td->ecd", masks, self.x)
        h = torch.baddbmm(self.b1[:, None], rows, self.w1.transpose(1, 2)).relu_()
        out = torch.baddbmm(self.b2[:, None], h, self.w2.transpose(1, 2))
        return torch.einsum("tec,ecd->td", masks * self.weight[:, None, None], out)

    def official(self) -> Tensor:
        return self._einsum(self.tokens)

    def gshard(self) -> Tensor:
        return self._einsum(-(-2 * self.tokens // self.experts))

    def grouped_mm(self) -> Tensor:
        order = self.expert.sort(stable=True).indices
        ends = torch.bincount(self.expert, minlength=self.experts).cumsum(0).int()
        rows = self.x[order]
        h = F.grouped_mm(rows, self.w1.transpose(1, 2), offs=ends).relu_()
        out = F.grouped_mm(h, self.w2.transpose(1, 2), offs=ends)
        return torch.zeros_like(self.x).index_add_(0, order, out * self.weight[order, None])

    def dense(self) -> Tensor:
        return F.linear(F.linear(self.x, self.w1[0], self.b1[0]).relu_(), self.w2[0], self.b2[0])


CASES = ("ours", "grouped_mm", "gshard", "official")


def peak(case: str, sizes: list[int]) -> int:
    """Peak memory of a process that runs one case, bytes."""
    command = [sys.executable, __file__, "--peak", case, *(str(s) for s in sizes)]
    return int(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        case, *sizes = sys.argv[2:]
        with torch.no_grad():
            getattr(Layer(*(int(s) for s in sizes)), case)()
        status = Path("/proc/self/status").read_text().splitlines()
        print(next(int(x.split()[1]) * 1024 for x in status if x.startswith("VmHWM")))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for tokens in args.tokens:
        sizes = [tokens, args.experts, args.width, args.hidden]
        layer = Layer(*sizes)
        functions: dict[str, Callable[[], Tensor]] = {c: getattr(layer, c) for c in CASES}
        with torch.no_grad():
            want = layer.ours()
            for case in CASES:
                assert torch.allclose(functions[case](), want, atol=1e-3), case
            times = interleave({"dense": layer.dense, **functions}, args.rounds)
        floor = peak("dense", sizes)
        rows = [
            {
                **{"case": case, "tokens": tokens, "experts": args.experts},
                **{"width": args.width, "hidden": args.hidden},
                **ratios(times, case, "dense"),
                "ms": milliseconds(times[case]),
                "peak_mb": round((peak(case, sizes) - floor) / 1e6),
                **machine(),
            }
            for case in CASES
        ]
        for row in rows:
            print({k: row[k] for k in FIELDS[:10]}, flush=True)
        append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
