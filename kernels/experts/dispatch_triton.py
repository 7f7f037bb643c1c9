"""Dispatch and combine on GPUs, in Triton: gather, biases and weighted sum, with gradients.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.

Dispatch reads each token's row once and writes it to each of its places in expert order. Combine
sums the rows of a token in the one program that owns the token. So there are no atomics, nothing
waits for the host, and any number of experts per token is allowed. Sums are float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _spread(
    x_ptr, weight_ptr, place_ptr, out_ptr, rows_ptr, dot_ptr,
    width, experts,
    W: tl.constexpr, WEIGHTED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """rows[place] = weight * x for each pair of a token; with DOT also dot = <out[place], x>.

    Grid: (T,), one program per token. Pointers: x (T, D); weight (T, E), read if WEIGHTED; place
    (T, E) int32, -1 where inactive; out (A, D), read if DOT; rows (A, D) in the dtype of x; dot
    (T, E) float32, written if DOT. Here `width` is D, and W is D rounded up to a power of two.
    """
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, W)
    inside = d < width
    x = tl.load(x_ptr + t * width + d, mask=inside, other=0).to(tl.float32)
    for e in range(experts):
        at = tl.load(place_ptr + t * experts + e).to(tl.int64)
        # an inactive pair masks out all columns
        there = d < tl.where(at >= 0, width, 0)
        row = at * width + d
        value = x
        if WEIGHTED:
            value = x * tl.load(weight_ptr + t * experts + e).to(tl.float32)
        tl.store(rows_ptr + row, value.to(rows_ptr.dtype.element_ty), mask=there)
        if DOT:
            out = tl.load(out_ptr + row, mask=there, other=0).to(tl.float32)
            tl.store(dot_ptr + t * experts + e, tl.sum(out * x, 0))


@triton.jit
def _collect(
    rows_ptr, weight_ptr, place_ptr, y_ptr,
    width, experts,
    W: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """y = sum over the pairs of a token of weight * rows[place].

    Grid: (T,), one program per token. Pointers: rows (A, D); weight (T, E), read if WEIGHTED; place
    (T, E) int32, -1 where inactive; y (T, D) in the dtype of rows.
    """
    t = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, W)
    inside = d < width
    y = tl.zeros([W], tl.float32)
    for e in range(experts):
        at = tl.load(place_ptr + t * experts + e).to(tl.int64)
        there = d < tl.where(at >= 0, width, 0)
        row = at * width + d
        value = tl.load(rows_ptr + row, mask=there, other=0).to(tl.float32)
        if WEIGHTED:
            value = value * tl.load(weight_ptr + t * experts + e).to(tl.float32)
        y += value
    tl.store(y_ptr + t * width + d, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rows(h_ptr, bias_ptr, expert_ptr, out_ptr, width, W: tl.constexpr):
    # out = h + bias of each row's expert.
    #
    # Grid: (A, ceil(F / W)), one program per row and tile of W columns. Pointers: h and out (A, F);
    # bias (E, F); expert (A,) int32.
    r = tl.program_id(0).to(tl.int64)
    e = tl.load(expert_ptr + r).to(tl.int64)
    f = tl.program_id(1) * W + tl.arange(0, W)
    inside = f < width
    h = tl.load(h_ptr + r * width + f, mask=inside, other=0).to(tl.float32)
    h += tl.load(bias_ptr + e * width + f, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + r * width + f, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_rows(
    dh_ptr, starts_ptr, ends_ptr, db_ptr, width, R: tl.constexpr, W: tl.constexpr
):  # fmt: skip
    """db = sum of each expert's rows of dh, in order.

    Grid: (E, ceil(F / W)), one program per expert and tile of W columns, which reads R rows at a
    time. Pointers: dh (A, F); starts and ends (E,) int32; db (E, F).
    """
    e = tl.program_id(0)
    f = tl.program_id(1) * W + tl.arange(0, W)
    inside = f < width
    first = tl.load(starts_ptr + e)
    last = tl.load(ends_ptr + e)
    total = tl.zeros([W], tl.float32)
    for start in range(first, last, R):
        r = start + tl.arange(0, R)
        at = r.to(tl.int64)[:, None] * width + f[None, :]
        m = (r < last)[:, None] & inside[None, :]
        total += tl.sum(tl.load(dh_ptr + at, mask=m, other=0).to(tl.float32), 0)
    at = e.to(tl.int64) * width + f
    tl.store(db_ptr + at, total.to(db_ptr.dtype.element_ty), mask=inside)


def _spread_rows(
    x: Tensor, place: Tensor, pairs: int, *, weight: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return rows (A, D) and <out, x> of each pair, (T, E) float32; see `_spread`."""
    tokens, width = x.shape
    experts = place.size(1)
    rows = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    dots = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if not (tokens and pairs):
        return rows, dots.zero_()
    _spread[(tokens,)](
        x, x if weight is None else weight, place, rows if out is None else out, rows, dots,
        width, experts, W=triton.next_power_of_2(width), WEIGHTED=weight is not None,
        DOT=out is not None,
    )  # fmt: skip
    return rows, dots


