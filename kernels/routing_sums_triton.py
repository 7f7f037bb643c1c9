"""`routing_sums` on GPUs, in Triton: a launch and a sum over blocks forward, a launch backward.

Letters: T tokens, E experts, B tokens of a block, W = E rounded up to a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_evomoe.kernels.routing_triton import shape, token_tile


@triton.jit
def softmax(z, real):
    """Softmax of each row of z (B, W) over the real columns (1, W), and its logsumexp (B,)."""
    z = tl.where(real, z, float("-inf"))
    most = tl.max(z, 1)
    e = tl.where(real, tl.exp(z - most[:, None]), 0.0)
    total = tl.sum(e, 1)
    return e / total[:, None], most + tl.log(total)


@triton.jit
def store_sums(part_ptr, e, experts, wanted, p, level):
    """This program's row of 2 E + 2 numbers: load, probabilities, squares of logsumexp, entropy.

    wanted, p: (B, W), level: (B,); all are 0 where there is no token or expert.
    """
    part_ptr += tl.program_id(0) * (2 * experts + 2)
    tl.store(part_ptr + e, tl.sum(wanted.to(tl.float32), 0), mask=e < experts)
    tl.store(part_ptr + experts + e, tl.sum(p, 0), mask=e < experts)
    tl.store(part_ptr + 2 * experts, tl.sum(level * level, 0))
    entropy = tl.where(p > 0, -p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
    tl.store(part_ptr + 2 * experts + 1, tl.sum(tl.sum(entropy, 1), 0))


@triton.jit
def pull_on_probs(grad_ptr, e, experts, p):
    """What the sums' gradients (2 E + 2,) do to the probabilities, (B, W)."""
    of_entropy = tl.load(grad_ptr + 2 * experts + 1)
    dp = tl.load(grad_ptr + experts + e, mask=e < experts, other=0.0)[None, :]
    # the slope at 0 is infinite; where no token can go, nothing pulls
    return dp - tl.where(p > 0, of_entropy * (tl.log(tl.where(p > 0, p, 1.0)) + 1.0), 0.0)


@triton.jit
def _forward(
    z_ptr, p_ptr, wanted_ptr, part_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    t, e, inside, at = token_tile(tokens, experts, B, W)
    # rows beyond the last token stay finite, and count for nothing
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    _, level = softmax(z, (e < experts)[None, :])
    level = tl.where(t < tokens, level, 0.0)
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    wanted = tl.load(wanted_ptr + at, mask=inside, other=0) != 0
    store_sums(part_ptr, e, experts, wanted, p, level)


@triton.jit
def _backward(
    z_ptr, p_ptr, grad_ptr, dz_ptr, dp_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    t, e, inside, at = token_tile(tokens, experts, B, W)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    share, level = softmax(z, (e < experts)[None, :])
    slope = 2.0 * tl.load(grad_ptr + 2 * experts) * level
    tl.store(dz_ptr + at, slope[:, None] * share, mask=inside)
    p = tl.load(p_ptr + at, mask=inside, other=1.0)
    tl.store(dp_ptr + at, pull_on_probs(grad_ptr, e, experts, p), mask=inside)


@torch.library.custom_op("evomoe::routing_sums", mutates_args=())
def fused_sums(logits: Tensor, probs: Tensor, wanted: Tensor) -> Tensor:
    """See `routing_sums.routing_sums`; the row that `routing_sums.unpacked` takes apart."""
    tokens, experts = logits.shape
    if not tokens:
        return logits.new_zeros(2 * experts + 2)
    sizes = shape(experts)
    blocks = triton.cdiv(tokens, sizes["B"])
    part = logits.new_empty(blocks, 2 * experts + 2)
    on = wanted.contiguous().view(torch.int8)
    _forward[(blocks,)](logits.contiguous(), probs.contiguous(), on, part, tokens, experts, **sizes)
    return part.sum(0)


@fused_sums.register_fake
def _(logits, probs, wanted):
    return logits.new_empty(2 * logits.size(1) + 2)


@torch.library.custom_op("evomoe::routing_sums_backward", mutates_args=())
def _fused_sums_backward(grad: Tensor, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    dz = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dp = torch.empty(probs.shape, dtype=probs.dtype, device=probs.device)
    if len(logits):
        sizes = shape(logits.size(1))
        _backward[(triton.cdiv(len(logits), sizes["B"]),)](
            logits.contiguous(), probs.contiguous(), grad.contiguous(), dz, dp, *logits.shape,
            **sizes,
        )  # fmt: skip
    return dz, dp


@_fused_sums_backward.register_fake
def _(grad, logits, probs):
    return logits.new_empty(logits.shape), probs.new_empty(probs.shape)


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_fused_sums_backward(grad, *ctx.saved_tensors), None


fused_sums.register_autograd(_gradients, setup_context=_keep)
