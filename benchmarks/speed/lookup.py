"""Time of a look-up, hash included, relative to the linear layer that it replaces.

    python -m benchmarks.speed.lookup --threads 1 --csv benchmarks/results/lookup.csv

Contenders: nn.Linear in float32; the C++ look-up with tables in float32, bfloat16 and int8; torch's
embedding_bag (`EVOMOE_BACKEND=torch`); and, with `--official DIR`, a checkout of the official code,
the CPU kernels of that code (they accept only multiples of 64 rows, and building them needs ninja).
Each look-up is first checked against the float64 reference. In training there are also tables with
a linear part (`--memory-linear`), without and with the straight-through gradient.

Batch 1 is the case of a decoder: as many layers as make 128 MB of linear weights are called in
turn, so that no weight is still in the cache. Larger batches call one layer again and again. The
floor of a look-up is the bytes that must come from memory over the measured copy rate. The floor of
the linear layer is the larger of that quotient and its FLOPs over the measured rate of a matrix
product.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.timing import (
    append,
    copy_rate,
    gemm_rate,
    interleave,
    machine,
    milliseconds,
    ratios,
)
from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.lookup import reference
from fairseq_evomoe.kernels.lookup.linear_part import fold, straight_through
from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.lookup.score import quantise
from fairseq_evomoe.kernels.pages import keep_freed_memory, large_pages

FIELDS = (
    "case width rows mode ratio_p50 ratio_p20 ratio_p80 ms floor_ms linear_ms bits score "
    "threads device torch date"
).split()
LINEAR_PARTS = ("linear part", "straight-through")
SIZE = {"fp32": 4, "bag": 4, "official": 4, "bf16": 2, "int8": 1, **dict.fromkeys(LINEAR_PARTS, 4)}
Official = Callable[[Tensor, Tensor], Tensor]


def official_kernels(checkout: Path, threads: int) -> Official:
    """Build the official kernels as their own code does.

    Returns:
        A function of z (rows, K, bits) and tables (K, 2^bits, D) that takes the first bit as the
        highest.
    """
    # they link their own OpenMP, which torch.set_num_threads does not control
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from torch.utils.cpp_extension import load

    flags = ["-fopenmp", "-O3", "-march=native"]

    def built(name: str, source: str) -> Any:
        path = str(checkout / "memory_module" / source)
        return load(name, [path], extra_cflags=flags, extra_ldflags=["-lgomp"])

    score = built("official_score", "compute_code_score/torch_extension.cc")
    gather = built("official_gather", "gather/cpu/torch_extension.cpp")

    def lookup(z: Tensor, tables: Tensor) -> Tensor:
        rows, count, _ = z.shape
        code, p = z.new_empty(rows, count, dtype=torch.int32), z.new_empty(rows, count)
        score.compute_code_score(z, code, p)
        code += torch.arange(count, dtype=torch.int32) * tables.size(1)
        return gather.weighted_vector_gather_add_avx2_par(code, tables.view(-1, tables.size(2)), p)

    return lookup


@contextmanager
def serving(case: str) -> Iterator[None]:
    """Within this context, `bag` runs on torch, and other cases on the automatic backend."""
    with backend.use("torch" if case == "bag" else ""):
        yield


class Layers:
    """Layers of one width with inputs; at batch 1 too many layers to stay in the cache."""

    def __init__(
        self,
        width: int,
        rows: int,
        bits: int,
        score: str,
        official: Official | None,
        device: str,
    ) -> None:
        cold = rows == 1
        count = max(8, 134_000_000 // (4 * width * width)) if cold else 1
        k, n = -(-width // bits), 2**bits
        self.width, self.rows, self.score, self.count = width, rows, score, count
        self.k, self.n, self.official = k, n, official if rows % 64 == 0 else None
        to = {"device": device}
        self.linear = [nn.Linear(width, width, **to) for _ in range(count)]
        base = torch.randn(k, n, width, **to)
        self.tables = [base.clone() for _ in range(count)]
        self.half = [base.bfloat16() for _ in range(count)]
        small, self.scale = quantise(base)
        self.small = [small.clone() for _ in range(count)]
        for t in (*self.tables, *self.half, *self.small):
            large_pages(t, now=True)
        self.z = [torch.randn(rows, k, bits, **to) for _ in range(count)]
        self.x = [z.reshape(rows, -1)[:, :width].contiguous() for z in self.z]
        self.dy = torch.randn(rows, width, **to)
        self.linear_part = torch.randn(k, bits, width, **to)

    def call(self, case: str) -> Callable[[int], Tensor]:
        """Return the function that runs layer number i."""
        z, score, scale = self.z, self.score, self.scale
        if case == "linear":
            linear, x = self.linear, self.x
            return lambda i: linear[i](x[i])
        if case == "int8":
            small = self.small
            return lambda i: lookup(z[i], small[i], score=score, row_scale=scale)
        if case == "official":
            assert self.official is not None
            tables, own = self.tables, self.official
            return lambda i: own(z[i], tables[i])
        if case in LINEAR_PARTS:
            return lambda i: self.with_linear_part(i, case)
        tables = self.half if case == "bf16" else self.tables
        return lambda i: lookup(z[i], tables[i], score=score)

    def with_linear_part(self, i: int, case: str) -> Tensor:
        """Layer i, its tables the sum of rows and a linear part."""
        z, linear = self.z[i], self.linear_part
        y = lookup(z, fold(self.tables[i], linear, 1.0), score=self.score)
        if case == "straight-through":
            y = straight_through(y, z, linear, 1.0, score=self.score, temperature=1.0)
        return y

    def check(self) -> None:
        """Check every contender against the reference."""
        z, table = self.z[0][:64].double(), self.tables[0].double()
        want = reference.lookup(z, table, score=self.score)
        for case, tolerance in (("fp32", 1e-4), ("bag", 1e-4), ("bf16", 0.03), ("int8", 0.03)):
            with serving(case):
                error = (self.call(case)(0)[:64] - want).abs().max() / want.abs().max()
            assert error < tolerance, (case, error)
        if self.official is not None:
            want = reference.lookup(z.flip(-1), table, score="abs_prob")
            error = (self.call("official")(0)[:64] - want).abs().max() / want.abs().max()
            assert error < 1e-4, ("official", error)

    def forward(self, case: str) -> Callable[[], None]:
        call = self.call(case)

        def run() -> None:
            with torch.inference_mode(), serving(case):
                for i in range(self.count):
                    call(i)

        return run

    def training(self, case: str) -> Callable[[], None]:
        call = self.call(case)
        inputs = self.x[0] if case == "linear" else self.z[0]
        leaves = [inputs.requires_grad_(), self.tables[0].requires_grad_()]
        leaves.append(self.linear_part.requires_grad_())

        def run() -> None:
            for p in (*leaves, *self.linear[0].parameters()):
                p.grad = None
            with serving(case):
                call(0).backward(self.dy)

        return run

    def floor(self, case: str, flops: float, copied: float, backward: bool) -> float:
        """Least possible time of one layer, in seconds."""
        passes = 3 if backward else 1
        ends = 2 * 4 * self.rows * self.width * passes
        if case == "linear":
            moved = 4 * self.width**2 * passes + ends
            return max(2 * self.rows * self.width**2 * passes / flops, moved / copied)
        touched = self.n * (1 - (1 - 1 / self.n) ** self.rows)
        moved = self.k * touched * self.width * SIZE[case] * (2 if backward else 1) + ends
        if backward:  # the gradient of the tables is dense: all of it is written
            moved += self.k * self.n * self.width * 4
        time = moved / copied
        if case == "straight-through":
            time += 2 * self.rows * self.width**2 / flops
        return time


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256, 1024, 4096])
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--score", default="prob")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--official", type=Path, help="checkout of the official code")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    keep_freed_memory()  # as in training
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    official = None if args.official is None else official_kernels(args.official, args.threads)
    flops, copied = gemm_rate(device=args.device), copy_rate(device=args.device)
    print(f"matrix product {flops / 1e9:.0f} GFLOP/s, copy {copied / 1e9:.1f} GB/s", flush=True)
    for width in args.widths:
        for rows in args.rows:
            layers = Layers(width, rows, args.bits, args.score, official, args.device)
            layers.check()
            named = ("fp32", "bf16", "int8", "bag") + ("official",) * bool(layers.official)
            modes = [("forward", layers.forward, named)]
            if rows >= 256 and width < 2048:
                modes.append(("forward+backward", layers.training, ("fp32", "bag", *LINEAR_PARTS)))
            made = []
            for mode, build, cases in modes:
                times = interleave({c: build(c) for c in ("linear", *cases)}, args.rounds)
                for case in cases:
                    floor = layers.floor(case, flops, copied, "backward" in mode)
                    made.append(
                        {
                            **{"case": case, "width": width, "rows": rows, "mode": mode},
                            **ratios(times, case, "linear"),
                            "ms": round(milliseconds(times[case]) / layers.count, 4),
                            "floor_ms": round(1e3 * floor, 4),
                            "linear_ms": round(milliseconds(times["linear"]) / layers.count, 4),
                            **{"bits": args.bits, "score": args.score},
                            **machine(args.device),
                        }
                    )
                    print({k: made[-1][k] for k in FIELDS[:10]}, flush=True)
            append(args.csv, FIELDS, made)


if __name__ == "__main__":
    main()
