"""Experts on GPUs as grouped matrix products of our own, in Triton.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.

Tokens are gathered by the product that reads them, biases, activation and its gradient are worked
out on the tile that a product has just made, and the gradient of the combine weights comes from the
hidden values, so that no output row is kept for it. A tile of rows belongs to one expert; which,
each program finds from the ends of the experts' rows, so that the grid needs no count from the
device. Sums are float32, nothing is atomic, and results do not change from run to run.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels.dispatch_triton import collect_rows
from fairseq_evomoe.kernels.routing_triton import Sorted

RELU, GELU = tl.constexpr(0), tl.constexpr(1)
UP, DOWN, BACK, PLAIN = (tl.constexpr(i) for i in range(4))
"""What becomes of a product: hidden values, output rows, gradient of hidden values, itself."""

_SAME: dict[Any, int] = {F.relu: 0, torch.relu: 0, F.gelu: 1}
_BY_NAME = {"fairseq.modules.gelu.gelu": 1}


def kind(activation: Callable[[Tensor], Tensor]) -> int | None:
    """Number of an activation that the kernels have: ReLU, or GELU by the error function."""
    name = f"{getattr(activation, '__module__', '')}.{getattr(activation, '__qualname__', '')}"
    return _SAME[activation] if activation in _SAME else _BY_NAME.get(name)


@triton.jit
def _own(ends_ptr, experts, tile, M: tl.constexpr, W: tl.constexpr):
    """Expert, first row and end of the rows of a tile; with expert >= `experts` there is none."""
    e = tl.arange(0, W)
    inside = e < experts
    end = tl.load(ends_ptr + e, mask=inside, other=0)
    begin = tl.load(ends_ptr + e - 1, mask=inside & (e > 0), other=0)
    tiles = tl.where(inside, (end - begin + M - 1) // M, 0)
    last = tl.cumsum(tiles, 0)
    mine = tl.sum((last <= tile).to(tl.int32), 0)
    here = e == mine
    first = tl.sum(tl.where(here, begin + (tile - last + tiles) * M, 0), 0)
    return mine, first, tl.sum(tl.where(here, end, 0), 0)


@triton.jit
def _rows(
    a_ptr, b_ptr, bias_ptr, out_ptr, h_ptr, pre_ptr, dots_ptr, weight_ptr, token_ptr, ends_ptr,
    experts, pairs, depth, width, b_width, b_depth,
    GATHER: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """out[r, n] = what MODE makes of sum_k a[row of r, k] b[expert of r, n, k].

    b's rows and columns lie `b_width` and `b_depth` apart, its experts width * depth.
    """
    across = tl.cdiv(width, N)
    column = tl.program_id(0) % across
    e, first, stop = _own(ends_ptr, experts, tl.program_id(0) // across, M, W)
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
                # unlike a maximum it lets NaN through
                total = tl.where(total < 0, 0.0, total)
        if MODE == BACK:
            h = tl.load(h_ptr + at, mask=mask, other=0).to(tl.float32)
            # <output, gradient> without the second bias, one part a column of tiles
            tl.store(dots_ptr + column.to(tl.int64) * pairs + row, tl.sum(total * h, 1), mask=real)
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

    With WEIGHTED a's rows are multiplied with the pairs' combine weights.
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
    side = tl.zeros([M], tl.float32)
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
            side += tl.sum(exact, 1)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    at = (e.to(tl.int64) * height + m[:, None]) * width + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=tall[:, None] & wide[None, :])
    if column == 0:
        place = bias_ptr + e.to(tl.int64) * height + m
        tl.store(place, side.to(bias_ptr.dtype.element_ty), mask=tall)


def tiles(pairs: int, experts: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a program's tile, as compiled for sm_80 and sm_90 without spilling registers."""
    each = pairs // max(1, experts)
    if dtype == torch.float32:
        sizes = (64, 64, 32, 8, 2) if each >= 64 else (16, 64, 32, 4, 2)
    elif each >= 256:
        sizes = (128, 128, 64, 8, 3)
    else:
        sizes = (64, 128, 64, 8, 3) if each >= 64 else (16, 128, 64, 4, 3)
    return dict(zip(("M", "N", "K", "num_warps", "num_stages"), sizes, strict=True))


