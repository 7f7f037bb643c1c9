"""Least-squares fit of look-up tables to a map that exists already.

Letters: B samples, D input width, H output width, K tables, t bits per table, N = 2^t rows.
"""

import torch
from torch import Tensor

from fairseq_evomoe.kernels.lookup.linear_part import fold
from fairseq_evomoe.kernels.lookup.score import codes, weigh
from fairseq_evomoe.memory.layer import MemoryLayer


def linear_tables(layer: MemoryLayer, weight: Tensor) -> Tensor:
    """Return the tables that come nearest to W x for standard normal x, without using any data.

    T_k[c] = a W_k s_c, where s_c are the signs of row c and a is the gain of `score.linear_gain`.

    Args:
        layer: layer that determines K, t, N and the score.
        weight: W, (H, D).

    Returns:
        (K, N, H) float32.
    """
    missing = layer.rule.count * layer.rule.bits - layer.rule.width
    wide = torch.nn.functional.pad(weight.detach().float(), (0, missing))
    linear = wide.view(-1, layer.rule.count, layer.rule.bits).permute(1, 2, 0)
    return fold(torch.zeros_like(layer.tables, dtype=torch.float32), linear, layer.rule.gain)


@torch.no_grad()
def fit(
    layer: MemoryLayer,
    x: Tensor,
    y: Tensor,
    *,
    prior: Tensor | None = None,
    sweeps: int = 3,
    strength: float = 8,
) -> None:
    """Fill a layer's tables and bias such that layer(x) comes near y in least squares.

    The tables are fitted one after another (backfitting). Each row becomes a weighted mean, over
    the samples that hit it, of what the other tables leave:
    T[c] = (sum p r + q P[c]) / (sum p^2 + q). Here r is the residual without this table, P is the
    prior, and q is the mean of p^2 times `strength`, so that the prior counts as much as that many
    samples.

    Args:
        layer: layer that receives the weights.
        x: (B, D).
        y: (B, H).
        prior: P, (K, N, H), where the solution starts and what rare rows stay near; None means 0.
        sweeps: number of times that every table is fitted.
        strength: weight of the prior, in samples.
    """
    z = layer.rule.slices(x.float())
    score = weigh(z, layer.rule.score, layer.rule.temperature)
    rows = codes(z)
    rest = y.float().clone()
    k_count, n, width = layer.tables.shape
    tables = torch.zeros(k_count, n, width, device=x.device) if prior is None else prior.clone()
    start = tables.clone()
    for k in range(k_count):
        rest -= score[:, k, None] * tables[k][rows[:, k]]
    bias = torch.zeros(width, device=x.device)
    for _ in range(sweeps):
        shift = rest.mean(0)
        bias += shift
        rest -= shift
        for k in range(k_count):
            p, row = score[:, k, None], rows[:, k]
            rest += p * tables[k][row]
            q = strength * float(p.square().mean())
            total = (
                torch.zeros(n, width, device=x.device).index_add_(0, row, p * rest) + q * start[k]
            )
            weight = torch.zeros(n, device=x.device).index_add_(0, row, p[:, 0].square()) + q
            tables[k] = total / weight.clamp_min(1e-12)[:, None]
            rest -= p * tables[k][row]
    layer.fill(tables, bias)