def collect_rows(rows: Tensor, place: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum each token's rows (A, D), times their weights (T, E) if given; returns (T, D).

    It has no gradient.
    """
    tokens, experts = place.shape
    y = torch.empty(tokens, rows.size(1), dtype=rows.dtype, device=rows.device)
    if tokens:
        _collect[(tokens,)](
            rows, rows if weight is None else weight, place, y, rows.size(1), experts,
            W=triton.next_power_of_2(rows.size(1)), WEIGHTED=weight is not None,
        )  # fmt: skip
    return y


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor, pairs: int) -> Tensor:
        ctx.save_for_backward(place)
        return _spread_rows(x.contiguous(), place, pairs)[0]

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return collect_rows(drows.contiguous(), place), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, weight: Tensor, place: Tensor) -> Tensor:
        out, weight = out.contiguous(), weight.contiguous()
        ctx.save_for_backward(out, weight, place)
        return collect_rows(out, place, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        out, weight, place = ctx.saved_tensors
        dout, dots = _spread_rows(dy.contiguous(), place, len(out), weight=weight, out=out)
        return dout, dots.to(weight.dtype), None


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.like = bias
        y = torch.empty_like(h)
        width = h.size(1)
        tile = min(1024, triton.next_power_of_2(width))
        if len(h):
            _add_rows[(len(h), triton.cdiv(width, tile))](
                h.contiguous(), bias.contiguous(), expert, y, width, W=tile
            )
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (ends,) = ctx.saved_tensors
        dy = dy.contiguous()
        experts, width = ctx.like.shape
        db = torch.empty_like(ctx.like)
        tile = min(128, triton.next_power_of_2(width))
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        _sum_rows[(experts, triton.cdiv(width, tile))](dy, starts, ends, db, width, R=64, W=tile)
        return dy, db, None, None


def dispatch(x: Tensor, place: Tensor, pairs: int) -> Tensor:
    """Rows in expert order: x (T, D), place (T, E) -> (pairs, D).

    Args:
        pairs: number of rows to allocate, at least A; those beyond A are not written.
    """
    return _Dispatch.apply(x, place, pairs)


def add_bias(h: Tensor, bias: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
    """h (A, F) plus the bias (E, F) of each row's expert.

    `expert` (A,) is the expert of each row, and `ends` (E,) the end of each expert's rows.
    """
    return _AddBias.apply(h, bias, expert, ends)


def combine(out: Tensor, weight: Tensor, place: Tensor) -> Tensor:
    """y_t = sum over the pairs of t of weight * out: (A, D), (T, E), (T, E) -> (T, D)."""
    return _Combine.apply(out, weight, place)
