"""`routing_sums` on GPUs, in Triton.

Forward is one launch and a sum over blocks; backward is one launch.

Letters: T tokens, E experts, B tokens of a block, W = E rounded up to a power of two.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_evomoe.kernels.triton_tiles import tile_shape, token_tile


@triton.jit
def softmax(z, real):
    """Softmax of each row of z (B, W) over the real columns (1, W), and its logsumexp (B,)."""
    z = tl.where(real, z, float("-inf"))
    most = tl.max(z, 1)
    e = tl.where(real, tl.exp(z - most[:, None]), 0.0)
    total = tl.sum(e, 1)
    return e / total[:, None], most + tl.log(total)


@triton.jit
def store_sums(part_ptr, e, experts, chosen, p, logsumexp):
    """Store this program's row of sums: load, probabilities, squared logsumexp and entropy.

    part_ptr: (blocks, 2 E + 2) float32. chosen, p: (B, W). logsumexp: (B,). All three must be 0
    where the block has no token or no expert.
    """
    part_ptr += tl.program_id(0) * (2 * experts + 2)
    tl.store(part_ptr + e, tl.sum(chosen.to(tl.float32), 0), mask=e < experts)
    tl.store(part_ptr + experts + e, tl.sum(p, 0), mask=e < experts)
    tl.store(part_ptr + 2 * experts, tl.sum(logsumexp * logsumexp, 0))
    entropy = tl.where(p > 0, -p * tl.log(tl.where(p > 0, p, 1.0)), 0.0)
    tl.store(part_ptr + 2 * experts + 1, tl.sum(tl.sum(entropy, 1), 0))


@triton.jit
def grad_of_probs(grad_ptr, e, experts, p):
    """Gradient of the probabilities p (B, W) from that of the sums, grad_ptr (2 E + 2,)."""
    of_entropy = tl.load(grad_ptr + 2 * experts + 1)
    dp = tl.load(grad_ptr + experts + e, mask=e < experts, other=0.0)[None, :]
    # the slope of the entropy at 0 is infinite; a probability of 0 gets no gradient from it
    return dp - tl.where(p > 0, of_entropy * (tl.log(tl.where(p > 0, p, 1.0)) + 1.0), 0.0)


@triton.jit
def _forward(
    z_ptr, p_ptr, chosen_ptr, part_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    # Sums over B tokens.
    #
    # Grid: (ceil(T / B),), one program per block of B tokens. Pointers: z and p (T, E) float32;
    # chosen (T, E) int8; part (blocks, 2 E + 2) float32.
    t, e, inside, at = token_tile(tokens, experts, B, W)
    # rows beyond the last token stay finite and add nothing to the sums
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    _, logsumexp = softmax(z, (e < experts)[None, :])
    logsumexp = tl.where(t < tokens, logsumexp, 0.0)
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    chosen = tl.load(chosen_ptr + at, mask=inside, other=0) != 0
    store_sums(part_ptr, e, experts, chosen, p, logsumexp)


@triton.jit
def _backward(
    z_ptr, p_ptr, grad_ptr, dz_ptr, dp_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    # Gradients of the logits and probabilities of B tokens.
    #
    # Grid: (ceil(T / B),), one program per block of B tokens. Pointers, all float32: z, p, dz and
    # dp (T, E); grad (2 E + 2,).
    _t, e, inside, at = token_tile(tokens, experts, B, W)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    p_of_z, logsumexp = softmax(z, (e < experts)[None, :])
    slope = 2.0 * tl.load(grad_ptr + 2 * experts) * logsumexp
    tl.store(dz_ptr + at, slope[:, None] * p_of_z, mask=inside)
    p = tl.load(p_ptr + at, mask=inside, other=1.0)
    tl.store(dp_ptr + at, grad_of_probs(grad_ptr, e, experts, p), mask=inside)


@torch.library.custom_op("evomoe::routing_sums", mutates_args=())
def fused_sums(logits: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
    """`sums.routing_sums` as one row, (2 E + 2,), which `sums.unpack_sums` splits."""
    tokens, experts = logits.shape
    if not tokens:
        return logits.new_zeros(2 * experts + 2)
    sizes = tile_shape(experts)
    blocks = triton.cdiv(tokens, sizes["B"])
    part = logits.new_empty(blocks, 2 * experts + 2)
    on = chosen.contiguous().view(torch.int8)
    _forward[(blocks,)](logits.contiguous(), probs.contiguous(), on, part, tokens, experts, **sizes)
    return part.sum(0)


@fused_sums.register_fake
def _(logits: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
    return logits.new_empty(2 * logits.size(1) + 2)


@torch.library.custom_op("evomoe::routing_sums_backward", mutates_args=())
def _fused_sums_backward(grad: Tensor, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    dz = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    dp = torch.empty(probs.shape, dtype=probs.dtype, device=probs.device)
    if len(logits):
        sizes = tile_shape(logits.size(1))
        _backward[(triton.cdiv(len(logits), sizes["B"]),)](
            logits.contiguous(), probs.contiguous(), grad.contiguous(), dz, dp, *logits.shape,
            **sizes,
        )  # fmt: skip
    return dz, dp


@_fused_sums_backward.register_fake
def _(grad: Tensor, logits: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), probs.new_empty(probs.shape)


def _keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_fused_sums_backward(grad, *ctx.saved_tensors), None


fused_sums.register_autograd(_gradients, setup_context=_keep)
