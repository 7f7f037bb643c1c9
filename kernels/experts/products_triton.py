"""Expert feed-forward networks on GPUs as grouped matrix products, in Triton.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.

A product gathers the tokens that it reads, and its epilogue applies the bias and the activation, or
the activation's gradient, to the tile that it has computed. The gradient of the combine weights is
computed from the hidden values, so that the output rows need not be saved. A tile of rows belongs
to one expert. Each program finds that expert from the ends of the experts' rows, so that the grid
needs no count from the device. Sums are float32, there are no atomics, and results do not change
from run to run.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels.experts.dispatch_triton import collect_rows
from fairseq_evomoe.kernels.experts.pairs_triton import SortedPairs
from fairseq_evomoe.kernels.experts.values import ExpertWeights

RELU, GELU = tl.constexpr(0), tl.constexpr(1)
UP, DOWN, BACK, PLAIN = (tl.constexpr(i) for i in range(4))
"""Epilogues of a product.

UP adds the bias and applies the activation, DOWN adds the bias, BACK multiplies by the combine
weight and by the gradient of the activation, and PLAIN does nothing.
"""

_SAME: dict[Any, int] = {F.relu: 0, torch.relu: 0, F.gelu: 1}
_BY_NAME = {"fairseq.modules.gelu.gelu": 1}


def activation_id(activation: Callable[[Tensor], Tensor]) -> int | None:
    """Number of an activation in the kernels: ReLU 0, GELU (by the error function) 1, else None."""
    name = f"{getattr(activation, '__module__', '')}.{getattr(activation, '__qualname__', '')}"
    return _SAME[activation] if activation in _SAME else _BY_NAME.get(name)


@triton.jit
def _tile_expert(ends_ptr, experts, tile, M: tl.constexpr, W: tl.constexpr):
    """Return a tile's expert, its first row and the end of that expert's rows.

    The tile is empty if the expert returned is >= `experts`. ends_ptr: (E,) int32.
    """
    e = tl.arange(0, W)
    inside = e < experts
    end = tl.load(ends_ptr + e, mask=inside, other=0)
    begin = tl.load(ends_ptr + e - 1, mask=inside & (e > 0), other=0)
    tiles = tl.where(inside, (end - begin + M - 1) // M, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    here = e == expert
    first = tl.sum(tl.where(here, begin + (tile - last + tiles) * M, 0), 0)
    return expert, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _rows(
    a_ptr, b_ptr, bias_ptr, out_ptr, h_ptr, pre_ptr, dot_products_ptr,
    weight_ptr, token_ptr, ends_ptr, experts, pairs, depth, width, b_width, b_depth,
    GATHER: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """out[r, n] = epilogue(sum_k a[row of r, k] b[expert of r, n, k]); MODE selects the epilogue.

    Grid: (tiles of M rows * tiles of N columns,), columns fastest. The strides of b along n and k
    are `b_width` and `b_depth`, and its experts lie width * depth apart. Pointers:

        a: (T, depth) with GATHER, where the row of r is its token, otherwise (pairs, depth).
        b: one matrix of width * depth numbers per expert. bias: (E, width), read by UP and DOWN.
        out, h, pre: (pairs, width). BACK reads h. With GELU, UP writes pre and BACK reads it.
        dot_products: (tiles of N columns, pairs) float32, written by BACK.
        weight: (T, E) float, read by BACK. token: (pairs,) int32. ends: (E,) int32.

    All other pointers have the dtype of x. A pointer that MODE does not use is a placeholder.
    """
    across = tl.cdiv(width, N)
    column = tl.program_id(0) % across
    e, first, stop = _tile_expert(ends_ptr, experts, tl.program_id(0) // across, M, W)
    if e < experts:
        r = first + tl.arange(0, M)
        real = r < stop
        n = column * N + tl.arange(0, N)
        inside = n < width
        token = tl.load(token_ptr + r, mask=real, other=0).to(tl.int64)
        row = r.to(tl.int64)
        source = row
        if GATHER:
            source = token
        b_ptr += e.to(tl.int64) * width * depth
        total = tl.zeros([M, N], tl.float32)
        for start in range(0, depth, K):
            k = start + tl.arange(0, K)
            there = k < depth
            a = tl.load(
                a_ptr + source[:, None] * depth + k[None, :],
                mask=real[:, None] & there[None, :], other=0,
            )  # fmt: skip
            b = tl.load(
                b_ptr + n[None, :].to(tl.int64) * b_width + k[:, None].to(tl.int64) * b_depth,
                mask=inside[None, :] & there[:, None], other=0,
            )  # fmt: skip
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        at = row[:, None] * width + n[None, :]
        mask = real[:, None] & inside[None, :]
        if MODE <= DOWN:
            bias = tl.load(bias_ptr + e.to(tl.int64) * width + n, mask=inside, other=0)
            total += bias.to(tl.float32)[None, :]
        if MODE == UP:
            if ACTIVATION == GELU:
                tl.store(pre_ptr + at, total.to(pre_ptr.dtype.element_ty), mask=mask)
                total = total * 0.5 * (1.0 + tl.erf(total * 0.7071067811865476))
            else:
                # unlike a maximum, this lets NaN through
                total = tl.where(total < 0, 0.0, total)
        if MODE == BACK:
            h = tl.load(h_ptr + at, mask=mask, other=0).to(tl.float32)
            # this column tile's part of <output, its gradient>, without the second bias
            tl.store(
                dot_products_ptr + column.to(tl.int64) * pairs + row,
                tl.sum(total * h, 1),
                mask=real,
            )
            weight = tl.load(weight_ptr + token * experts + e, mask=real, other=0).to(tl.float32)
            total = total * weight[:, None]
            if ACTIVATION == GELU:
                z = tl.load(pre_ptr + at, mask=mask, other=0).to(tl.float32)
                slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
                slope += z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
                total = total * slope
            else:
                total = tl.where(h <= 0, 0.0, total)
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weights(
    a_ptr, b_ptr, out_ptr, bias_ptr, weight_ptr, token_ptr, ends_ptr,
    experts, height, width,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[e, m, n] = sum over the rows r of e of a[r, m] b[r, n], and bias[e, m] = sum of a[r, m].

    With WEIGHTED the rows of a are multiplied by the combine weights of their pairs.

    Grid: (E * tiles of M * tiles of N,), one program per expert and tile of out. Pointers: a
    (pairs, height), or (T, height) with GATHER_A; b (pairs, width), or (T, width) with GATHER_B;
    out (E, height, width); bias (E, height), all in the dtype of x; weight (T, E) float; token
    (pairs,) int32; ends (E,) int32.
    """
    across = tl.cdiv(width, N)
    down = tl.cdiv(height, M)
    e = tl.program_id(0) // (across * down)
    within = tl.program_id(0) % (across * down)
    m = within // across * M + tl.arange(0, M)
    column = within % across
    n = column * N + tl.arange(0, N)
    tall, wide = m < height, n < width
    stop = tl.load(ends_ptr + e)
    begin = tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    total = tl.zeros([M, N], tl.float32)
    bias_sum = tl.zeros([M], tl.float32)
    for start in range(begin, stop, K):
        r = start + tl.arange(0, K)
        real = r < stop
        token = tl.load(token_ptr + r, mask=real, other=0).to(tl.int64)
        row_a = r.to(tl.int64)
        row_b = row_a
        if GATHER_A:
            row_a = token
        if GATHER_B:
            row_b = token
        a = tl.load(
            a_ptr + row_a[None, :] * height + m[:, None],
            mask=real[None, :] & tall[:, None], other=0,
        )  # fmt: skip
        b = tl.load(
            b_ptr + row_b[:, None] * width + n[None, :],
            mask=real[:, None] & wide[None, :], other=0,
        )  # fmt: skip
        exact = a.to(tl.float32)
        if WEIGHTED:
            weight = tl.load(weight_ptr + token * experts + e, mask=real, other=0).to(tl.float32)
            exact = exact * weight[None, :]
            a = exact.to(a.dtype)
        if column == 0:
            bias_sum += tl.sum(exact, 1)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = (e.to(tl.int64) * height + m[:, None]) * width + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=tall[:, None] & wide[None, :])
    if column == 0:
        place = bias_ptr + e.to(tl.int64) * height + m
        tl.store(place, bias_sum.to(bias_ptr.dtype.element_ty), mask=tall)


