"""`routing_sums` on GPUs, in Triton: a launch and a sum over blocks forward, a launch backward.

Letters: T tokens, E experts, B tokens of a block, W = E rounded up to a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_evomoe.kernels.routing_sums import RoutingSums
from fairseq_evomoe.kernels.routing_triton import shape, token_tile


@triton.jit
def _log_sum_exp(z, inside):
    z = tl.where(inside, z, float("-inf"))
    most = tl.max(z, 1)
    return most + tl.log(tl.sum(tl.where(inside, tl.exp(z - most[:, None]), 0.0), 1))


@triton.jit
def _forward(
    z_ptr, p_ptr, wanted_ptr, part_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """A row of 2 E + 2 numbers a block: load, probabilities, squares of logsumexp, entropy."""
    block = tl.program_id(0)
    t, e, inside, at = token_tile(tokens, experts, B, W)
    # rows beyond the last token stay finite, and count for nothing
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    level = _log_sum_exp(z, (e < experts)[None, :] & (t >= 0)[:, None])
    level = tl.where(t < tokens, level, 0.0)
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    entropy = tl.where(p > 0, -p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
    wanted = (tl.load(wanted_ptr + at, mask=inside, other=0) != 0).to(tl.float32)
    part_ptr += block * (2 * experts + 2)
    tl.store(part_ptr + e, tl.sum(wanted, 0), mask=e < experts)
    tl.store(part_ptr + experts + e, tl.sum(p, 0), mask=e < experts)
    tl.store(part_ptr + 2 * experts, tl.sum(level * level, 0))
    tl.store(part_ptr + 2 * experts + 1, tl.sum(tl.sum(entropy, 1), 0))


@triton.jit
def _backward(
    z_ptr, p_ptr, grad_ptr, dz_ptr, dp_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    t, e, inside, at = token_tile(tokens, experts, B, W)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    level = _log_sum_exp(z, (e < experts)[None, :] & (t >= 0)[:, None])
    slope = 2.0 * tl.load(grad_ptr + 2 * experts) * level
    tl.store(dz_ptr + at, slope[:, None] * tl.exp(z - level[:, None]), mask=inside)
    p = tl.load(p_ptr + at, mask=inside, other=1.0)
    of_entropy = tl.load(grad_ptr + 2 * experts + 1)
    dp = tl.load(grad_ptr + experts + e, mask=e < experts, other=0.0)[None, :]
    # the slope at 0 is infinite; where no token can go, nothing pulls
    dp -= tl.where(p > 0, of_entropy * (tl.log(tl.where(p > 0, p, 1.0)) + 1.0), 0.0)
    tl.store(dp_ptr + at, dp, mask=inside)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, p: Tensor, wanted: Tensor) -> Tensor:
        z, p = z.contiguous(), p.contiguous()
        tokens, experts = z.shape
        ctx.save_for_backward(z, p)
        if not tokens:
            return z.new_zeros(2 * experts + 2)
        sizes = shape(experts)
        blocks = triton.cdiv(tokens, sizes["B"])
        part = torch.empty(blocks, 2 * experts + 2, dtype=torch.float32, device=z.device)
        on = wanted.contiguous().view(torch.int8)
        _forward[(blocks,)](z, p, on, part, tokens, experts, **sizes)
        return part.sum(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        z, p = ctx.saved_tensors
        dz, dp = torch.empty_like(z), torch.empty_like(p)
        if len(z):
            sizes = shape(z.size(1))
            _backward[(triton.cdiv(len(z), sizes["B"]),)](
                z, p, grad.contiguous(), dz, dp, *z.shape, **sizes
            )
        return dz, dp, None


def fused_sums(logits: Tensor, probs: Tensor, wanted: Tensor) -> RoutingSums:
    """See `routing_sums.routing_sums`."""
    experts = logits.size(1)
    sums = _Sums.apply(logits, probs, wanted)
    load, p, z, entropy = sums.split([experts, experts, 1, 1])
    return RoutingSums(load.detach(), p, z.squeeze(0), entropy.squeeze(0))
