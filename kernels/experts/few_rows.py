"""Experts for few tokens on CPUs, in C++ (csrc/few_rows.cpp): decoding, and weights in int8.

Letters: T tokens, D model width, F expert hidden width, E experts, A active pairs.

With few tokens the time goes to reading weights and to the calls around the products. Here one op
per linear map finds the pairs, reads the weights of the experts that have some once, and adds. The
backward pass is that of `eager`, which computes the hidden values again.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.kernels import native
from fairseq_evomoe.kernels.backend import constant_when_compiled, forced_backend
from fairseq_evomoe.kernels.experts import eager
from fairseq_evomoe.kernels.experts.pairs import sparse_pairs
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing

SOURCES = Path(__file__).parent / "csrc"

FEW = 128
"""Largest number of tokens for which float32 weights take this path: torch's products gain on it
with every row."""
FEW_INT8 = 512
"""The same for int8 weights, which torch would have to widen first."""


@constant_when_compiled
def unavailable() -> str:
    """Reason why the op is unavailable, or "" if it is loaded."""
    return native.load(SOURCES, "few_rows")


@functools.cache
def isa() -> int:
    """Index into `native.ISAS` of the instruction set to use, once the op is loaded."""
    return native.chosen_isa(torch.ops.evomoe.few_rows_isa())


def unsupported(x: Tensor, experts: ExpertWeights, dropout: float) -> str:
    """Why this path cannot serve a call, or "" if it can."""
    if not x.is_cpu:
        return f"it runs on CPUs, not on {x.device.type}"
    if x.size(0) > FEW and forced_backend() != "native":
        return f"unless it is forced, it takes at most {FEW} tokens, not {x.size(0)}"
    if x.dtype != torch.float32 or experts.w1.dtype != torch.float32:
        return f"it has no {x.dtype} with weights of {experts.w1.dtype}"
    if dropout > 0:
        return "it has no dropout"
    return unavailable()


def unsupported_int8(x: Tensor, routing: Routing | None = None) -> str:
    """Why this path cannot serve int8 weights, of experts or of one matrix, or "" if it can."""
    if not x.is_cpu or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return f"it has no {x.dtype} on {x.device.type}"
    if x.size(0) > FEW_INT8:
        return f"it takes at most {FEW_INT8} tokens, not {x.size(0)}"
    weighted = routing is not None and routing.weights.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or weighted):
        return "it has no gradients"
    if forced_backend() not in ("", "native") or torch.compiler.is_compiling():
        return "another backend is forced, or torch compiles"
    return unavailable()


def ffn(
    x: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    *,
    activation: Callable[[Tensor], Tensor],
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y_t = sum over the active pairs (t, e) of weight * FFN_e(x_t): `moe_ffn.moe_ffn`.

    Args:
        x: (T, D) float32.
        experts: float32; with `scales`, w1 and w2 are int8 and there are no gradients.
        routing: weights (T, E) float32 and active pairs.
        activation: elementwise function.
        scales: factors of the rows of w1 (E, F) and of w2 (E, D), float32.
    """
    if scales is not None or not torch.is_grad_enabled():
        return _forward(x, experts, routing, activation, *(scales or (None, None)))
    return _FewRows.apply(x, *experts, routing.weights, routing.active, activation)


@torch.no_grad()
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x W^T for one matrix W in int8: that of one expert that every token visits.

    Args:
        x: (T, K) float32.
        weight: (N, K) int8.
        scale: (N,) float32, the factors of its rows.

    Returns:
        (T, N) float32.
    """
    op = torch.ops.evomoe.few_rows.default
    return op(x.contiguous(), weight.contiguous()[None], scale, None, None, None, False, isa())


@torch.no_grad()
def _forward(
    x: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    activation: Callable[[Tensor], Tensor],
    scale1: Tensor | None = None,
    scale2: Tensor | None = None,
) -> Tensor:
    if not len(x):
        return torch.zeros_like(x)
    weights, active = routing.weights.float().contiguous(), routing.active.contiguous()
    w1, b1, w2, b2 = (t.contiguous() for t in experts)
    op = torch.ops.evomoe.few_rows.default
    h = activation(op(x.contiguous(), w1, scale1, b1, weights, active, False, isa()))
    return op(h.contiguous(), w2, scale2, b2, weights, active, True, isa())


class _FewRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        *tensors, activation = rest
        *experts, weights, active = tensors
        ctx.save_for_backward(x, *tensors)
        ctx.activation = activation
        return _forward(x, ExpertWeights(*experts), Routing(weights, active), activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *leaves, active = ctx.saved_tensors
        needs = ctx.needs_input_grad[:6]
        leaves = [t.detach().requires_grad_(n) for t, n in zip(leaves, needs, strict=True)]
        x, *experts, weights = leaves
        with torch.enable_grad():
            pairs = sparse_pairs(Routing(weights, active))
            y = eager.grouped_ffn(x, ExpertWeights(*experts), pairs, activation=ctx.activation)
        wanted = [t for t, n in zip(leaves, needs, strict=True) if n]
        found = iter(torch.autograd.grad(y, wanted, dy, materialize_grads=True))
        return (*(next(found) if n else None for n in needs), None, None)
