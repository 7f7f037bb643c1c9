"""Look-up layers in place of linear layers (MemoryFormer, arXiv 2411.12992).

Letters: D input width, H output width, K tables, t bits per table (tau), N = 2^t rows per table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.lookup.score import codes, quantise, score_moment
from fairseq_evomoe.kernels.pages import large_pages
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.usage import current_counts
from fairseq_evomoe.modules.torchscript import NotScriptable


def mark_param_group(tables: nn.Parameter, cfg: MemoryConfig) -> None:
    """Mark tables for a parameter group of their own with `--memory-weight-decay`.

    The marks are those of fairseq's composite optimizer, which copies them to fp32 masters.
    `compat.running.own_weight_decay` makes every other optimizer respect them.
    """
    tables.param_group = "memory"  # type: ignore[attr-defined]
    tables.optim_overrides = {  # type: ignore[attr-defined]
        "optimizer": {"weight_decay": cfg.memory_weight_decay}
    }


@dataclass(frozen=True, kw_only=True)
class HashRule:
    """How a look-up reads its tables: everything about it but the tables themselves.

    Attributes:
        width: D.
        bits: t.
        score: how a row is weighted, `--memory-score`.
        temperature: of the scores `prob` and `abs_prob`.
        scale: what the output is multiplied by, `--memory-lr-scale`.
    """

    width: int
    bits: int
    score: str
    temperature: float
    scale: float

    @property
    def count(self) -> int:
        """K = ceil(D / t)."""
        return -(-self.width // self.bits)

    def slices(self, x: Tensor) -> Tensor:
        """Cut x into the slices to hash, padded with zeros: (..., D) -> (B, K, t)."""
        z = F.pad(x.reshape(-1, self.width), (0, self.count * self.bits - self.width))
        return z.view(-1, self.count, self.bits)

    def look_up(
        self, x: Tensor, tables: Tensor, bias: Tensor | None, row_scale: Tensor | None = None
    ) -> Tensor:
        """y = sum_k p(z_k) T_k[code(z_k)] + b: x (..., D) -> (..., H), dtype of x."""
        y = lookup(
            self.slices(x),
            tables,
            score=self.score,
            temperature=self.temperature,
            row_scale=row_scale,
        )
        if self.scale != 1:
            y = y * self.scale
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.size(-1))


class MemoryLayer(NotScriptable):
    """y = sum_k p(z_k) T_k[code(z_k)] + b, where z_k is the k-th slice of t values of x (eq. 11).

    K = ceil(D / t), and x is padded with zeros if t does not divide D. The input should be
    normalised, so that every bit is set about half of the time (section 2.4).

    The tables are drawn so that, for standard normal inputs, the output has the same scale as that
    of `nn.Linear`: their standard deviation is rms(y) / (sqrt(K) rms(p)) with rms(y) = 1 / sqrt(3).
    With `--memory-lr-scale` s they are stored divided by s and multiplied by s in the forward pass.
    Under Adam, whose step does not depend on the scale of a parameter, this makes the learning rate
    of the tables s times as large, in any optimizer layout.

    Args:
        width: D.
        out: H.
        cfg: the flags, which give bits, score, temperature and scale.
        bits: t, or 0 to use `--memory-bits`.
        bias: whether to add b, which starts at 0.
    """

    tables: Tensor
    row_scale: Tensor | None

    def __init__(
        self, width: int, out: int, cfg: MemoryConfig, *, bits: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.rule = HashRule(
            width=width,
            bits=bits or cfg.memory_bits,
            score=str(cfg.memory_score),
            temperature=cfg.memory_temperature,
            scale=cfg.memory_lr_scale,
        )
        count, t = self.rule.count, self.rule.bits
        moment = score_moment(self.rule.score, t, self.rule.temperature)
        std = 1 / math.sqrt(3 * count) / moment / self.rule.scale
        tables = torch.randn(count, 2**t, out) * std
        self.converted = cfg.memory_tables != "trained"
        self.register_buffer("row_scale", None)
        if cfg.memory_tables == "int8":
            small, self.row_scale = quantise(tables)
            self.register_buffer("tables", small)
        elif cfg.memory_tables == "bf16":
            self.register_buffer("tables", tables.bfloat16())
        else:
            self.tables = nn.Parameter(tables)
            mark_param_group(self.tables, cfg)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        large_pages(self.tables, now=True)

    def extra_repr(self) -> str:
        k, n, h = self.tables.shape
        return f"width={self.rule.width}, tables={k}, rows={n}, out={h}, score={self.rule.score}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MemoryLayer":
        """Move or cast as torch does, but keep the scales of int8 rows in float32.

        On a CPU the tables lie in large pages, in which random rows are found faster.
        """
        exact = self.row_scale
        super()._apply(fn, recurse)
        if exact is not None and self.row_scale is not None:
            self.row_scale = exact.to(self.row_scale.device)
        large_pages(self.tables, now=True)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H), dtype of x."""
        self.refuse_tracing()
        if self.training and self.converted:
            raise ValueError(
                "--memory-tables bf16 and int8 are for inference; train the checkpoint that "
                "evomoe-export made them from"
            )
        counts = current_counts()
        if counts is not None and not self.training:
            counts.add(self, codes(self.rule.slices(x)), self.tables.size(1))
        return self.rule.look_up(x, self.tables, self.bias, self.row_scale)


def build_norm(cfg: MemoryConfig, width: int) -> nn.Module:
    """Build the normalisation before a hash, as `--memory-norm` says."""
    return nn.LayerNorm(width) if cfg.memory_norm == "layer" else nn.RMSNorm(width)


class MemoryFFN(nn.Module):
    """A feed-forward network of two look-ups without activation (section 2.4, the Memory Block).

    x -> look-up of t bits, width (t + delta) K -> norm -> look-up of t + delta bits, width D. What
    a dense FFN gains by its hidden width, this one gains by `--memory-delta` more bits. The input
    is the layer's normalised state.

    Args:
        width: D, of input and output.
        cfg: the flags.
        dropout: dropout probability of the hidden values during training.
    """

    def __init__(self, width: int, cfg: MemoryConfig, *, dropout: float = 0.0) -> None:
        super().__init__()
        wide = cfg.memory_bits + cfg.memory_delta
        count = -(-width // cfg.memory_bits)
        self.first = MemoryLayer(width, wide * count, cfg)
        self.norm = build_norm(cfg, wide * count)
        self.second = MemoryLayer(wide * count, width, cfg, bits=wide)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        h = self.norm(self.first(x))
        return self.second(F.dropout(h, self.dropout, training=self.training))
