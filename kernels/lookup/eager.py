"""The look-up by library calls, forward and backward.

Letters: B rows, K tables, t bits per table (tau), N = 2^t rows per table, H output width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels.lookup.score import codes, weigh, weigh_backward


def lookup(z: Tensor, tables: Tensor, *, score: str, temperature: float) -> Tensor:
    """See `lookup.lookup`; for tables without a scale per row."""
    return _Lookup.apply(z, tables, score, temperature)


@torch.no_grad()
def scaled_lookup(
    z: Tensor, tables: Tensor, row_scale: Tensor, *, score: str, temperature: float
) -> Tensor:
    """See `lookup.lookup`; for int8 tables with one scale per row, without gradients."""
    exact = z.float()
    rows = codes(exact) + torch.arange(z.size(1), device=z.device) * tables.size(1)
    p = weigh(exact, score, temperature) * row_scale.reshape(-1)[rows]
    return _bags(rows, tables.reshape(-1, tables.size(-1)), p).to(z.dtype)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, tables: Tensor, score: str, temperature: float) -> Tensor:
        exact = z.double() if z.dtype == torch.float64 else z.float()
        rows = codes(exact)
        rows = rows + torch.arange(z.size(1), device=z.device) * tables.size(1)
        p = weigh(exact, score, temperature)
        flat = tables.reshape(-1, tables.size(-1))
        y = _bags(rows, flat, p)
        ctx.save_for_backward(z, tables, rows, p)
        ctx.score, ctx.temperature = score, temperature
        return y.to(z.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        z, tables, rows, p = ctx.saved_tensors
        flat = tables.reshape(-1, tables.size(-1))
        dy = dy.to(p.dtype).contiguous()
        dz = dtables = None
        if ctx.needs_input_grad[1]:
            dtables = _bags_backward(rows, p, dy, len(flat)).view(tables.shape).to(tables.dtype)
        if ctx.needs_input_grad[0]:
            dp = _row_products(rows, flat, dy)
            exact = z.to(p.dtype)
            dz = weigh_backward(exact, p, dp, ctx.score, ctx.temperature).to(z.dtype)
        return dz, dtables, None, None


_CHUNK = 2**22
"""How many numbers are gathered at a time if table rows must be widened.

It bounds the memory that is needed besides the result.
"""


def _chunks(rows: Tensor, width: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, rows.size(1) * width))
    return [slice(a, a + step) for a in range(0, rows.size(0), step)]


def _bags(rows: Tensor, flat: Tensor, p: Tensor) -> Tensor:
    """sum_k p_bk flat[rows_bk]: (B, H) in p's dtype."""
    if flat.dtype == p.dtype:
        return F.embedding_bag(rows, flat, mode="sum", per_sample_weights=p)
    y = p.new_empty(rows.size(0), flat.size(1))
    for part in _chunks(rows, flat.size(1)):
        gathered = flat[rows[part]].to(p.dtype)
        y[part] = torch.bmm(p[part, None, :], gathered).squeeze(1)
    return y


def _bags_backward(rows: Tensor, p: Tensor, dy: Tensor, height: int) -> Tensor:
    """Dense table gradient, (K N, H); row r is the sum of p_bk dy_b over all (b, k) that hit it."""
    bags, per_bag = rows.shape
    offsets = torch.arange(bags, device=rows.device)
    of_bag = offsets.repeat_interleave(per_bag)
    size = torch.full((bags,), per_bag, device=rows.device)
    most = torch.empty(0, dtype=torch.int64, device=rows.device)
    return torch.ops.aten._embedding_bag_dense_backward(
        dy, rows.reshape(-1), of_bag, size, most, height, False, 0, p.reshape(-1)
    )


def _row_products(rows: Tensor, flat: Tensor, dy: Tensor) -> Tensor:
    """Dot products <dy_b, flat[rows_bk]>, (B, K)."""
    products = dy.new_empty(rows.shape)
    for part in _chunks(rows, flat.size(1)):
        gathered = flat[rows[part]].to(dy.dtype)
        products[part] = torch.bmm(gathered, dy[part, :, None]).squeeze(-1)
    return products
