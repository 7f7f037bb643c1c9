"""Look-up layers of an exported model (MemoryFormer, arXiv 2411.12992) and tables of n-grams.

Parameters have the names that they have in fairseq's checkpoint. The look-up itself can be replaced
by a faster one through `OPERATIONS`: `fairseq_evomoe.hf` puts the package's kernels there, and a
folder that was exported with its code uses what stands here, plain torch.

Letters: D input width, H output width, K tables, t bits per table, N = 2^t rows per table.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_evomoe import EvoMoEConfig


def look_up(
    z: Tensor,
    tables: Tensor,
    *,
    score: str,
    temperature: float,
    row_scale: Tensor | None = None,
) -> Tensor:
    """y_b = sum_k p(z_bk) T_k[code(z_bk)] (MemoryFormer, arXiv 2411.12992, eq. 4, 10 and 11).

    Args:
        z: (B, K, t).
        tables: (K, N, H), int8 together with a `row_scale` (K, N).
        score: "prob", "abs_prob" or "l1".

    Returns:
        (B, H), dtype of z; differentiable in z through p, and in the tables.
    """
    wide = z if z.dtype == torch.float64 else z.float()
    places = 2 ** torch.arange(z.size(-1), device=z.device)
    rows = ((wide >= 0) * places).sum(-1)
    rows = rows + torch.arange(z.size(1), device=z.device) * tables.size(1)
    size = torch.where(wide >= 0, wide, -wide)
    if score == "l1":
        p = size.mean(-1)
    else:
        p = (-F.softplus(-2 / temperature * size)).sum(-1).exp()
        p = size.sum(-1) * p if score == "abs_prob" else p
    flat = tables.reshape(-1, tables.size(-1))
    if row_scale is not None:
        p = p * row_scale.reshape(-1)[rows]
    if flat.dtype == p.dtype:
        return F.embedding_bag(rows, flat, mode="sum", per_sample_weights=p).to(z.dtype)
    # converted tables are widened a few rows at a time
    step = max(1, 2**22 // (rows.size(1) * flat.size(1)))
    parts = [
        torch.bmm(p[i : i + step, None], flat[rows[i : i + step]].to(p.dtype)).squeeze(1)
        for i in range(0, max(1, len(rows)), step)
    ]
    return torch.cat(parts).to(z.dtype)


OPERATIONS: dict[str, Callable[..., Tensor]] = {"look_up": look_up}
"""What computes look-ups, and the experts of `feed_forward_evomoe`."""


class HashRule:
    """How a look-up of `width` values and `bits` in a table reads its tables."""

    def __init__(self, memory: dict[str, Any], width: int, bits: int, gain: float) -> None:
        self.memory, self.width, self.bits, self.gain = memory, width, bits, gain
        self.count = -(-width // bits)

    def fold(self, rows: Tensor, linear: Tensor) -> Tensor:
        """The table of rows and linear part: T_k[c] = R_k[c] + a sum_i s_i(c) L_ki."""
        codes = torch.arange(rows.size(1), device=rows.device)
        bits = (codes[:, None] >> torch.arange(self.bits, device=rows.device)) & 1
        signs = (bits.to(linear.dtype) * 2 - 1).expand(len(linear), -1, -1)
        with torch.autocast(rows.device.type, enabled=False):
            return torch.baddbmm(rows, signs, linear, alpha=self.gain / self.memory["lr_scale"])

    def __call__(
        self,
        x: Tensor,
        tables: Tensor,
        bias: Tensor | None,
        linear: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """x (..., D) -> (..., H), dtype of x."""
        memory = self.memory
        z = F.pad(x.reshape(-1, self.width), (0, self.count * self.bits - self.width))
        y = OPERATIONS["look_up"](
            z.view(-1, self.count, self.bits),
            tables if linear is None else self.fold(tables, linear),
            score=memory["score"],
            temperature=memory["temperature"],
            row_scale=row_scale,
        )
        if memory["lr_scale"] != 1:
            y = y * memory["lr_scale"]
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.size(-1))


DTYPES = {"int8": torch.int8, "bf16": torch.bfloat16}


class KeepsScales(nn.Module):
    """Base class of modules with int8 weights: the scales stay float32 whatever the rest becomes.

    Attributes:
        scales: names of the scales.
    """

    scales: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in torch."""
        kept = {name: getattr(self, name, None) for name in self.scales}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if before is not None:
                setattr(self, name, before.to(getattr(self, name).device))
        return self


