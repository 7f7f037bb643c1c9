"""Tables that stand in for a map that is already there, by least squares.

Letters: B samples, D input width, H output width, K tables, t bits a table, N = 2^t rows.
"""

import torch
from torch import Tensor

from fairseq_evomoe.kernels.lookup import codes, linear_gain, patterns, weigh
from fairseq_evomoe.modules.memory_layer import MemoryLayer


def linear_tables(layer: MemoryLayer, weight: Tensor) -> Tensor:
    """The tables that come nearest to W x for standard normal x, without any data.

    T_k[c] = a W_k s_c, with the signs s_c of row c and the gain of `lookup.linear_gain`.

    Args:
        layer: says K, t, N and the score.
        weight: W, (H, D).

    Returns:
        (K, N, H) float32.
    """
    missing = layer.count * layer.bits - layer.width
    wide = torch.nn.functional.pad(weight.detach().float(), (0, missing))
    split = wide.view(-1, layer.count, layer.bits)
    signs = patterns(layer.bits, weight.device) * 2.0 - 1
    gain = linear_gain(layer.score, layer.bits, layer.temperature)
    return gain * torch.einsum("nt,hkt->knh", signs, split)


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
    """Fill a layer's tables and bias so that layer(x) comes near y, in least squares.

    Table after table takes the mean, over the samples of each row, of what the others leave
    (backfitting): T[c] = (sum p r + q P[c]) / (sum p^2 + q), r the rest without this table, P the
    prior, q the mean of p^2 times `strength`: as many samples as the prior counts for.

    Args:
        layer: receives the weights.
        x: (B, D). y: (B, H).
        prior: P, (K, N, H), where the solution starts and what rare rows stay near; None: 0.
        sweeps: times that every table is fitted.
        strength: of the prior, in samples.
    """
    z = layer.slices(x.float())
    score = weigh(z, layer.score, layer.temperature)
    rows = codes(z)
    rest = y.float().clone()
    k_count, n, width = layer.tables.shape
    tables = torch.zeros(k_count, n, width) if prior is None else prior.clone()
    start = tables.clone()
    for k in range(k_count):
        rest -= score[:, k, None] * tables[k][rows[:, k]]
    bias = torch.zeros(width)
    for _ in range(sweeps):
        shift = rest.mean(0)
        bias += shift
        rest -= shift
        for k in range(k_count):
            p, row = score[:, k, None], rows[:, k]
            rest += p * tables[k][row]
            q = strength * float(p.square().mean())
            total = torch.zeros(n, width).index_add_(0, row, p * rest) + q * start[k]
            weight = torch.zeros(n).index_add_(0, row, p[:, 0].square()) + q
            tables[k] = total / weight.clamp_min(1e-12)[:, None]
            rest -= p * tables[k][row]
    layer.tables.copy_(tables / layer.scale)
    if layer.bias is not None:
        layer.bias.copy_(bias)
