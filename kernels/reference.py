"""The truth of every op: plain torch, one expert after another, gradients by autograd.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs;
B rows, K tables, N = 2^t rows a table of t bits, H output width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def sort_pairs(active: Tensor) -> tuple[Tensor, list[int]]:
    """Expert-sorted order of the active pairs, by two plain loops.

    Args:
        active: (T, E) bool.

    Returns:
        token index of every pair, (A,) int64, experts ascending, tokens ascending within an
        expert; number of pairs of each expert, E ints.
    """
    tokens, counts = [], []
    for e in range(active.size(1)):
        mine = [t for t in range(active.size(0)) if bool(active[t, e])]
        tokens += mine
        counts.append(len(mine))
    return torch.tensor(tokens, dtype=torch.int64, device=active.device), counts


def grouped_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    weight: Tensor,
    token: Tensor | None,
    counts: Sequence[int],
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the pairs (t, e) of weight * FFN_e(x_t); see `grouped_ffn.grouped_ffn`."""
    y = x * 0  # part of the graph even when no pair is active
    start = 0
    for e, n in enumerate(counts):
        if n == 0:
            continue
        rows = (
            torch.arange(x.size(0), device=x.device) if token is None else token[start : start + n]
        )
        h = activation(x[rows] @ w1[e].t() + b1[e])
        h = torch.nn.functional.dropout(h, dropout, training=dropout > 0)
        out = h @ w2[e].t() + b2[e]
        y = y.index_add(0, rows, out * weight[start : start + n, None].to(out.dtype))
        start += n
    return y


SCORES = ("prob", "abs_prob", "l1")
"""Scores of look-ups; kernels know them by their place here."""


def lookup(z: Tensor, tables: Tensor, *, score: str, temperature: float = 1.0) -> Tensor:
    """y_b = sum_k p(z_bk) T_k[code(z_bk)], table after table; see `lookup.lookup`."""
    wide = z if z.dtype == torch.float64 else z.float()
    y = wide.new_zeros(z.size(0), tables.size(-1))
    # d|z| / dz is +1 at 0, where autograd would say 0
    size = torch.where(z >= 0, wide, -wide)
    for k in range(z.size(1)):
        code = sum((z[:, k, i] >= 0).long() << i for i in range(z.size(2)))
        p = torch.sigmoid(2 / temperature * size[:, k]).prod(-1)
        if score == "abs_prob":
            p = size[:, k].sum(-1) * p
        elif score == "l1":
            p = size[:, k].mean(-1)
        y = y + p[:, None] * tables[k][code].to(wide.dtype)
    return y.to(z.dtype)
