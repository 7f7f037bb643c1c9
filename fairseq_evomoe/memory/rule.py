"""How look-ups hash their input and read tables (MemoryFormer, arXiv 2411.12992).

Letters: D input width, H output width, K tables, t bits per table (tau), N = 2^t rows per table.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels.lookup.linear_part import fold, straight_through
from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.lookup.score import linear_gain, score_moment
from fairseq_evomoe.memory.config import MemoryConfig


class Tables(NamedTuple):
    """What a look-up reads.

    Attributes:
        rows: R, (K, N, H).
        bias: b, (H,), or None.
        linear: L, (K, t, H), the linear part (`kernels.lookup.linear_part`), or None.
        row_scale: (K, N) float32, the scales of int8 rows, or None.
    """

    rows: Tensor
    bias: Tensor | None
    linear: Tensor | None = None
    row_scale: Tensor | None = None


OWN_ROWS = 0.1
"""Initial scale of rows beside a linear part, relative to that of rows alone."""


@dataclass(frozen=True, kw_only=True)
class HashRule:
    """How a look-up reads its tables: everything about it but the tables themselves.

    Attributes:
        width: D.
        bits: t.
        score: how a row is weighted, `--memory-score`.
        temperature: of the scores `prob` and `abs_prob`.
        scale: what rows are multiplied by, `--memory-lr-scale`.
        gain: a, which makes the linear part a dense layer's weights.
        straight_through: whether signs pass a gradient, `--memory-straight-through`.
        dropout: probability that a token does not read a table, `--memory-dropout`.
    """

    width: int
    bits: int
    score: str
    temperature: float
    scale: float
    gain: float
    straight_through: bool
    dropout: float

    @classmethod
    def from_flags(cls, width: int, bits: int, cfg: MemoryConfig) -> "HashRule":
        """The rule of a look-up of `width` values, `bits` in a table."""
        score = str(cfg.memory_score)
        return cls(
            width=width,
            bits=bits,
            score=score,
            temperature=cfg.memory_temperature,
            scale=cfg.memory_lr_scale,
            gain=linear_gain(score, bits, cfg.memory_temperature),
            straight_through=cfg.memory_straight_through,
            dropout=cfg.memory_dropout,
        )

    @property
    def count(self) -> int:
        """K = ceil(D / t)."""
        return -(-self.width // self.bits)

    def draw(self, out: int, cfg: MemoryConfig) -> Tables:
        """Draw tables for outputs of width `out`, with the scale that `MemoryLayer` describes."""
        std = 1 / math.sqrt(3 * self.count) / score_moment(self.score, self.bits, self.temperature)
        rows = torch.randn(self.count, 2**self.bits, out) * (std / self.scale)
        if not cfg.memory_linear:
            return Tables(rows, None)
        linear = torch.randn(self.count, self.bits, out) * (std / self.gain / math.sqrt(self.bits))
        return Tables(rows * OWN_ROWS, None, linear)

    def slices(self, x: Tensor) -> Tensor:
        """Cut x into the slices to hash, padded with zeros: (..., D) -> (B, K, t)."""
        z = x.reshape(-1, self.width)
        if self.count * self.bits > self.width:
            z = F.pad(z, (0, self.count * self.bits - self.width))
        return z.view(-1, self.count, self.bits)

    def fold(self, tables: Tables) -> Tables:
        """The same tables as one: the linear part is added to the rows."""
        if tables.linear is None:
            return tables
        whole = fold(tables.rows, tables.linear, self.gain / self.scale)
        return tables._replace(rows=whole, linear=None)

    def look_up(self, x: Tensor, tables: Tables, *, training: bool) -> Tensor:
        """y = sum_k p(z_k) T_k[code(z_k)] + b: x (..., D) -> (..., H), dtype of x."""
        z = self.slices(x)
        dropped = training and self.dropout > 0
        if dropped:
            # a slice of zeros has the score 0, so that its table adds nothing
            kept = torch.rand(z.shape[:2], device=z.device) >= self.dropout
            z = z * kept.to(z.dtype)[..., None]
        y = lookup(
            z,
            self.fold(tables).rows,
            score=self.score,
            temperature=self.temperature,
            row_scale=tables.row_scale,
        )
        if self.straight_through and tables.linear is not None and training:
            y = straight_through(
                *(y, z, tables.linear, self.gain / self.scale),
                score=self.score,
                temperature=self.temperature,
            )
        scale = self.scale / (1 - self.dropout) if dropped else self.scale
        if tables.bias is not None:
            y = torch.add(tables.bias.to(y.dtype), y, alpha=scale)
        elif scale != 1:
            y = y * scale
        return y.view(*x.shape[:-1], y.size(-1))
