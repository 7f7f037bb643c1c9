"""Bytes and time of expert parallelism: measured on this machine, or estimated for clusters.

    python -m benchmarks.speed.expert_parallel --workers 2 \\
        --csv benchmarks/results/expert_parallel.csv
    python -m benchmarks.speed.expert_parallel --plan

The first command runs one MoE layer on gloo workers of this machine and counts every byte that one
worker sends to another. It compares the count with the least that must be sent while experts stay
where they are (one row of D values to every other worker that holds an active expert of the token,
and one row back, in forward and in backward), and with the cost of sending one row per (token,
expert) pair. Outputs and input gradients are checked against one worker that holds all experts.

The second command measures nothing. It calculates bytes, seconds and memory for 64 and 1,024 GPUs
from the rates that it prints.
"""

import argparse
import math
import os
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from benchmarks.speed.timing import append, machine
from fairseq_evomoe.compat.running import free_port
from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.modules.experts import ExpertBank
from fairseq_evomoe.parallel.mesh import Shard, make_mesh

CASES = {"top-1": 1, "top-2": 2, "mean 3": 3, "all": None}
FIELDS = [
    *("case", "workers", "experts", "tokens", "width", "hidden", "bytes_per_token"),
    *("least", "of_least", "row_per_pair", "step_ms", "one_worker_ms", "ratio"),
    *("threads", "device", "torch", "date"),
]


def bank(args: argparse.Namespace) -> ExpertBank:
    torch.manual_seed(1)
    return ExpertBank(
        nn.Linear(args.width, args.hidden),
        nn.Linear(args.hidden, args.width),
        num_experts=args.experts,
        activation=F.relu,
        dropout=0.0,
        generator=torch.Generator().manual_seed(2),
    )


def routing(args: argparse.Namespace, case: str, rank: int) -> tuple[torch.Tensor, Routing]:
    """Return the tokens of one worker, and a plan with the case's number of active experts."""
    g = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(args.tokens, args.width, generator=g)
    scores = torch.rand(args.tokens, args.experts, generator=g)
    k = CASES[case]
    if k is None:
        active = torch.ones_like(scores, dtype=torch.bool)
    elif case.startswith("mean"):
        active = scores < k / args.experts
        active.scatter_(1, scores.argmin(1, keepdim=True), True)
    else:
        active = torch.zeros_like(scores, dtype=torch.bool)
        active.scatter_(1, scores.topk(k).indices, True)
    weights = active / active.sum(1, keepdim=True)
    return x, Routing(weights, active)


def step(made: ExpertBank, x: torch.Tensor, plan: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = made(x, plan)
    y.square().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def worker(rank: int, args: argparse.Namespace, port: int, results) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=args.workers)
    mesh = make_mesh(args.workers)
    one, own = bank(args), bank(args)
    own.distribute(Shard(mesh, args.experts, shared=False))
    sent = [0]
    original = dist.all_to_all_single

    def counting(out, x, receive=None, send=None, group=None):
        rows = [1] * args.workers if send is None else send
        width = x[0].numel() * x.element_size() if len(x) else 0
        sent[0] += sum(n for to, n in enumerate(rows) if to != rank) * width
        return original(out, x, receive, send, group=group)

    for case in CASES:
        x, plan = routing(args, case, rank)
        dist.all_to_all_single, sent[0] = counting, 0
        have = step(own, x, plan)
        dist.all_to_all_single = original
        want = step(one, x, plan)
        for a, b in zip(have, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), case

        per_worker = plan.active.view(args.tokens, args.workers, -1)
        others = [w for w in range(args.workers) if w != rank]
        counted = [sent[0], per_worker.any(-1)[:, others].sum(), per_worker[:, others].sum()]
        total = torch.tensor(counted, dtype=torch.float64)
        dist.all_reduce(total)
        sent_by_all, rows, pairs = (total / args.workers).tolist()
        row = 4 * args.width * x.element_size()
        times: dict[str, list[float]] = {"own": [], "one": []}
        for _ in range(args.repeats):
            for name, made in (("own", own), ("one", one)):
                dist.barrier()
                start = time.perf_counter()
                step(made, x, plan)
                dist.barrier()
                times[name].append(time.perf_counter() - start)
        if rank == 0:
            own_ms, one_ms = (statistics.median(t) * 1e3 for t in times.values())
            results.put(
                {
                    "case": case,
                    "workers": args.workers,
                    "experts": args.experts,
                    "tokens": args.tokens,
                    "width": args.width,
                    "hidden": args.hidden,
                    "bytes_per_token": round(sent_by_all / args.tokens, 1),
                    "least": round(rows * row / args.tokens, 1),
                    "of_least": round(sent_by_all / (rows * row), 3),
                    "row_per_pair": round(pairs * row / args.tokens, 1),
                    "step_ms": round(own_ms, 1),
                    "one_worker_ms": round(one_ms, 1),
                    "ratio": round(own_ms / one_ms, 2),
                    **machine(),
                }
            )
    dist.destroy_process_group()


