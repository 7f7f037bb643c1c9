"""The dense-to-sparse gate on GPUs, in Triton: one pass over (T, E) forward, one backward.

Letters: T tokens, E experts, B tokens of a program, W = E rounded up to a power of two.

Noise is counter-based: the number of (token, expert) in the stream of a seed decides it, whatever
the size of a block, and the backward pass draws it again instead of reading it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_evomoe.kernels.gate import COMBINE, Rule
from fairseq_evomoe.kernels.routing_triton import token_tile

RENORM, STRAIGHT, RAW, SOFTMAX = (tl.constexpr(COMBINE.index(n)) for n in COMBINE)


@triton.jit
def _softmax(z, inside):
    z = tl.where(inside, z, float("-inf"))
    e = tl.exp(z - tl.max(z, 1)[:, None])
    e = tl.where(inside, e, 0.0)
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _gumbel(seed, at):
    # 1 - u lies in (0, 1]: its logarithm is finite, and that of 0 is kept out
    u = 1.0 - tl.rand(seed, at)
    return -tl.log(tl.maximum(-tl.log(u), 1e-20))


@triton.jit
def _forward(
    z_ptr, bias_ptr, weight_ptr, active_ptr, probs_ptr,
    tokens, experts, tau, noise, threshold, seed,
    MOST: tl.constexpr, BY_THRESHOLD: tl.constexpr, CAPPED: tl.constexpr, COMBINE: tl.constexpr,
    BIASED: tl.constexpr, NOISY: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    t, e, inside, at = token_tile(tokens, experts, B, W)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    # rows beyond the last token stay finite
    real = (e < experts)[None, :] & (t >= 0)[:, None]
    probs = _softmax(z, real)
    noisy = z
    if NOISY:
        noisy = z + noise * _gumbel(seed, at)
    p = _softmax(noisy / tau, real)
    by = p
    if BIASED:
        b = tl.load(bias_ptr + e, mask=e < experts, other=0.0)
        by = _softmax((noisy + b[None, :]) / tau, real)

    # the most probable ones, one after another; the lower index among equals
    taken = tl.zeros([B, W], tl.int32)
    rest = tl.where(real, by, -1.0)
    for i in range(MOST):
        best = tl.max(rest, 1)
        first = tl.min(tl.where(rest == best[:, None], e[None, :], W), 1)
        pick = e[None, :] == first[:, None]
        wanted = pick
        if BY_THRESHOLD:
            wanted = pick & ((by >= threshold) | (i == 0))
        taken = tl.where(wanted, 1, taken)
        rest = tl.where(pick, -1.0, rest)
    if BY_THRESHOLD and not CAPPED:
        # no cap: one round has found the argmax, the threshold finds the others
        taken = tl.where(real & (by >= threshold), 1, taken)

    weight = p
    if COMBINE == SOFTMAX:
        weight = probs
    weight = tl.where(taken != 0, weight, 0.0)
    if COMBINE < RAW:
        weight = weight / tl.maximum(tl.sum(weight, 1), 1.1754943508222875e-38)[:, None]
    tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(active_ptr + at, taken.to(tl.int8), mask=inside)
    tl.store(probs_ptr + at, probs, mask=inside)


@triton.jit
def _backward(
    z_ptr, active_ptr, dweight_ptr, dprobs_ptr, dz_ptr,
    tokens, experts, tau, noise, seed,
    COMBINE: tl.constexpr, NOISY: tl.constexpr, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    t, e, inside, at = token_tile(tokens, experts, B, W)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    real = (e < experts)[None, :] & (t >= 0)[:, None]
    probs = _softmax(z, real)
    on = tl.load(active_ptr + at, mask=inside, other=0) != 0
    dweight = tl.where(on, tl.load(dweight_ptr + at, mask=inside, other=0.0), 0.0)
    dprobs = tl.load(dprobs_ptr + at, mask=inside, other=0.0)
    if COMBINE == SOFTMAX:
        dprobs += dweight
    dz = probs * (dprobs - tl.sum(dprobs * probs, 1)[:, None])
    if COMBINE != SOFTMAX:
        noisy = z
        if NOISY:
            noisy = z + noise * _gumbel(seed, at)
        p = _softmax(noisy / tau, real)
        dp = dweight
        if COMBINE < RAW:
            kept = tl.where(on, p, 0.0)
            total = tl.maximum(tl.sum(kept, 1), 1.1754943508222875e-38)[:, None]
            dp = dweight / total
            if COMBINE == RENORM:
                dp -= tl.where(on, tl.sum(dweight * kept, 1)[:, None] / total / total, 0.0)
        dz += p * (dp - tl.sum(dp * p, 1)[:, None]) / tau
    tl.store(dz_ptr + at, dz, mask=inside)


def _shape(experts: int, block: int | None) -> dict[str, int]:
    width = triton.next_power_of_2(experts)
    return {"B": block or max(1, min(64, 512 // width)), "W": width}


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: Tensor, bias: Tensor | None, rule: Rule, seed: int, block: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        z = z.contiguous()
        tokens, experts = z.shape
        weight, probs = torch.empty_like(z), torch.empty_like(z)
        active = torch.empty(z.shape, dtype=torch.bool, device=z.device)
        shape = _shape(experts, block)
        if tokens:
            _forward[(triton.cdiv(tokens, shape["B"]),)](
                z, z if bias is None else bias.contiguous(), weight, active.view(torch.int8), probs,
                tokens, experts, rule.temperature, rule.noise or 0.0, rule.threshold, seed,
                MOST=rule.exactly or rule.cap or 1, BY_THRESHOLD=not rule.exactly,
                CAPPED=rule.cap > 0, COMBINE=COMBINE.index(rule.combine), BIASED=bias is not None,
                NOISY=bool(rule.noise), **shape,
            )  # fmt: skip
        ctx.save_for_backward(z, active)
        ctx.rule, ctx.seed, ctx.shape = rule, seed, shape
        ctx.mark_non_differentiable(active)
        return weight, active, probs

    @staticmethod
    def backward(ctx: Any, dweight: Tensor, _: Any, dprobs: Tensor) -> tuple[Tensor | None, ...]:
        z, active = ctx.saved_tensors
        dz = torch.empty_like(z)
        rule, shape = ctx.rule, ctx.shape
        if len(z):
            _backward[(triton.cdiv(len(z), shape["B"]),)](
                z, active.view(torch.int8), dweight.contiguous(), dprobs.contiguous(), dz,
                len(z), z.size(1), rule.temperature, rule.noise or 0.0, ctx.seed,
                COMBINE=COMBINE.index(rule.combine), NOISY=bool(rule.noise), **shape,
            )  # fmt: skip
        return dz, None, None, None, None


def fused_gate(
    logits: Tensor, rule: Rule, bias: Tensor | None, seed: int, *, block: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`gate.dense_to_sparse` with the noise of `seed`.

    Args:
        block: tokens of a program; None: by the number of experts. Results do not depend on it.
    """
    return _Gate.apply(logits, bias, rule, seed, block)
