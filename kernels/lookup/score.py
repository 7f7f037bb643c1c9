"""The maths of a hashed look-up: codes, scores and their moments.

Letters: B rows, K tables, t bits per table (tau), N = 2^t rows per table, H output width.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SCORES = ("prob", "abs_prob", "l1")
"""Scores of look-ups; kernels know them by their position here."""


def quantise(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Tables as int8 with one scale per row: (K, N, H) -> (K, N, H) int8, (K, N) float32.

    The value of largest magnitude in a row becomes 127 or -127. The error of a value is at most
    half the row's scale.
    """
    wide = tables.float()
    scale = wide.abs().amax(-1) / 127
    steps = wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return steps.round().to(torch.int8), scale


def codes(z: Tensor) -> Tensor:
    """Row number in each table, sum_i [z_i >= 0] 2^i: (B, K, t) -> (B, K) int64."""
    places = 2 ** torch.arange(z.size(-1), device=z.device)
    return ((z >= 0) * places).sum(-1)


def patterns(bits: int, device: torch.device | None = None) -> Tensor:
    """Bits of every row number as `codes` packs them, lowest bit first: (2^t, t) int64."""
    rows = torch.arange(2**bits, device=device)
    return (rows[:, None] >> torch.arange(bits, device=device)) & 1


def weigh(z: Tensor, score: str, temperature: float) -> Tensor:
    """Score of each hashed slice: (B, K, t) float32 or float64 -> (B, K)."""
    size = z.abs()
    if score == "l1":
        return size.mean(-1)
    # computed in the log domain, because a product of many factors would lose the small ones
    p = (-F.softplus(-2 / temperature * size)).sum(-1).exp()
    return p if score == "prob" else size.sum(-1) * p


def weigh_backward(z: Tensor, p: Tensor, dp: Tensor, score: str, temperature: float) -> Tensor:
    """dz (B, K, t) from dp (B, K): sign(z_i) dp/d|z_i|, in closed form."""
    sign = torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
    if score == "l1":
        return sign * (dp / z.size(-1))[..., None]
    slope = 2 / temperature * torch.sigmoid(-2 / temperature * z.abs())
    if score == "prob":
        return sign * slope * (dp * p)[..., None]
    total = z.abs().sum(-1, keepdim=True)
    plain = (-F.softplus(-2 / temperature * z.abs())).sum(-1).exp()
    return sign * (1 + total * slope) * (dp * plain)[..., None]


def _moments(temperature: float, power: int) -> list[float]:
    """E[|z|^m sigmoid(2 |z| / temperature)^power] for m = 0, 1, 2 and standard normal z."""
    x = torch.linspace(0, 12, 24001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) * math.sqrt(2 / math.pi)
    base = density * torch.sigmoid(2 * x / temperature).pow(power)
    return [float(torch.trapezoid(base * x**m, x)) for m in range(3)]


def score_moment(score: str, bits: int, temperature: float) -> float:
    """Root mean square of the score for standard normal z, by one-dimensional quadrature.

    With A_m = E[|z|^m sigmoid(2 |z| / temperature)^2] and independent z_i, E[p^2] = A_0^t and
    E[(S p)^2] = t A_2 A_0^(t-1) + t (t-1) A_1^2 A_0^(t-2).
    """
    if score == "l1":
        return math.sqrt(bits + bits * (bits - 1) * 2 / math.pi) / bits
    a0, a1, a2 = _moments(temperature, 2)
    if score == "prob":
        return math.sqrt(a0**bits)
    pairs = bits * (bits - 1) * a1 * a1 * a0 ** (bits - 2) if bits > 1 else 0.0
    return math.sqrt(bits * a2 * a0 ** (bits - 1) + pairs)


def linear_gain(score: str, bits: int, temperature: float) -> float:
    """Gain a with which T[c] = a W s_c makes p(z) T[code(z)] fit W z best, for standard normal z.

    s_c are the signs of code c. By least squares a = E[p |z_i|] / E[p^2]. Let B_m be the A_m of
    `score_moment` with the first power of the sigmoid instead of the second. Then
    E[p |z_i|] = B_1 B_0^(t-1) and E[S p |z_i|] = B_2 B_0^(t-1) + (t-1) B_1^2 B_0^(t-2).
    """
    square = score_moment(score, bits, temperature) ** 2
    if score == "l1":
        return (1 + (bits - 1) * 2 / math.pi) / bits / square
    b0, b1, b2 = _moments(temperature, 1)
    if score == "prob":
        return b1 * b0 ** (bits - 1) / square
    pairs = (bits - 1) * b1 * b1 * b0 ** (bits - 2) if bits > 1 else 0.0
    return (b2 * b0 ** (bits - 1) + pairs) / square
