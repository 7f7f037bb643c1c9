"""(token, expert) pairs -> expert-sorted order on GPUs: a counting sort in three Triton launches.

Letters: T tokens, E experts, A active pairs, B tokens of a block, W = E rounded up to a power of
two.

Blocks count their pairs of each expert, one program turns the counts into places, and blocks write
where each pair stands. Tokens stay in order within an expert, whatever the size of a block; nothing
is atomic and nothing waits for the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 2048
"""(token, expert) or (block, expert) numbers of a program: more would not fit its registers."""


class Sorted(NamedTuple):
    """Pairs in expert order.

    Attributes:
        place: of each pair, (T, E) int32; -1 where inactive.
        ends: of the experts' rows, (E,) int32.
        token, expert: of each row, (pairs,) int32.
    """

    place: Tensor
    ends: Tensor
    token: Tensor
    expert: Tensor


@triton.jit
def token_tile(tokens, experts, B: tl.constexpr, W: tl.constexpr):
    """This program's tokens (B,), all experts (W,), which pairs there are (B, W), their places."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    e = tl.arange(0, W)
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    return t, e, inside, t.to(tl.int64)[:, None] * experts + e[None, :]


@triton.jit
def _count(
    active_ptr, count_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    t, e, inside, at = token_tile(tokens, experts, B, W)
    on = tl.load(active_ptr + at, mask=inside, other=0)
    count = tl.sum((on != 0).to(tl.int32), 0)
    tl.store(count_ptr + block * experts + e, count, mask=e < experts)


@triton.jit
def _accumulate(
    count_ptr, ends_ptr, blocks, experts, pairs, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Counts become the numbers of pairs of the same expert before each block."""
    e = tl.arange(0, W)
    total = tl.zeros([W], tl.int32)
    for start in range(0, blocks, R):
        r = start + tl.arange(0, R)
        inside = (r < blocks)[:, None] & (e < experts)[None, :]
        at = r[:, None] * experts + e[None, :]
        count = tl.load(count_ptr + at, mask=inside, other=0)
        before = tl.cumsum(count, 0) - count + total[None, :]
        tl.store(count_ptr + at, before, mask=inside)
        total += tl.sum(count, 0)
    # rows that there is no room for are the caller's mistake; nobody shall write there
    tl.store(ends_ptr + e, tl.minimum(tl.cumsum(total, 0), pairs), mask=e < experts)


@triton.jit
def _place(
    active_ptr, before_ptr, ends_ptr, place_ptr, token_ptr, expert_ptr,
    tokens, experts, pairs, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    t, e, inside, at = token_tile(tokens, experts, B, W)
    on = (tl.load(active_ptr + at, mask=inside, other=0) != 0).to(tl.int32)
    first = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < experts), other=0)
    first += tl.load(before_ptr + block * experts + e, mask=e < experts, other=0)
    place = first[None, :] + tl.cumsum(on, 0) - on
    real = (on != 0) & (place < pairs)
    tl.store(place_ptr + at, tl.where(real, place, -1), mask=inside)
    tl.store(token_ptr + place, t[:, None] + tl.zeros([B, W], tl.int32), mask=real)
    tl.store(expert_ptr + place, e[None, :] + tl.zeros([B, W], tl.int32), mask=real)


def shape(experts: int, *, at_once: int = _AT_ONCE, most: int = 256) -> dict[str, int]:
    """Tokens and width of a program that takes so many numbers, and so many tokens at most."""
    width = triton.next_power_of_2(experts)
    return {"B": max(1, min(most, at_once // width)), "W": width}


def sort_pairs(active: Tensor, pairs: int, *, block: int | None = None) -> Sorted:
    """Experts ascending, tokens ascending within an expert.

    Args:
        active: (T, E) bool.
        pairs: A or more: rows to make room for; those beyond A belong to token and expert 0.
            Pairs beyond it are left out, as if inactive.
        block: tokens of a block, a power of two; None: by the number of experts. The result does
            not depend on it.
    """
    tokens, experts = active.shape
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=active.device)
    token, expert = torch.zeros(2, pairs, dtype=torch.int32, device=active.device)
    found = Sorted(new(tokens, experts), new(experts), token, expert)
    if not tokens:
        found.ends.zero_()
        return found
    sizes = shape(experts)
    at_once, width = sizes["B"], sizes["W"]
    size = block or at_once
    blocks = triton.cdiv(tokens, size)
    on = active.contiguous().view(torch.int8)
    counts = new(blocks, experts)
    _count[(blocks,)](on, counts, tokens, experts, B=size, W=width)
    _accumulate[(1,)](counts, found.ends, blocks, experts, pairs, R=at_once, W=width)
    _place[(blocks,)](
        on, counts, found.ends, found.place, found.token, found.expert, tokens, experts, pairs,
        B=size, W=width,
    )  # fmt: skip
    return found
