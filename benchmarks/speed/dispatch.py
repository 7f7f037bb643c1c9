"""Time and memory of ways to dispatch tokens to experts: ours compared with those of other code.

    python -m benchmarks.speed.dispatch --threads 2 --csv benchmarks/results/dispatch.csv
    python -m benchmarks.speed.dispatch --device cuda --dtype bfloat16 --tokens 16384 \\
        --width 1024 --hidden 4096 --routing top1 top2 mix --cases ours fused

- official: the layout of EvoMoE's own code, with one-hot masks (T, E, T); every expert computes T
  slots;
- gshard: one-hot masks (T, E, C), where C is twice the mean load (fairscale, DeepSpeed);
- grouped_mm: pairs sorted by expert, torch's grouped matrix product, rows added with `index_add_`;
- transformers: the grouped implementation of that library, if it is installed;
- eager: one expert after another by indices, as transformers does without its grouped
  implementation;
- fused, on CUDA: ours, forced to use our own matrix products even where torch's would be chosen;
- scattermoe, on CUDA: ScatterMoE's kernels (arXiv 2403.08245), from a checkout
  (`--scattermoe DIR`). They need the same number of experts for every token, so this case leaves
  out `mix`;
- the floor: a dense FFN of the same active FLOPs.

The routings top1 and top2 have even loads. In mix, each token draws its own number of experts, 3 on
average, as with a dense-to-sparse gate. All cases use the same weights and the same routing and are
checked against each other. `floor_ms` is the number of FLOPs over the measured rate of a matrix
product. Peak memory is that of a forward pass minus that of the floor. On CPUs, each is measured in
a process that does nothing else.
"""

import argparse
import importlib.util
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.speed.timing import append, gemm_rate, interleave, machine, milliseconds, ratios
from fairseq_evomoe.kernels.experts import gpu
from fairseq_evomoe.kernels.experts.moe_ffn import moe_ffn
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing
from fairseq_evomoe.kernels.pages import keep_freed_memory

FIELDS = (
    "case routing mode tokens experts width hidden ratio_p50 ratio_p20 ratio_p80 ms dense_ms "
    "floor_ms peak_mb dtype threads device torch date"
).split()
ROUTINGS = ("top1", "top2", "mix")


def routing(kind: str, tokens: int, experts: int) -> Tensor:
    """The active pairs, (T, E) bool."""
    if kind != "mix":
        # loads are as even as those of a balanced router, so that no case drops a token
        first = torch.randperm(tokens) % experts
        active = F.one_hot(first, experts)
        if kind == "top2":
            active += F.one_hot((first + 1 + torch.randperm(tokens) % (experts - 1)) % experts)
        return active > 0
    each = (1 + torch.poisson(torch.full((tokens,), 2.0))).clamp_(max=experts)
    rank = torch.rand(tokens, experts).argsort(1).argsort(1)
    return rank < each[:, None]


