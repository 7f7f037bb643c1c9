"""Look-up layers in place of linear layers (MemoryFormer, arXiv 2411.12992).

Letters: D input width, H output width, K tables, t bits per table (tau), N = 2^t rows per table.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.lookup.linear_part import parts
from fairseq_evomoe.kernels.lookup.score import codes
from fairseq_evomoe.kernels.pages import large_pages
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.rule import HashRule, Tables
from fairseq_evomoe.memory.spawning import Spawning, with_grads_of_idle
from fairseq_evomoe.memory.storage import StoredTables
from fairseq_evomoe.memory.usage import current_counts


class MemoryLayer(Spawning, StoredTables):
    """y = sum_k p(z_k) T_k[code(z_k)] + b, where z_k is the k-th slice of t values of x (eq. 11).

    K = ceil(D / t), and x is padded with zeros if t does not divide D. The input should be
    normalised, so that every bit is set about half of the time (section 2.4).

    The tables are drawn so that, for standard normal inputs, the output has the same scale as that
    of `nn.Linear`: their standard deviation is rms(y) / (sqrt(K) rms(p)) with rms(y) = 1 / sqrt(3).
    With `--memory-lr-scale` s they are stored divided by s and multiplied by s in the forward pass.
    Under Adam, whose step does not depend on the scale of a parameter, this makes the learning rate
    of the tables s times as large, in any optimizer layout. With `--memory-linear` a table is the
    sum of rows and of a linear part in the units of a dense layer's weights, whose rate is `--lr`.

    With `--memory-spawn-update` the layer is dense at first: it multiplies its input by the linear
    part, which is initialised like `nn.Linear`'s weights. When it becomes a look-up, the linear
    part stays and keeps the optimizer's moments, and the rows, which were 0, are fitted.

    Args:
        width: D.
        out: H.
        cfg: the flags, which give bits, score, temperature and scale.
        bits: t, or 0 to use `--memory-bits`.
        bias: whether to add b, which starts at 0.
    """

    linear: nn.Parameter | None

    def __init__(
        self, width: int, out: int, cfg: MemoryConfig, *, bits: int | None = None, bias: bool = True
    ) -> None:
        super().__init__()
        self.rule = HashRule.from_flags(width, bits or cfg.memory_bits, cfg)
        drawn = self.rule.draw(out, cfg)
        self.store(drawn.rows, cfg)
        self.linear = None if drawn.linear is None else nn.Parameter(drawn.linear)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None
        self._folded: tuple[Any, Tensor] | None = None
        if cfg.memory_spawn_update:
            assert self.linear is not None, "MemoryConfig.check"
            nn.init.normal_(self.linear, std=1 / math.sqrt(3 * width))
            nn.init.zeros_(self.tables)
            self.begin_dense()

    def dense_weight(self) -> Tensor:
        """What the linear part multiplies an input by as a dense layer, (H, D)."""
        assert self.linear is not None, "a layer that is dense at first has a linear part"
        return self.linear.reshape(-1, self.linear.size(-1))[: self.rule.width].t()

    def extra_repr(self) -> str:
        k, n, h = self.tables.shape
        return f"width={self.rule.width}, tables={k}, rows={n}, out={h}, score={self.rule.score}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch; folded tables are forgotten."""
        self._folded = None
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        """As in torch; folded tables are forgotten."""
        self._folded = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}

    def weights(self) -> Tables:
        """What the layer reads, as it is trained."""
        return Tables(self.tables, self.bias, self.linear, self.row_scale)

    def _weights_at_once(self) -> Tables:
        """The same for inference, with the linear part folded in, once for the same parameters."""
        weights = self.weights()
        if weights.linear is None or self.training or torch.is_grad_enabled():
            return weights
        both = (weights.rows, weights.linear)
        # a tensor that was made in inference mode does not count its changes
        if torch.compiler.is_compiling() or any(p.is_inference() for p in both):
            return weights
        state = [(p.data_ptr(), p._version) for p in both]
        kept = self._folded
        if kept is None or kept[0] != state:
            whole = self.rule.fold(weights).rows
            large_pages(whole, now=True)
            self._folded = kept = (state, whole)
        return weights._replace(rows=kept[1], linear=None)

    @torch.no_grad()
    def whole_tables(self) -> Tensor:
        """The tables as a look-up uses them, scale and linear part included: (K, N, H) float32."""
        return self.rule.fold(self.weights()).rows.float() * self.rule.scale

    @torch.no_grad()
    def fill(self, whole: Tensor, bias: Tensor | None = None) -> None:
        """Fill the layer with the tables that a look-up should use, the inverse of `whole_tables`.

        With a linear part, the rows are only what that cannot express.

        Args:
            whole: (K, N, H).
            bias: (H,), or None to leave the bias as it is.
        """
        if self.linear is not None:
            whole, linear = parts(whole.float(), self.rule.gain)
            self.linear.copy_(linear)
        self.tables.copy_(whole / self.rule.scale)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., H), dtype of x."""
        self.refuse_tracing()
        if self.is_dense:
            return with_grads_of_idle(F.linear(x, self.dense_weight(), self.bias), self.tables)
        self.refuse_training()
        counts = current_counts()
        if counts is not None and not self.training:
            counts.add(self, codes(self.rule.slices(x)), self.tables.size(1))
        return self.rule.look_up(x, self._weights_at_once(), training=self.training)


def build_norm(cfg: MemoryConfig, width: int) -> nn.Module:
    """Build the normalisation before a hash, as `--memory-norm` says."""
    return nn.LayerNorm(width) if cfg.memory_norm == "layer" else nn.RMSNorm(width)


class MemoryFFN(Spawning):
    """A feed-forward network of two look-ups without activation (section 2.4, the Memory Block).

    x -> look-up of t bits, width (t + delta) K -> norm -> look-up of t + delta bits, width D. What
    a dense FFN gains by its hidden width, this one gains by `--memory-delta` more bits, or by more
    tables in the second look-up with a hidden width of its own (`--memory-ffn-embed-dim`), which
    is not in the paper. The input is the layer's normalised state.

    With `--memory-spawn-update` it is the dense network FC2 act(FC1 x) at first.

    Args:
        width: D, of input and output.
        cfg: the flags.
        dropout: dropout probability of the hidden values during training.
        fc1, fc2, activation: of the dense network, if it is dense at first.
    """

    def __init__(
        self,
        width: int,
        cfg: MemoryConfig,
        *,
        dropout: float = 0.0,
        fc1: nn.Linear | None = None,
        fc2: nn.Linear | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        late = bool(cfg.memory_spawn_update)
        # the look-ups stand in the place of the whole network, and not of a linear map each
        cfg = replace(cfg, memory_spawn_update=0)
        hidden, bits = cfg.hidden_width(width), cfg.memory_bits + cfg.memory_delta
        self.first = MemoryLayer(width, hidden, cfg)
        self.norm = build_norm(cfg, hidden)
        self.second = MemoryLayer(hidden, width, cfg, bits=bits)
        self.dropout = dropout
        if late:
            assert fc1 is not None and fc2 is not None and activation is not None
            self.fc1, self.fc2, self.activation = fc1, fc2, activation
            self.begin_dense()

    def _set_dense(self, is_dense: bool) -> None:
        super()._set_dense(is_dense)
        # they do not run, and nothing is counted for them
        self.first.is_dense = self.second.is_dense = is_dense

    def dense(self, x: Tensor) -> Tensor:
        """FC2 act(FC1 x), the network of the beginning: (..., D) -> (..., D)."""
        h = F.dropout(self.activation(self.fc1(x)), self.dropout, training=self.training)
        return self.fc2(h)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        look_ups = (self.first, self.norm, self.second)
        if self.is_dense:
            return with_grads_of_idle(
                self.dense(x), *(p for part in look_ups for p in part.parameters())
            )
        h = self.norm(self.first(x))
        y = self.second(F.dropout(h, self.dropout, training=self.training))
        if not self.was_dense:
            return y
        return with_grads_of_idle(y, *self.fc1.parameters(), *self.fc2.parameters())


class MemoryBesideFFN(nn.Module):
    """A dense feed-forward network with a look-up beside it: FC2 act(FC1 x) + look-up(x).

    The look-up maps D to D and starts at 0, so that the model starts as the dense one. Neither
    paper has it; tables beside dense networks are what MeKi (arXiv 2602.03359) found to pay best.

    Args:
        fc1, fc2: the dense linear maps D -> F -> D.
        cfg: the flags.
        activation: between the linear maps.
        dropout: dropout probability of the dense network's hidden values during training.
    """

    def __init__(
        self,
        fc1: nn.Linear,
        fc2: nn.Linear,
        cfg: MemoryConfig,
        *,
        activation: Callable[[Tensor], Tensor],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        self.activation, self.dropout = activation, dropout
        # what is drawn here is not used: the rest of the model draws what the dense one draws
        with torch.random.fork_rng(devices=[]):
            self.beside = MemoryLayer(fc1.in_features, fc2.out_features, cfg, bias=False)
        for p in self.beside.parameters():
            nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        h = F.dropout(self.activation(self.fc1(x)), self.dropout, training=self.training)
        return self.fc2(h) + self.beside(x)