def weight_tiles(sizes: dict[str, int]) -> dict[str, int]:
    """What changes for a weight gradient: its height is of columns, rows are what it sums over."""
    return {"M": min(sizes["N"], 16 * sizes["num_warps"]), "K": min(sizes["M"], sizes["K"])}


def _tf32() -> bool:
    """Whether the user lets float32 products round their inputs."""
    rules = torch.backends.cuda.matmul
    if hasattr(rules, "fp32_precision"):
        return rules.fp32_precision == "tf32"
    return rules.allow_tf32


class _Products:
    """The products of one layer: what their launches have in common."""

    def __init__(self, pairs: Sorted, activation: int, like: Tensor) -> None:
        self.pairs, self.activation = pairs, activation
        self.experts = len(pairs.ends)
        self.sizes = tiles(len(pairs.token), self.experts, like.dtype)
        self.exactness = {
            "PRECISION": "tf32" if like.dtype == torch.float32 and _tf32() else "ieee",
            # the interpreter has no arithmetic for bfloat16
            "WIDEN": not isinstance(_rows, triton.JITFunction),
        }

    def rows(
        self, mode: int, a: Tensor, b: Tensor, out: Tensor, *, gather: bool = False,
        bias: Tensor | None = None, pre: Tensor | None = None, h: Tensor | None = None,
        dots: Tensor | None = None, weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `_rows`; on the way back b is read the other way round."""
        (count, width), depth, sizes = out.shape, a.size(1), self.sizes
        if not count:
            return
        apart = (depth, 1) if mode in (UP.value, DOWN.value) else (1, width)
        # every expert may leave a tile half empty
        down = triton.cdiv(count, sizes["M"]) + self.experts - 1
        _rows[(down * triton.cdiv(width, sizes["N"]),)](
            a, b, a if bias is None else bias, out, a if h is None else h,
            a if pre is None else pre, a if dots is None else dots,
            a if weight is None else weight, self.pairs.token, self.pairs.ends,
            self.experts, count, depth, width, *apart,
            GATHER=gather, MODE=mode, ACTIVATION=self.activation,
            W=triton.next_power_of_2(self.experts), **sizes, **self.exactness,
        )  # fmt: skip

    def weights(
        self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor, *,
        gather_a: bool = False, gather_b: bool = False, weight: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Launch `_weights`, for all experts: those without rows get 0."""
        _, height, width = out.shape
        sizes = {**self.sizes, **weight_tiles(self.sizes)}
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
        pairs: Sorted, activation: int,
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
        pairs = Sorted(*rest)
        products = _Products(pairs, ctx.activation, x)
        dy = dy.contiguous()
        across = triton.cdiv(h.size(1), products.sizes["N"])
        dots = torch.empty(across, len(h), dtype=torch.float32, device=x.device)
        dh = torch.empty_like(h)
        more = dict(pre=pre, h=h, dots=dots, weight=weight)
        products.rows(BACK.value, dy, w2, dh, gather=True, **more)

        # <output, gradient> of each pair: that of the second bias, and the hidden values' part
        dweight = dy.float() @ b2.float().t()
        if len(h):
            dweight += dots.sum(0)[pairs.place.clamp_min(0)]
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
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, weight: Tensor, pairs: Sorted,
    activation: int,
) -> Tensor:  # fmt: skip
    """y_t = sum over the pairs (t, e) of weight * FFN_e(x_t); see `grouped_ffn.grouped_ffn`.

    Args:
        x: (T, D). w1: (E, F, D). b1: (E, F). w2: (E, D, F). b2: (E, D), of one dtype.
        weight: (T, E), any float dtype.
        activation: as `kind` numbers it.
    """
    return _FusedFFN.apply(x, w1, b1, w2, b2, weight, pairs, activation)
