"""The dense-to-sparse gate on GPUs, in Triton: one pass over (T, E) forward, one backward.

Letters: T tokens, E experts, B tokens of a program, W = E rounded up to a power of two.

Noise is counter-based. It depends only on the seed and on the index of the (token, expert) pair,
not on the block size, so the backward pass draws it again instead of reading it from memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_evomoe.kernels.gate.rule import COMBINE, Rule
from fairseq_evomoe.kernels.gate.sums_triton import grad_of_probs, softmax, store_sums
from fairseq_evomoe.kernels.triton_tiles import tile_shape, token_tile

RENORM, STRAIGHT, RAW, SOFTMAX = (tl.constexpr(COMBINE.index(n)) for n in COMBINE)


@triton.jit
def _gumbel(seed, at):
    # tl.rand is in [0, 1), so u is in (0, 1] and log(u) is finite; the maximum avoids log(0)
    u = 1.0 - tl.rand(seed, at)
    return -tl.log(tl.maximum(-tl.log(u), 1e-20))


@triton.jit
def _forward(
    z_ptr, bias_ptr, weight_ptr, active_ptr, probs_ptr, part_ptr,
    tokens, experts, tau, noise, threshold, seed,
    MOST: tl.constexpr, BY_THRESHOLD: tl.constexpr, CAPPED: tl.constexpr, COMBINE: tl.constexpr,
    BIASED: tl.constexpr, NOISY: tl.constexpr, SUMS: tl.constexpr, B: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    # Choose and weight the experts of B tokens.
    #
    # Grid: (ceil(T / B),), one program per block of B tokens. Pointers: z, weight and probs (T, E)
    # float32; active (T, E) int8; bias (E,) float32, read if BIASED; part (blocks, 2 E + 2)
    # float32, written if SUMS (see `store_sums`).
    t, e, inside, at = token_tile(tokens, experts, B, W)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    # only columns are masked, so rows beyond the last token stay finite
    real = (e < experts)[None, :]
    probs, logsumexp = softmax(z, real)
    noisy = z
    if NOISY:
        noisy = z + noise * _gumbel(seed, at)
    p, _ = softmax(noisy / tau, real)
    by = p
    if BIASED:
        b = tl.load(bias_ptr + e, mask=e < experts, other=0.0)
        by, _ = softmax((noisy + b[None, :]) / tau, real)

    # take the most probable experts one after another; among equals the lower index wins
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
        # without a cap one round has found the argmax, and the threshold finds the other experts
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
    if SUMS:
        logsumexp = tl.where(t < tokens, logsumexp, 0.0)
        clean = tl.where(inside, probs, 0.0)
        store_sums(part_ptr, e, experts, (taken != 0) & inside, clean, logsumexp)


@triton.jit
def _backward(
    z_ptr, active_ptr, dweight_ptr, dprobs_ptr, dsums_ptr, dz_ptr,
    tokens, experts, tau, noise, seed,
    COMBINE: tl.constexpr, NOISY: tl.constexpr, PROBS: tl.constexpr, SUMS: tl.constexpr,
    B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    # Gradient of the logits of B tokens.
    #
    # Grid: (ceil(T / B),), one program per block of B tokens. Pointers: z, dweight and dz (T, E)
    # float32; active (T, E) int8; dprobs (T, E) float32, read if PROBS; dsums (2 E + 2,) float32,
    # read if SUMS.
    _t, e, inside, at = token_tile(tokens, experts, B, W)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    real = (e < experts)[None, :]
    probs, logsumexp = softmax(z, real)
    on = tl.load(active_ptr + at, mask=inside, other=0) != 0
    dweight = tl.where(on, tl.load(dweight_ptr + at, mask=inside, other=0.0), 0.0)
    dprobs = tl.zeros([B, W], tl.float32)
    if PROBS:
        dprobs += tl.load(dprobs_ptr + at, mask=inside, other=0.0)
    if COMBINE == SOFTMAX:
        dprobs += dweight
    if SUMS:
        dprobs += grad_of_probs(dsums_ptr, e, experts, probs)
    dz = probs * (dprobs - tl.sum(dprobs * probs, 1)[:, None])
    if SUMS:
        dz += (2.0 * tl.load(dsums_ptr + 2 * experts) * logsumexp)[:, None] * probs
    if COMBINE != SOFTMAX:
        noisy = z
        if NOISY:
            noisy = z + noise * _gumbel(seed, at)
        p, _ = softmax(noisy / tau, real)
        dp = dweight
        if COMBINE < RAW:
            kept = tl.where(on, p, 0.0)
            total = tl.maximum(tl.sum(kept, 1), 1.1754943508222875e-38)[:, None]
            dp = dweight / total
            if COMBINE == RENORM:
                dp -= tl.where(on, tl.sum(dweight * kept, 1)[:, None] / total / total, 0.0)
        dz += p * (dp - tl.sum(dp * p, 1)[:, None]) / tau
    tl.store(dz_ptr + at, dz, mask=inside)


def launch_sizes(experts: int, block: int = 0) -> dict[str, int]:
    """Tokens and width of a program for so many experts, with enough warps for its registers."""
    tile = tile_shape(experts, numbers=512, max_tokens=64)
    warps = max(4, min(16, tile["W"] // 256))
    return {"B": block or tile["B"], "W": tile["W"], "num_warps": warps}


@torch.library.custom_op("evomoe::gate", mutates_args=())
def _op(
    z: Tensor,
    bias: Tensor | None,
    seed: Tensor,
    temperature: float,
    noise: float,
    threshold: float,
    cap: int,
    exactly: int,
    combine: str,
    sums: bool,
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = z.contiguous()
    tokens, experts = z.shape
    weight, probs = torch.empty_like(z), torch.empty_like(z)
    active = torch.empty(z.shape, dtype=torch.bool, device=z.device)
    launch = launch_sizes(experts, block)
    blocks = triton.cdiv(tokens, launch["B"])
    part = z.new_empty(blocks, 2 * experts + 2) if sums else z.new_empty(0, 0)
    if tokens:
        _forward[(blocks,)](
            z, z if bias is None else bias.contiguous(), weight, active.view(torch.int8), probs,
            part if sums else z, tokens, experts, temperature, noise, threshold, int(seed),
            MOST=exactly or cap or 1, BY_THRESHOLD=not exactly, CAPPED=cap > 0,
            COMBINE=COMBINE.index(combine), BIASED=bias is not None, NOISY=noise != 0, SUMS=sums,
            **launch,
        )  # fmt: skip
    return weight, active, probs, part.sum(0)


@_op.register_fake
def _(
    z: Tensor, bias: Tensor | None, seed: Tensor, temperature: float, noise: float,
    threshold: float, cap: int, exactly: int, combine: str, sums: bool, block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    like = lambda dtype: z.new_empty(z.shape, dtype=dtype)
    row = z.new_empty(2 * z.size(1) + 2 if sums else 0)
    return like(z.dtype), like(torch.bool), like(z.dtype), row


@torch.library.custom_op("evomoe::gate_backward", mutates_args=())
def _op_backward(
    dweight: Tensor,
    dprobs: Tensor | None,
    dsums: Tensor | None,
    z: Tensor,
    active: Tensor,
    seed: Tensor,
    temperature: float,
    noise: float,
    combine: str,
    block: int,
) -> Tensor:
    z = z.contiguous()
    tokens, experts = z.shape
    dz = torch.empty_like(z)
    launch = launch_sizes(experts, block)
    if tokens:
        _backward[(triton.cdiv(tokens, launch["B"]),)](
            z, active.view(torch.int8), dweight.contiguous(),
            z if dprobs is None else dprobs.contiguous(),
            z if dsums is None else dsums.contiguous(), dz,
            tokens, experts, temperature, noise, int(seed),
            COMBINE=COMBINE.index(combine), NOISY=noise != 0, PROBS=dprobs is not None,
            SUMS=dsums is not None, **launch,
        )  # fmt: skip
    return dz


@_op_backward.register_fake
def _(
    dweight: Tensor, dprobs: Tensor | None, dsums: Tensor | None, z: Tensor, active: Tensor,
    seed: Tensor, temperature: float, noise: float, combine: str, block: int,
) -> Tensor:  # fmt: skip
    return z.new_empty(z.shape)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    z, _, seed, temperature, noise, _, _, _, combine, ctx.sums, block = inputs
    active = output[1]
    ctx.mark_non_differentiable(active)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, active, seed)
    ctx.rule = (temperature, noise, combine, block)


def _gradients(ctx: Any, dweight: Any, _: Any, dprobs: Any, dsums: Any) -> tuple[Any, ...]:
    z, *rest = ctx.saved_tensors
    dweight = torch.zeros_like(z) if dweight is None else dweight
    dsums = dsums if ctx.sums else None
    return _op_backward(dweight, dprobs, dsums, z, *rest, *ctx.rule), *[None] * 10


_op.register_autograd(_gradients, setup_context=_keep)


def fused_gate(
    logits: Tensor,
    rule: Rule,
    bias: Tensor | None,
    seed: Tensor,
    *,
    sums: bool = False,
    block: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gate.dense_to_sparse` with the noise of `seed`, as the op `evomoe::gate`.

    Args:
        seed: int64 scalar on the CPU.
        sums: whether to compute the row of sums as well; otherwise the row is empty.
        block: tokens per program; 0 means that the number of experts decides. Results do not
            depend on it.

    Returns:
        weights (T, E) float32, active (T, E) bool, probs (T, E) float32, and the row of 2 E + 2
        sums that `sums.unpack_sums` splits.
    """
    noise = rule.noise or 0.0
    limits = rule.max_active or 0, rule.exactly or 0
    return _op(
        logits,
        bias,
        seed,
        rule.temperature,
        noise,
        rule.threshold,
        *limits,
        rule.combine,
        sums,
        block,
    )