class Layer:
    """The weights, tokens and routing that all cases share, and one method per case."""

    def __init__(self, sizes: list[int], kind: str, device: str, dtype: torch.dtype) -> None:
        tokens, experts, width, hidden = sizes
        torch.manual_seed(1)
        new = lambda *shape: torch.randn(*shape).to(device, dtype)
        leaf = lambda t: t.detach().requires_grad_()
        self.tokens, self.experts, self.kind = tokens, experts, kind
        self.active = routing(kind, tokens, experts).to(device)
        self.pairs = int(self.active.sum())
        self.x = leaf(new(tokens, width))
        self.w1 = leaf(new(experts, hidden, width) / width**0.5)
        self.w2 = leaf(new(experts, width, hidden) / hidden**0.5)
        self.b1, self.b2 = leaf(new(experts, hidden)), leaf(new(experts, width))
        self.weights = leaf(torch.rand(tokens, experts).to(device))
        self.dy = new(tokens, width)
        # a multiple of 8, which suits tensor cores and vector units
        wide = round(hidden * self.pairs / tokens / 8) * 8
        self.v1, self.v2 = leaf(new(wide, width) / width**0.5), leaf(new(width, wide) / wide**0.5)
        self.flops = 4 * self.pairs * width * hidden

    def leaves(self) -> list[Tensor]:
        return [self.x, self.w1, self.b1, self.w2, self.b2, self.weights, self.v1, self.v2]

    def ours(self) -> Tensor:
        # the limit that the gates set in their plans
        bound = {"top1": 1, "top2": 2}.get(self.kind)
        return moe_ffn(
            self.x,
            ExpertWeights(self.w1, self.b1, self.w2, self.b2),
            Routing(self.weights * self.active, self.active, bound),
            activation=F.relu,
        )

    def fused(self) -> Tensor:
        with gpu.use_product("fused"):
            return self.ours()

    def _einsum(self, capacity: int) -> Tensor:
        place = self.active.long().cumsum(0) - 1
        kept = self.active & (place < capacity)
        masks = self.x.new_zeros(self.tokens, self.experts, capacity)
        t, e = kept.nonzero(as_tuple=True)
        masks[t, e, place[t, e]] = 1
        rows = torch.einsum("tec,td->ecd", masks, self.x)
        h = torch.baddbmm(self.b1[:, None], rows, self.w1.transpose(1, 2)).relu_()
        out = torch.baddbmm(self.b2[:, None], h, self.w2.transpose(1, 2))
        return torch.einsum("tec,ecd->td", masks * self.weights[..., None].to(masks.dtype), out)

    def official(self) -> Tensor:
        return self._einsum(self.tokens)

    def gshard(self) -> Tensor:
        return self._einsum(min(self.tokens, -(-2 * self.pairs // self.experts)))

    def grouped_mm(self) -> Tensor:
        expert, token = self.active.t().nonzero(as_tuple=True)
        ends = self.active.sum(0).cumsum(0).int()
        rows = self.x[token]
        h = (F.grouped_mm(rows, self.w1.transpose(1, 2), offs=ends) + self.b1[expert]).relu_()
        out = F.grouped_mm(h, self.w2.transpose(1, 2), offs=ends) + self.b2[expert]
        out = out * self.weights[token, expert, None].to(out.dtype)
        return torch.zeros_like(self.x).index_add_(0, token, out)

    def eager(self) -> Tensor:
        y = torch.zeros_like(self.x)
        for e in range(self.experts):
            (token,) = torch.where(self.active[:, e])
            h = F.linear(self.x[token], self.w1[e], self.b1[e]).relu_()
            out = F.linear(h, self.w2[e], self.b2[e])
            y = y.index_add(0, token, out * self.weights[token, e, None].to(out.dtype))
        return y

    def transformers(self) -> Tensor:
        from transformers.integrations.moe import grouped_mm_experts_forward

        # unused slots get the index E, which that library gives to experts of other workers
        most = int(self.active.sum(1).max())
        index = self.active.int().topk(most, 1).indices
        on = self.active.gather(1, index)
        index = index.masked_fill(~on, self.experts)
        weights = self.weights.gather(1, index.clamp(max=self.experts - 1)) * on
        layer = SimpleNamespace(
            num_experts=self.experts, has_gate=False, has_bias=True, has_post_expert_norm=False,
            is_transposed=False, _is_expert_parallel=self.kind == "mix", act_fn=F.relu,
            up_proj=self.w1, up_proj_bias=self.b1, down_proj=self.w2, down_proj_bias=self.b2,
        )  # fmt: skip
        return grouped_mm_experts_forward(layer, self.x, index, weights.to(self.x.dtype))

    def scattermoe(self) -> Tensor:
        from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

        each = self.pairs // self.tokens
        index = self.active.int().topk(each, 1).indices
        weights = self.weights.gather(1, index).to(self.x.dtype)
        order = flatten_sort_count(index, num_experts=self.experts)
        w1, w2 = self.w1.transpose(1, 2), self.w2.transpose(1, 2)
        h = parallel_linear(self.x, w1, each, *order, expert_biases=self.b1, grouped_out=True)
        h = h.relu_()
        return parallel_linear(
            h, w2, 1, *order, expert_biases=self.b2, gates=weights, grouped_in=True
        )

    def dense(self) -> Tensor:
        return F.linear(F.linear(self.x, self.v1).relu_(), self.v2)

    def step(self, case: str, backward: bool) -> Callable[[], None]:
        function = getattr(self, case)

        def run() -> None:
            if not backward:
                with torch.no_grad():
                    function()
                return
            for leaf in self.leaves():
                leaf.grad = None
            function().backward(self.dy)

        return run

    def check(self, cases: list[str]) -> None:
        """Check the output and the gradients of every case against `ours`."""
        exact = self.x.dtype == torch.float32
        found = {}
        for case in ["ours", *cases]:
            for leaf in self.leaves():
                leaf.grad = None
            y = getattr(self, case)()
            y.backward(self.dy)
            grads = [leaf.grad for leaf in self.leaves()[:6]]
            grads[5] = grads[5] * self.active
            found[case] = [y.detach(), *grads]
        for case in cases:
            for a, b in zip(found[case], found["ours"], strict=True):
                error = (a - b).abs().max() / b.abs().max()
                assert error < (1e-3 if exact else 0.05), (case, float(error))


CASES = ("ours", "grouped_mm", "transformers", "eager", "gshard", "official")


def peaks(cases: list[str], layer: Layer, sizes: list[int]) -> dict[str, int]:
    """Case -> peak memory of its forward pass minus that of the floor, in MB."""
    if layer.x.is_cuda:
        most = {case: _peak_on_gpu(case, layer) for case in (*cases, "dense")}
    else:
        # each case runs in a fork of a process that has imported all modules and done nothing
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.speed.dispatch"])
        dtype = str(layer.x.dtype).removeprefix("torch.")
        with context.Pool(1, maxtasksperchild=1) as alone:
            most = {
                case: alone.apply(_peak_alone, (case, layer.kind, dtype, sizes))
                for case in (*cases, "dense")
            }
    return {case: round((most[case] - most["dense"]) / 1e6) for case in cases}


def _peak_on_gpu(case: str, layer: Layer) -> int:
    torch.cuda.reset_peak_memory_stats()
    layer.step(case, False)()
    return torch.cuda.max_memory_allocated()


def _peak_alone(case: str, kind: str, dtype: str, sizes: list[int]) -> int:
    """Peak of this process's memory during one forward pass, in bytes; modules are not counted."""
    # a small layer first, so that the case has imported what it needs
    few = [min(size, most) for size, most in zip(sizes, (8, 4, 16, 16), strict=True)]
    Layer(few, kind, "cpu", getattr(torch, dtype)).step(case, False)()
    layer = Layer(sizes, kind, "cpu", getattr(torch, dtype))
    before = _memory("VmRSS")
    # Linux forgets the peak so far
    Path("/proc/self/clear_refs").write_text("5")
    layer.step(case, False)()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in status if x.startswith(field))


def measure(layer: Layer, sizes: list[int], cases: list[str], args: Any, rate: float) -> None:
    layer.check([c for c in cases if c != "ours"])
    most = peaks(cases, layer, sizes)
    for mode in args.modes:
        backward = "backward" in mode
        steps = {name: layer.step(name, backward) for name in ("dense", *cases)}
        times = interleave(steps, args.rounds)
        rows = [
            {
                **{"case": case, "routing": layer.kind, "mode": mode},
                **dict(zip(("tokens", "experts", "width", "hidden"), sizes, strict=True)),
                **ratios(times, case, "dense"),
                "ms": milliseconds(times[case]),
                "dense_ms": milliseconds(times["dense"]),
                "floor_ms": round(1e3 * layer.flops * (3 if backward else 1) / rate, 4),
                **{"peak_mb": most[case], "dtype": args.dtype},
                **machine(args.device),
            }
            for case in cases
        ]
        for row in rows:
            print({k: row[k] for k in FIELDS[:14]}, flush=True)
        append(args.csv, FIELDS, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--experts", type=int, nargs="+", default=[16])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["top1"])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    parser.add_argument("--scattermoe", metavar="DIR", help="checkout of ScatterMoE; adds its case")
    modes = ["forward", "forward+backward"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    cases = list(args.cases)
    if "transformers" in cases and importlib.util.find_spec("transformers") is None:
        print("transformers is not installed; its case is left out", flush=True)
        cases.remove("transformers")
    if args.scattermoe:
        sys.path.insert(0, args.scattermoe)
        cases.append("scattermoe")
    dtype = getattr(torch, args.dtype)
    size = 1024 if args.device == "cpu" else 8192
    rate = gemm_rate(size, dtype=dtype, device=args.device)
    print(f"matrix product {rate / 1e9:.0f} GFLOP/s", flush=True)
    for experts in args.experts:
        for kind in args.routing:
            for tokens in args.tokens:
                sizes = [tokens, experts, args.width, args.hidden]
                can = [c for c in cases if kind != "mix" or c != "scattermoe"]
                measure(Layer(sizes, kind, args.device, dtype), sizes, can, args, rate)


if __name__ == "__main__":
    main()
