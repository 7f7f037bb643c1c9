"""The C++ kernels of csrc/transformer_cpu.cpp for CPUs: attention, the loss's softmax, dropout.

Letters: B sequences, N heads, L queries, S keys, C width of a head, T tokens, W words.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.kernels import native
from fairseq_evomoe.kernels.backend import constant_when_compiled, forced_backend

SOURCES = Path(__file__).parent / "csrc"

LANES = 4
"""Floats in the smallest register; the width of a head is a multiple of it."""


@constant_when_compiled
def unavailable() -> str:
    """Reason why the ops are unavailable, or "" if they are loaded."""
    return native.load(SOURCES, "transformer_cpu")


@functools.cache
def isa() -> int:
    """Index into `native.ISAS` of the instruction set to use, once the ops are loaded."""
    return native.chosen_isa(torch.ops.evomoe.transformer_isa())


def _loaded(x: Tensor) -> bool:
    """Whether the ops may be called on a tensor of this device here and now."""
    return (
        x.is_cpu
        and forced_backend() in ("", "native")
        and not torch.compiler.is_compiling()
        and not unavailable()
    )


@functools.cache
def has_tiles() -> bool:
    """Whether the processor multiplies bfloat16 in tiles (AMX)."""
    return torch.cpu._is_amx_tile_supported()


def serves(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the ops can take tensors like this one, in products of this dtype."""
    return x.dtype == dtype == torch.float32 and _loaded(x)


def serves_attention(query: Tensor, dtype: torch.dtype) -> bool:
    """Whether attention can, whose heads must fill registers; bfloat16 is widened to float32."""
    widened = dtype == torch.bfloat16 and not has_tiles()
    return (
        query.size(-1) % LANES == 0
        and query.dtype in (torch.float32, dtype)
        and (widened or dtype == torch.float32)
        and _loaded(query)
    )


def serves_dropout(x: Tensor) -> bool:
    """Whether dropout can."""
    return x.dtype in (torch.float32, torch.bfloat16) and _loaded(x)


def whole_rows(x: Tensor) -> Tensor:
    """The tensor, with its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def full_mask(mask: Tensor | None, scores: tuple[int, ...]) -> Tensor | None:
    """A mask as float32 (B, N, L, S), its axes broadcast without a copy where that is possible."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return whole_rows(mask.float().expand(scores))


class Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(C) + mask) v for q (B, N, L, C), k and v (B, N, S, C), all float32.

    Keys behind the last one that the mask leaves open to a block of queries are skipped, which
    halves the work under a causal mask. The backward pass computes the probabilities again.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (whole_rows(x) for x in (query, key, value))
        mask = full_mask(mask, (*q.shape[:3], k.size(2)))
        y, norm = torch.ops.evomoe.attention.default(q, k, v, mask, isa())
        y = y.permute(1, 2, 0, 3)
        ctx.save_for_backward(q, k, v, mask, y, norm)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        op = torch.ops.evomoe.attention_backward.default
        gradients = op(*ctx.saved_tensors, whole_rows(dy), isa())
        return (*(d.permute(1, 2, 0, 3) for d in gradients), None)


def softmax_loss(
    logits: Tensor, target: Tensor, *, sure: float, rest: float, gradient: bool
) -> Tensor:
    """Replace logits (T, W) by the gradient p - rest - sure onehot(target), where p is the softmax.

    Args:
        logits: float32, contiguous; what they hold without `gradient` is undefined.
        target: (T,) int64.
        sure, rest: weights of the target's and of every word's -log p.
        gradient: whether it is wanted.

    Returns:
        (2,) float64, the sums over tokens of -log p[target] and of -sum_w log p[w]; the second is 0
        without `rest`.

    Raises:
        IndexError: a target is beyond the vocabulary.
    """
    if len(target) and not 0 <= int(target.min()) <= int(target.max()) < logits.size(1):
        raise IndexError(f"a target is out of range for {logits.size(1)} words")
    rows = torch.empty(len(logits), 2, dtype=torch.float64)
    op = torch.ops.evomoe.softmax_loss.default
    op(logits, target.contiguous(), sure, rest, gradient, rows, isa())
    return rows.sum(0)


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Drop elements of a tensor, those that the seed says.

    Args:
        x: float32 or bfloat16, of any shape.
        p: share of the elements that become 0, between 0 and 1; the others are divided by 1 - p.
        seed: below 2^63.

    Returns:
        A contiguous tensor like x. Which elements are 0 depends on p, the seed and their position.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    torch.ops.evomoe.dropout.default(x, y, p, seed, isa())
    return y
