"""Tables with a linear part: what makes look-ups learn from every token.

Letters: B rows, K tables, t bits per table, N = 2^t rows per table, H output width.

A row of a table learns only from the inputs that hash to it. With a linear part L_k (t, H) a table
is T_k[c] = R_k[c] + a sum_i s_i(c) L_ki, where s_i(c) = +1 or -1 are the signs of code c. L learns
from every input, and the rows R learn what is left. The look-up reads one table in either case.
Neither paper has this. The gain a is `score.linear_gain`, so that L is in the units of a dense
layer's weights: the look-up of a sum_i s_i(c) W_ki is the best one for x -> W x.
"""

from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.kernels.lookup.score import patterns, weigh


def _signs(bits: int, like: Tensor) -> Tensor:
    """Signs of every row number, (N, t)."""
    return patterns(bits, like.device).to(like.dtype) * 2 - 1


def fold(tables: Tensor, linear: Tensor, gain: float) -> Tensor:
    """T_k[c] = R_k[c] + a sum_i s_i(c) L_ki.

    It is computed in float32, or in float64 if the tables are. For every value of T it reads one of
    R and adds t of L, all of which stay in the cache.

    Args:
        tables: R, (K, N, H).
        linear: L, (K, t, H).
        gain: a.

    Returns:
        (K, N, H), in the dtype of the tables. Differentiable in both.
    """
    exact = torch.promote_types(tables.dtype, torch.float32)
    with torch.autocast(tables.device.type, enabled=False):
        part = linear.to(exact)
        signs = _signs(linear.size(1), part).expand(len(part), -1, -1)
        return torch.baddbmm(tables.to(exact), signs, part, alpha=gain).to(tables.dtype)


def parts(whole: Tensor, gain: float) -> tuple[Tensor, Tensor]:
    """The inverse of `fold` whose rows R are smallest: T (K, N, H) -> R (K, N, H), L (K, t, H).

    The columns of the signs are orthogonal, so L_ki = sum_c s_i(c) T_k[c] / (a N).
    """
    rows = whole.size(1)
    signs = _signs(rows.bit_length() - 1, whole).expand(len(whole), -1, -1)
    linear = torch.bmm(signs.mT, whole) / (gain * rows)
    return torch.baddbmm(whole, signs, linear, alpha=-gain), linear


def straight_through(
    y: Tensor, z: Tensor, linear: Tensor, gain: float, *, score: str, temperature: float
) -> Tensor:
    """Return y, and give z the gradient that it would have if signs were linear near 0.

    y contains p(z_k) a sum_i sign(z_ki) L_ki. The sign has no gradient; here ds/dz = 1 is used for
    |z| <= 1, as in binary networks (arXiv 1602.02830, eq. 4), so that
    dz_ki = p(z_k) a <dy, L_ki> for |z_ki| <= 1. This is added to the gradient of the score. Under
    autocast the product dy L is computed in its dtype.

    Args:
        y: (B, H), the look-up's output.
        z: (B, K, t), what was hashed.
        linear: L, (K, t, H).
        gain: a.
        score, temperature: of the look-up.
    """
    kind = y.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return _StraightThrough.apply(y, z, linear, gain, score, temperature, dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, linear: Tensor, *rule: Any) -> Tensor:
        ctx.save_for_backward(z, linear)
        ctx.rule = rule
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, linear = ctx.saved_tensors
        gain, score, temperature, dtype = ctx.rule
        dz = None
        if ctx.needs_input_grad[1]:
            dtype = dtype or dy.dtype
            with torch.autocast(dy.device.type, enabled=False):
                flat = linear.reshape(-1, linear.size(-1)).to(dtype)
                products = (dy.to(dtype) @ flat.mT).view(z.shape)
            exact = z.to(torch.promote_types(z.dtype, torch.float32))
            p = weigh(exact, score, temperature) * gain
            dz = products.to(p.dtype).mul_(p[..., None])
            dz = dz.masked_fill_(exact.abs() > 1, 0).to(z.dtype)
        return dy, dz, None, None, None, None, None
