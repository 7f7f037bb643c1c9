"""Attention on CPUs, where training with torch's own is slow.

torch's flash attention for CPUs passes its many small products to routines that take longer to
start than to multiply, most of all in the backward pass of bfloat16. The kernel of `cpu` serves
instead. It computes in float32; inputs in bfloat16 are widened, unless the processor has tiles
(AMX), which multiply bfloat16 many times as fast. There, and where oneDNN makes the products, two
batched products and a softmax are faster (benchmarks/speed/training.py), for the price of the
probabilities' memory; so they are for short sequences in float32, where no kernel can be built.

Letters: B sequences, N heads, L queries, S keys, C width of a head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels.transformer import cpu
from fairseq_evomoe.kernels.transformer.matmul import by_onednn

TINY = 16 * 16
"""Largest number of scores per head, L S, for which two products beat the kernel in float32."""
SHORT = 64 * 64
"""The same for products and flash attention.

If oneDNN makes the products, flash attention is slow at every length, without gradients too.
"""

torch_attention = F.scaled_dot_product_attention


_RECOMPUTED: ContextVar[bool] = ContextVar("recomputed", default=False)
"""Whether this pass belongs to training though it takes no gradients."""


@contextmanager
def recomputed() -> Iterator[None]:
    """Within, a pass without gradients uses what its repetition with gradients will use."""
    token = _RECOMPUTED.set(True)
    try:
        yield
    finally:
        _RECOMPUTED.reset(token)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """softmax(query key^T / sqrt(C) + attn_mask) value, as torch's function of the same arguments.

    Args:
        query: (B, N, L, C); key, value: (B, N, S, C).
        attn_mask: broadcast to (B, N, L, S), added to the scores; a bool mask is False where a
            position is left out.
        dropout_p, is_causal, options: as in torch.

    Returns:
        (B, N, L, C), in the dtype of autocast if that is on.
    """
    product = query.dtype
    if torch.is_autocast_enabled(query.device.type):
        product = torch.get_autocast_dtype(query.device.type)
    trains = (torch.is_grad_enabled() and query.requires_grad) or _RECOMPUTED.get()
    scores = query.size(-2) * key.size(-2)
    plain = (
        query.device.type == "cpu"
        and query.dim() == 4
        and not (is_causal or dropout_p or options)
        and not (attn_mask is not None and attn_mask.requires_grad)
        and key.shape == value.shape
        and key.shape[:2] == query.shape[:2]
    )
    fast = (
        plain
        and (trains or by_onednn())
        and (product == torch.bfloat16 or by_onednn() or scores <= SHORT)
        and product in (torch.bfloat16, torch.float32, torch.float64)
    )
    if plain and trains and scores > TINY and cpu.serves_attention(query, product):
        own = (x.float() for x in (query, key, value))
        return cpu.Attention.apply(*own, attn_mask).to(product)
    if not fast:
        return torch_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(*(x.to(product) for x in (query, key, value)), attn_mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        *batch, _, width = query.shape
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query * width**-0.5, key, value))
        scores = torch.bmm(q, k.transpose(1, 2))
        if mask is not None:
            shaped = scores.view(*batch, *scores.shape[1:])
            if mask.dtype == torch.bool:
                shaped.masked_fill_(~mask, float("-inf"))
            else:
                shaped += mask
        # torch computes it in float32 inside
        probs = scores.softmax(-1)
        ctx.save_for_backward(q, k, v, probs)
        return torch.bmm(probs, v).view(query.shape)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, probs = ctx.saved_tensors
        batch, width = d_output.shape[:2], d_output.shape[-1]
        d_output = d_output.reshape(q.shape)
        d_value = torch.bmm(probs.transpose(1, 2), d_output)
        d_probs = torch.bmm(d_output, v.transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_probs, probs, -1, probs.dtype)
        d_query = torch.bmm(d_scores, k).mul_(width**-0.5)
        d_key = torch.bmm(d_scores.transpose(1, 2), q)
        return (*(d.view(*batch, *d.shape[1:]) for d in (d_query, d_key, d_value)), None)
