"""Sort (token, expert) pairs by expert on GPUs: a counting sort in three Triton launches.

Letters: T tokens, E experts, A active pairs, B tokens of a block, W = E rounded up to a power of
two.

The first launch counts the pairs of each expert per block of tokens. The second turns the counts
into offsets, in one program. The third writes the place of each pair in the sorted order. Tokens
stay in order within an expert, whatever the block size. No launch uses atomics, and none waits for
the host.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_evomoe.kernels.triton_tiles import tile_shape, token_tile


class SortedPairs(NamedTuple):
    """Pairs in expert order, one row per pair.

    Attributes:
        place: row of each pair, (T, E) int32; -1 where the pair is inactive.
        ends: end of each expert's rows, (E,) int32.
        token, expert: token and expert of each row, (pairs,) int32.
    """

    place: Tensor
    ends: Tensor
    token: Tensor
    expert: Tensor


@triton.jit
def _count(
    active_ptr, count_ptr, tokens, experts, B: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    # Count the pairs of each expert in a block of tokens.
    #
    # Grid: (blocks,), one program per block of B tokens. Pointers: active (T, E) int8; count
    # (blocks, E) int32.
    block = tl.program_id(0)
    _t, e, inside, at = token_tile(tokens, experts, B, W)
    on = tl.load(active_ptr + at, mask=inside, other=0)
    count = tl.sum((on != 0).to(tl.int32), 0)
    tl.store(count_ptr + block * experts + e, count, mask=e < experts)


@triton.jit
def _accumulate(
    count_ptr, ends_ptr, blocks, experts, pairs, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """Replace each count by the number of pairs of the same expert in all earlier blocks.

    Grid: (1,). Pointers: count (blocks, E) int32, updated in place; ends (E,) int32. R is the
    number of blocks that are read at a time.
    """
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
    # clamp, so that nothing is written out of bounds if the caller's `pairs` is too small
    tl.store(ends_ptr + e, tl.minimum(tl.cumsum(total, 0), pairs), mask=e < experts)


@triton.jit
def _place(
    active_ptr, before_ptr, ends_ptr, place_ptr, token_ptr, expert_ptr,
    tokens, experts, pairs, B: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    # Write the place of each pair, and the token and expert of each row.
    #
    # Grid: (blocks,), one program per block of B tokens. Pointers: active (T, E) int8; before
    # (blocks, E), ends (E,), place (T, E), token and expert (pairs,), all int32.
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


def sort_pairs(active: Tensor, pairs: int, *, block: int | None = None) -> SortedPairs:
    """Sort the active pairs by expert, and by token within an expert.

    Args:
        active: (T, E) bool.
        pairs: number of rows to allocate, at least A. Rows beyond A belong to token 0 and expert
            0. If it is less than A, the pairs that do not fit are left out as if inactive.
        block: tokens per block, a power of two; None means that the number of experts decides. The
            result does not depend on it.
    """
    tokens, experts = active.shape
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=active.device)
    token, expert = torch.zeros(2, pairs, dtype=torch.int32, device=active.device)
    result = SortedPairs(new(tokens, experts), new(experts), token, expert)
    if not tokens:
        result.ends.zero_()
        return result
    sizes = tile_shape(experts)
    width, rows = sizes["W"], sizes["B"]
    size = block or rows
    blocks = triton.cdiv(tokens, size)
    on = active.contiguous().view(torch.int8)
    counts = new(blocks, experts)
    _count[(blocks,)](on, counts, tokens, experts, B=size, W=width)
    _accumulate[(1,)](counts, result.ends, blocks, experts, pairs, R=rows, W=width)
    _place[(blocks,)](
        on, counts, result.ends, result.place, result.token, result.expert, tokens, experts, pairs,
        B=size, W=width,
    )  # fmt: skip
    return result
