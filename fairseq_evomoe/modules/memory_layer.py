"""Look-up layers in place of linear ones (MemoryFormer, arXiv 2411.12992).

Letters: D input width, H output width, K tables, t bits a table (tau), N = 2^t rows a table.
"""

import math

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.lookup import codes, lookup, patterns, quantise, score_moment
from fairseq_evomoe.kernels.pages import large_pages
from fairseq_evomoe.memory_config import MemoryConfig


def own_group(tables: nn.Parameter, cfg: MemoryConfig) -> None:
    """Mark tables for a parameter group with `--memory-weight-decay`.

    The marks are those of fairseq's composite optimizer, which copies them to fp32 masters;
    `compat.running.own_weight_decay` makes every other optimizer heed them.
    """
    tables.param_group = "memory"  # type: ignore[attr-defined]
    tables.optim_overrides = {  # type: ignore[attr-defined]
        "optimizer": {"weight_decay": cfg.memory_weight_decay}
    }


class MemoryLayer(nn.Module):
    """y = sum_k p(z_k) T_k[code(z_k)] + b, z_k the k-th slice of t values of x (eq. 11).

    K = ceil(D / t); a width that t does not divide is filled up with zeros. The input should be
    normalised, so that every bit is set about half of the time (section 2.4).

    The tables are drawn so that for standard normal inputs the output has the scale of
    `nn.Linear`'s: standard deviation rms(y) / (sqrt(K) rms(p)), rms(y) = 1 / sqrt(3). With
    `--memory-lr-scale` s they are stored divided by s and multiplied by it in the forward pass:
    under Adam, whose step does not know the scale of a parameter, that is a learning rate s times
    as large for the tables, in any optimizer layout.

    Args:
        width: D.
        out: H.
        cfg: the flags: bits, score, temperature, scale.
        bits: t where it is not the flags'.
        bias: whether there is a b, 0 at first.
    """

    tables: Tensor
    row_scale: Tensor | None
    counting = False
    hits: Tensor | None = None

    def __init__(
        self, width: int, out: int, cfg: MemoryConfig, *, bits: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.bits = bits or cfg.memory_bits
        self.count = -(-width // self.bits)
        self.score, self.temperature = cfg.memory_score, cfg.memory_temperature
        self.scale = cfg.memory_lr_scale
        self.width = width
        moment = score_moment(self.score, self.bits, self.temperature)
        std = 1 / math.sqrt(3 * self.count) / moment / self.scale
        tables = torch.randn(self.count, 2**self.bits, out) * std
        self.converted = cfg.memory_tables != "trained"
        self.register_buffer("row_scale", None)
        if cfg.memory_tables == "int8":
            small, self.row_scale = quantise(tables)
            self.register_buffer("tables", small)
        elif cfg.memory_tables == "bf16":
            self.register_buffer("tables", tables.bfloat16())
        else:
            self.tables = nn.Parameter(tables)
            own_group(self.tables, cfg)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def extra_repr(self) -> str:
        k, n, h = self.tables.shape
        return f"width={self.width}, tables={k}, rows={n}, out={h}, score={self.score}"

    def train(self, mode: bool = True) -> "MemoryLayer":
        """As torch's; on a CPU the tables move to large pages: random rows are found faster."""
        large_pages(self.tables, now=True)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H), dtype of x."""
        if self.training and self.converted:
            raise ValueError(
                "--memory-tables bf16 and int8 are for inference: train the checkpoint that "
                "evomoe-export made them from"
            )
        z = self.slices(x)
        if self.counting:
            self._count(codes(z))
        y = lookup(
            z,
            self.tables,
            score=self.score,
            temperature=self.temperature,
            row_scale=self.row_scale,
        )
        if self.scale != 1:
            y = y * self.scale
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], y.size(-1))

    def slices(self, x: Tensor) -> Tensor:
        """What is hashed: (..., D) -> (B, K, t), filled up with zeros."""
        z = F.pad(x.reshape(-1, self.width), (0, self.count * self.bits - self.width))
        return z.view(-1, self.count, self.bits)

    def _count(self, rows: Tensor) -> None:
        """Add the rows (B, K) of a batch to `hits`, (K, N); see `buckets.counting`."""
        k, n = self.tables.shape[:2]
        flat = (rows + torch.arange(k, device=rows.device) * n).flatten()
        hits = torch.bincount(flat, minlength=k * n).view(k, n).double()
        self.hits = hits if self.hits is None else self.hits + hits


@torch.no_grad()
def load_official(layer: MemoryLayer, tables: Tensor, bias: Tensor | None = None) -> None:
    """Fill a layer with weights of MemoryFormer's official code.

    There the first value of a slice is the highest bit of a row's number, here (and in eq. 4) the
    lowest, so the rows of each table change places. Its score is `abs_prob` at temperature 1; it
    counts z = 0 as positive on GPUs, as here, and as negative on CPUs.

    Args:
        layer: receives the weights.
        tables: (K N, H) or (K, N, H), any float dtype.
        bias: (H,).

    Raises:
        ValueError: sizes or the layer's score differ.
    """
    if (layer.score, layer.temperature) != ("abs_prob", 1.0):
        raise ValueError(
            f"--memory-score {layer.score}: the official weights were trained with abs_prob at "
            "--memory-temperature 1"
        )
    if tables.numel() != layer.tables.numel() or tables.size(-1) != layer.tables.size(-1):
        raise ValueError(
            f"tables {tuple(tables.shape)} do not fit {tuple(layer.tables.shape)}: --memory-bits "
            "or the widths differ"
        )
    reversed_rows = (patterns(layer.bits) << torch.arange(layer.bits).flip(0)).sum(-1)
    stacked = tables.view(layer.tables.shape)
    layer.tables.copy_(stacked[:, reversed_rows] / layer.scale)
    if layer.bias is not None:
        layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)


def build_norm(cfg: MemoryConfig, width: int) -> nn.Module:
    """The normalisation before a hash: `--memory-norm`."""
    return nn.LayerNorm(width) if cfg.memory_norm == "layer" else nn.RMSNorm(width)


class MemoryFFN(nn.Module):
    """A feed-forward network of two look-ups, no activation (section 2.4, the Memory Block).

    x -> look-up of t bits, width (t + delta) K -> norm -> look-up of t + delta bits, width D. What
    a dense FFN gains by hidden width this gains by `--memory-delta` more bits. The input is the
    layer's normalised state.

    Args:
        width: D, of input and output.
        cfg: the flags.
        dropout: on the hidden values, while training.
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


class MemoryAttention(MultiheadAttention):
    """fairseq's attention with look-ups for its projections (eq. 13).

    Self-attention hashes its input once and reads queries, keys and values from one table of width
    3 D; attention over an encoder hashes the encoder's output once for keys and values, which
    incremental decoding then keeps. The output projection is `--memory-out-proj`: none (the paper),
    dense or memory.

    Args:
        cfg: the flags.
        as for fairseq's `MultiheadAttention` otherwise.
    """

    def __init__(self, *args, cfg: MemoryConfig, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # fairseq's fast path reads weight matrices, which there are none of
        self.skip_embed_dim_check = True
        linear = {n: self._modules.pop(n) for n in ("q_proj", "k_proj", "v_proj", "out_proj")}
        width = self.embed_dim
        if self.self_attention:
            self.qkv = MemoryLayer(width, 3 * width, cfg)
        else:
            if self.kdim != self.vdim:
                raise ValueError("--memory-attention: keys and values must have one width")
            self.q = MemoryLayer(width, width, cfg)
            self.kv = MemoryLayer(self.kdim, 2 * width, cfg)
        self.out: nn.Module
        if cfg.memory_out_proj == "memory":
            self.out_norm = build_norm(cfg, width)
            self.out = MemoryLayer(width, width, cfg)
        elif cfg.memory_out_proj == "dense":
            self.out = linear["out_proj"]
        self.projects = cfg.memory_out_proj
        self._held = torch.empty(0)

    def reset_parameters(self) -> None:
        """The linear maps that fairseq would draw are not kept."""

    # fairseq's forward pass calls these in this order, each with what it projects

    def q_proj(self, query: Tensor) -> Tensor:
        if not self.self_attention:
            return self.q(query)
        self._held = self.qkv(query)
        return self._held[..., : self.embed_dim].clone()

    def k_proj(self, key: Tensor) -> Tensor:
        if not self.self_attention:
            self._held = self.kv(key)
            return self._held[..., : self.embed_dim]
        return self._held[..., self.embed_dim : 2 * self.embed_dim]

    def v_proj(self, value: Tensor) -> Tensor:
        held, self._held = self._held, torch.empty(0)
        return held[..., -self.embed_dim :]

    def out_proj(self, attended: Tensor) -> Tensor:
        if self.projects == "none":
            return attended
        return self.out(self.out_norm(attended) if self.projects == "memory" else attended)
