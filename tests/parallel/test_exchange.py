"""parallel/exchange.py: exchanged tokens give the results of one worker that holds all experts."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.compat.expert_parallel import clip_with_experts
from fairseq_evomoe.compat.running import free_port
from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.modules.experts import ExpertBank
from fairseq_evomoe.parallel.gradients import reduce_expert_gradients
from fairseq_evomoe.parallel.mesh import Shard, make_mesh

D, HIDDEN, E = 6, 10, 4


def bank(*, shared=False):
    torch.manual_seed(3)
    made = ExpertBank(
        nn.Linear(D, HIDDEN),
        nn.Linear(HIDDEN, D),
        num_experts=E + shared,
        activation=F.relu,
        dropout=0.0,
        generator=torch.Generator().manual_seed(4),
        shared=shared,
    )
    return made.double()


def routing(case, rank, world):
    """(x, weights, active) of one worker."""
    g = torch.Generator().manual_seed(10 + rank)
    tokens = {"uneven": 3 + 5 * rank, "empty": 7 if rank == world - 1 else 0}.get(case, 6)
    x = torch.randn(tokens, D, generator=g, dtype=torch.float64)
    weights = torch.rand(tokens, E, generator=g, dtype=torch.float64)
    active = torch.rand(tokens, E, generator=g) < 0.5
    if case == "all to one":
        active = torch.zeros(tokens, E, dtype=torch.bool)
        active[:, 2] = True
    elif case == "dense":
        active[:] = True
    elif case == "nobody":
        active[:] = False
    return x, weights * active, active


def equal(a, b, what):
    assert torch.allclose(a, b, atol=1e-12), (what, (a - b).abs().max())


def check(rank, world, size):
    mesh = make_mesh(size)
    for shared in (False, True):
        for case in ("even", "uneven", "empty", "all to one", "dense", "nobody"):
            one, own = bank(shared=shared), bank(shared=shared)
            own.distribute(Shard(mesh, E + shared, shared=shared))
            want, have = [], []
            # the reference is one bank that computes the tokens of every worker
            for r in range(world):
                x, w, active = routing(case, r, world)
                x.requires_grad_(), w.requires_grad_()
                y = one(x, Routing(w, active))
                (y * torch.arange(1.0, D + 1) * (r + 1)).sum().backward()
                if r == rank:
                    want = [y, x.grad, w.grad]
            x, w, active = routing(case, rank, world)
            x.requires_grad_(), w.requires_grad_()
            y = own(x, Routing(w, active))
            (y * torch.arange(1.0, D + 1) * (rank + 1)).sum().backward()
            have = [y, x.grad, w.grad]
            for name, a, b in zip(("y", "dx", "dw"), want, have, strict=True):
                equal(a, b, (case, shared, name))
            reduce_expert_gradients(own.parameters())
            for (name, a), b in zip(one.named_parameters(), own.parameters(), strict=True):
                equal(a.grad[own.expert_ids] / world, b.grad, (case, shared, name))
            original = lambda params, *_: torch.zeros((), dtype=torch.float64)
            norm = clip_with_experts(original)(own.parameters(), 0.5)
            whole = torch.cat([p.grad.flatten() / world for p in one.parameters()]).norm()
            assert abs(norm - whole) < 1e-5 * (1 + whole), (case, shared)
            factor = min(1, 0.5 / (whole + 1e-6))
            for a, b in zip(one.parameters(), own.parameters(), strict=True):
                assert torch.allclose(a.grad[own.expert_ids] / world * factor, b.grad, rtol=1e-5)
    # a NaN in one worker's gradient makes the norm NaN on every worker of its group
    next(own.parameters()).grad.view(-1)[-1] = float("nan" if rank == world - 1 else 1)
    if size == world:
        assert clip_with_experts(original)(own.parameters(), 0.5).isnan()


def worker(rank, world, size, port):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    try:
        check(rank, world, size)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("world", "size"), [(2, 2), (4, 2), (4, 4), (2, 1)])
def test_exchange_equals_one_worker(world, size):
    """Outputs, gradients, norm and clipping equal one worker's, also for uneven, empty and
    one-sided batches."""
    port = free_port()
    torch.multiprocessing.spawn(worker, (world, size, port), nprocs=world)