class StoredTables(KeepsScales):
    """Base class of layers with tables, as they were trained or converted.

    Attributes:
        tables: (K, N, H), a parameter, or a buffer of a smaller dtype.
        row_scale: (K, N) float32, the scales of int8 rows, or None.
    """

    scales = ("row_scale",)
    tables: Tensor
    row_scale: Tensor | None

    def store(self, memory: dict[str, Any], shape: tuple[int, int, int]) -> None:
        """Make room for tables of this shape."""
        if memory["tables"] == "trained":
            self.tables = nn.Parameter(torch.zeros(shape))
        else:
            dtype = DTYPES.get(memory["tables"], torch.float32)
            self.register_buffer("tables", torch.zeros(shape, dtype=dtype))
        scales = torch.zeros(shape[:2]) if memory["tables"] == "int8" else None
        self.register_buffer("row_scale", scales)


class LookUp(StoredTables):
    """A look-up in place of a linear layer, D -> `out`.

    Args:
        memory: `config.memory`.
        bits: t; `gain` is the gain of the linear part for so many bits.
    """

    def __init__(
        self, memory: dict[str, Any], width: int, out: int, bits: int, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.rule = HashRule(memory, width, bits, memory["gain"][str(bits)])
        shape = (self.rule.count, 2**bits, out)
        self.store(memory, shape)
        self.linear = None
        if memory["linear"]:
            self.linear = nn.Parameter(torch.zeros(shape[0], bits, out))
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self._folded: tuple[Any, Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """As in torch; folded tables are forgotten."""
        self._folded = None
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """As in torch; folded tables are forgotten."""
        self._folded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H)."""
        tables, linear = self.tables, self.linear
        if linear is None or self.training or torch.is_grad_enabled():
            return self.rule(x, tables, self.bias, linear, self.row_scale)
        # a tensor that was made in inference mode does not count its changes
        if tables.is_inference() or linear.is_inference():
            return self.rule(x, tables, self.bias, linear)
        # folded once for the same parameters
        state = [(p.data_ptr(), p._version) for p in (tables, linear)]
        if self._folded is None or self._folded[0] != state:
            self._folded = (state, self.rule.fold(tables, linear))
        return self.rule(x, self._folded[1], self.bias)


def build_norm(memory: dict[str, Any], width: int) -> nn.Module:
    """The normalisation before a hash."""
    return nn.LayerNorm(width) if memory["norm"] == "layer" else nn.RMSNorm(width)


def hidden_width(memory: dict[str, Any], width: int) -> int:
    """Width between the two look-ups of a feed-forward network."""
    wide = memory["bits"] + memory["delta"]
    # folders of earlier versions do not have it
    return memory.get("ffn_embed_dim") or wide * -(-width // memory["bits"])


class LookUpFFN(nn.Module):
    """Two look-ups with a normalisation between them, in place of a feed-forward network."""

    def __init__(self, config: EvoMoEConfig, width: int) -> None:
        super().__init__()
        memory, wide = config.memory, hidden_width(config.memory, width)
        self.first = LookUp(memory, width, wide, memory["bits"])
        self.norm = build_norm(memory, wide)
        self.second = LookUp(memory, wide, width, memory["bits"] + memory["delta"])
        self.dropout = config.activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        h = F.dropout(self.norm(self.first(x)), self.dropout, training=self.training)
        return self.second(h)


HASHES = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
"""Odd constants, those of Weyl sequences and of xxHash; one per table of n-grams."""


class Ngrams(StoredTables):
    """Rows that are found by hashes of the ids of the last n tokens, and added to the input."""

    def __init__(self, memory: dict[str, Any], width: int, pad: int) -> None:
        super().__init__()
        self.length, self.pad, self.factor = memory["ngram"], pad, math.sqrt(width)
        shape = (len(HASHES), memory["ngram_rows"], width // len(HASHES))
        self.store(memory, shape)

    def forward(self, ids: Tensor, before: Tensor | None) -> Tensor:
        """(B, L) -> (B, L, D); `before` are the ids before them, (B, n - 1), or None."""
        if before is None:
            before = ids.new_full((len(ids), self.length - 1), self.pad)
        padded = torch.cat([before, ids], 1)
        parts = []
        for k, mix in enumerate(HASHES):
            factor = mix - 2**64 if mix >= 2**63 else mix
            code = torch.zeros_like(ids)
            for back in range(self.length):
                end = padded.size(1) - back
                code = (code ^ padded[:, end - ids.size(1) : end]) * factor
                code = code ^ ((code >> 29) & (2**35 - 1))
            rows = (code & (2**62 - 1)) % self.tables.size(1)
            part = F.embedding(rows, self.tables[k])
            parts.append(part if self.row_scale is None else part * self.row_scale[k][rows, None])
        return torch.cat(parts, -1) * self.factor