def tile_sizes(pairs: int, experts: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options that compile for sm_80 and sm_90 without register spills."""
    each = pairs // max(1, experts)
    if dtype == torch.float32:
        sizes = (64, 64, 32, 8, 2) if each >= 64 else (16, 64, 32, 4, 2)
    elif each >= 256:
        sizes = (128, 128, 64, 8, 3)
    else:
        sizes = (64, 128, 64, 8, 3) if each >= 64 else (16, 128, 64, 4, 3)
    return dict(zip(("M", "N", "K", "num_warps", "num_stages"), sizes, strict=True))


def weight_tile_sizes(sizes: dict[str, int]) -> dict[str, int]:
    """Sizes that differ in `_weights`, where M tiles the columns of a and K the rows to sum."""
    return {"M": min(sizes["N"], 16 * sizes["num_warps"]), "K": min(sizes["M"], sizes["K"])}


def _tf32() -> bool:
    """Whether the user allows TF32, which rounds the inputs of float32 products."""
    rules = torch.backends.cuda.matmul
    if hasattr(rules, "fp32_precision"):
        return rules.fp32_precision == "tf32"
    return rules.allow_tf32


class _Products:
    """Launches of one layer's products, with the arguments that they have in common."""

    def __init__(self, pairs: SortedPairs, activation: int, like: Tensor) -> None:
        self.pairs, self.activation = pairs, activation
        self.experts = len(pairs.ends)
        self.sizes = tile_sizes(len(pairs.token), self.experts, like.dtype)
        self.exactness = {
            "PRECISION": "tf32" if like.dtype == torch.float32 and _tf32() else "ieee",
            # Triton's interpreter has no arithmetic for bfloat16
            "WIDEN": not isinstance(_rows, triton.JITFunction),
        }

    def rows(
        self, mode: int, a: Tensor, b: Tensor, out: Tensor, *, gather: bool = False,
        bias: Tensor | None = None, pre: Tensor | None = None, h: Tensor | None = None,
        dot_products: Tensor | None = None, weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `_rows`; the modes of the backward pass, BACK and PLAIN, read b transposed."""
        (count, width), depth, sizes = out.shape, a.size(1), self.sizes
        if not count:
            return
        apart = (depth, 1) if mode in (UP.value, DOWN.value) else (1, width)
        # an upper bound on the tiles of rows, as the last tile of every expert may be partly empty
        down = triton.cdiv(count, sizes["M"]) + self.experts - 1
        _rows[(down * triton.cdiv(width, sizes["N"]),)](
            a, b, a if bias is None else bias, out, a if h is None else h,
            a if pre is None else pre, a if dot_products is None else dot_products,
            a if weight is None else weight, self.pairs.token, self.pairs.ends,
            self.experts, count, depth, width, *apart,
            GATHER=gather, MODE=mode, ACTIVATION=self.activation,
            W=triton.next_power_of_2(self.experts), **sizes, **self.exactness,
        )  # fmt: skip

    def weights(
        self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor, *,
        gather_a: bool = False, gather_b: bool = False, weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `_weights` for all experts; those without rows get gradients of 0."""
        _, height, width = out.shape
        sizes = {**self.sizes, **weight_tile_sizes(self.sizes)}
        grid = self.experts * triton.cdiv(height, sizes["M"]) * triton.cdiv(width, sizes["N"])
        _weights[(grid,)](
            a, b, out, bias, a if weight is None else weight, self.pairs.token, self.pairs.ends,
            self.experts, height, width, GATHER_A=gather_a, GATHER_B=gather_b,
            WEIGHTED=weight is not None, **sizes, **self.exactness,
        )  # fmt: skip


class _FusedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, weight: Tensor,
        pairs: SortedPairs, activation: int,
    ) -> Tensor:  # fmt: skip
        x, w1, b1, w2, b2, weight = (t.contiguous() for t in (x, w1, b1, w2, b2, weight))
        products = _Products(pairs, activation, x)
        count = len(pairs.token)
        h = x.new_empty(count, w1.size(1))
        pre = torch.empty_like(h) if activation == GELU.value else None
        products.rows(UP.value, x, w1, h, gather=True, bias=b1, pre=pre)
        out = x.new_empty(count, x.size(1))
        products.rows(DOWN.value, h, w2, out, bias=b2)
        ctx.save_for_backward(x, w1, w2, b2, weight, h, pre, *pairs)
        ctx.activation = activation
        return collect_rows(out, pairs.place, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, b2, weight, h, pre, *rest = ctx.saved_tensors
        pairs = SortedPairs(*rest)
        products = _Products(pairs, ctx.activation, x)
        dy = dy.contiguous()
        across = triton.cdiv(h.size(1), products.sizes["N"])
        dot_products = torch.empty(across, len(h), dtype=torch.float32, device=x.device)
        dh = torch.empty_like(h)
        more = {"pre": pre, "h": h, "dot_products": dot_products, "weight": weight}
        products.rows(BACK.value, dy, w2, dh, gather=True, **more)

        # <output, dy> of each pair is the part of the second bias plus that of the hidden values
        dweight = dy.float() @ b2.float().t()
        if len(h):
            dweight += dot_products.sum(0)[pairs.place.clamp_min(0)]
        dweight.masked_fill_(pairs.place < 0, 0)

        dx = None
        if ctx.needs_input_grad[0]:
            drows = x.new_empty(len(h), x.size(1))
            products.rows(PLAIN.value, dh, w1, drows)
            dx = collect_rows(drows, pairs.place)
        dw1, db1 = torch.empty_like(w1), w1.new_empty(w1.shape[:2])
        products.weights(dh, x, dw1, db1, gather_b=True)
        dw2, db2 = torch.empty_like(w2), torch.empty_like(b2)
        products.weights(dy, h, dw2, db2, gather_a=True, weight=weight)
        return dx, dw1, db1, dw2, db2, dweight.to(weight.dtype), None, None


def fused_ffn(
    x: Tensor, experts: ExpertWeights, weights: Tensor, pairs: SortedPairs, *, activation: int
) -> Tensor:
    """y_t = sum over the active pairs (t, e) of weight * FFN_e(x_t), (T, D); differentiable.

    Args:
        x: (T, D), of the experts' dtype.
        weights: combine weights, (T, E), any float dtype.
        pairs: the active pairs in expert order.
        activation: a number as `activation_id` gives it.
    """
    return _FusedFFN.apply(x, *experts, weights, pairs, activation)
