"""The choice of what computes the experts of a call, by device and by density of the routing.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.experts import eager, few_rows, gpu, reference
from fairseq_evomoe.kernels.experts.pairs import DENSE_FROM, all_pairs, sparse_pairs
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Pairs, Routing

Activation = Callable[[Tensor], Tensor]


def to_autocast(x: Tensor, experts: ExpertWeights) -> tuple[Tensor, ExpertWeights]:
    """States and weights in the dtype of autocast, if autocast is on."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, experts
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), ExpertWeights(*(w.to(dtype) for w in experts))


def run_experts(
    x: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    *,
    activation: Activation,
    dropout: float = 0.0,
) -> Tensor:
    """`moe_ffn.moe_ffn` outside torch.compile: choose an implementation and run it.

    A nearly dense routing runs in place over all pairs, whose inactive ones weigh 0. A sparse one
    gathers rows by expert, at a cost that follows the number of active pairs. On GPUs, memory and
    elementwise work follow `routing.max_active`, which needs no count from the device. On CPUs, few
    tokens take an op in C++.
    """
    # if `native` is forced, a call that it cannot serve is treated as one of an op that lacks it
    native = backend.forced_backend() in ("", "native")
    if native and not few_rows.unsupported(x, experts, dropout):
        return few_rows.ffn(x, experts, routing, activation=activation)
    name = backend.choose_backend(
        triton=lambda: gpu.unsupported(x, experts, activation, dropout),
        torch=backend.supported,
        reference=backend.supported,
    )
    if name != "triton":
        pairs = sparse_pairs(routing)
        return run_pairs(x, experts, pairs, activation=activation, dropout=dropout)
    bound = routing.max_active
    max_pairs = int(routing.active.sum()) if bound is None else bound * len(x)
    with torch.autocast(x.device.type, enabled=False):
        if max_pairs < DENSE_FROM * routing.active.numel():
            return gpu.sparse_ffn(
                x, experts, routing, max_pairs=max_pairs, activation=activation, dropout=dropout
            )
        return eager.grouped_ffn(
            x, experts, all_pairs(routing), activation=activation, dropout=dropout
        )


def run_pairs(
    x: Tensor,
    experts: ExpertWeights,
    pairs: Pairs,
    *,
    activation: Activation,
    dropout: float = 0.0,
) -> Tensor:
    """`eager.grouped_ffn`, or its reference if that is the backend; in the dtype of autocast."""
    name = backend.choose_backend(torch=backend.supported, reference=backend.supported)
    op = reference.grouped_ffn if name == "reference" else eager.grouped_ffn
    x, experts = to_autocast(x, experts)
    with torch.autocast(x.device.type, enabled=False):
        return op(x, experts, pairs, activation=activation, dropout=dropout)