def measure(args: argparse.Namespace) -> None:
    context = torch.multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    port = free_port()
    started = [
        context.Process(target=worker, args=(r, args, port, results)) for r in range(args.workers)
    ]
    for process in started:
        process.start()
    rows = [results.get() for _ in CASES]
    for process in started:
        process.join()
    print(
        "| active experts | bytes per token | over the least | one row per pair, over the least | "
        "step time over one worker's |"
    )
    print("| --- | --- | --- | --- | --- |")
    for r in rows:
        pairs = r["row_per_pair"] / r["least"]
        print(
            f"| {r['case']} | {r['bytes_per_token']:,.0f} | {r['of_least']:.3f} | {pairs:.2f} | "
            f"{r['ratio']:.2f} |"
        )
    append(args.csv, FIELDS, rows)


NVLINK, NETWORK, RATE, LATENCY = 450e9, 50e9, 4e14, 20e-6
NODE = 8


def workers_of_a_token(experts: int, size: int, k: int) -> float:
    """Expected number of distinct workers that hold k experts drawn at random."""
    per = experts // size
    return size * (1 - math.comb(experts - per, k) / math.comb(experts, k))


def plan(args: argparse.Namespace) -> None:
    """Print the estimates for clusters. The letters are those of docs/many_devices.md."""
    d, f, t = args.width, args.hidden, args.tokens
    print(
        f"D {d}, F {f}, {t} tokens per GPU, bf16. A GPU sends {NVLINK / 1e9:.0f} GB/s within its "
        f"node of {NODE} GPUs and {NETWORK / 1e9:.0f} GB/s between nodes, and computes "
        f"{RATE / 1e12:.0f} TFLOP/s. Starting a collective takes {LATENCY * 1e6:.0f} us."
    )
    print(
        "| GPUs | experts | group S | k | MB sent per GPU, within / between nodes | exchange, ms | "
        "compute, ms | exchange, % of time | expert memory, GB | gradients all-reduced, GB |"
    )
    print("| --- " * 10 + "|")
    for world, experts in ((64, 64), (1024, 64), (1024, 1024)):
        for size in sorted({NODE, min(world, 64), min(world, experts)}):
            for k in (1, 2):
                fan = workers_of_a_token(experts, size, k)
                row = 4 * d * 2 * t * fan
                near = row * (min(size, NODE) - 1) / size
                far = row * max(size - NODE, 0) / size
                seconds = near / NVLINK + far / NETWORK + 6 * LATENCY
                compute = 3 * k * t * 4 * d * f / RATE
                parameters = experts / size * 2 * d * f
                reduced = parameters * 2 * 2 if world > size else 0
                print(
                    f"| {world} | {experts} | {size} | {k} | {near / 1e6:.0f} / {far / 1e6:.0f} | "
                    f"{seconds * 1e3:.2f} | {compute * 1e3:.2f} | "
                    f"{seconds / (seconds + compute):.0%} | {parameters * 16 / 1e9:.2f} | "
                    f"{reduced / 1e9:.2f} |"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, help="tokens per worker")
    parser.add_argument("--width", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--plan", action="store_true", help="print estimates for clusters")
    args = parser.parse_args()
    sizes = (8192, 1024, 4096) if args.plan else (2048, 512, 2048)
    for name, size in zip(("tokens", "width", "hidden"), sizes, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, size)
    plan(args) if args.plan else measure(args)


if __name__ == "__main__":
    main()
