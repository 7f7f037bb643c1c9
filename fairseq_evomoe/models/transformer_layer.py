"""fairseq's Transformer layers with another feed-forward network, and how tokens reach it.

fairseq computes fc2(dropout(activation(fc1(x)))). Here `fc1` runs the whole replacement and the
other three steps do nothing, so that fairseq's own forward passes, with every option of attention,
normalisation and incremental decoding, run unchanged.

The way of the tokens: encoder and decoder say which tokens a forward pass is about (`tokens_of`).
Each layer takes them as an argument when it is called, together with the request for a routing
record, so that `--checkpoint-activations` keeps both for the recomputation. What an MoE layer
records leaves the layer as outputs of its forward pass, which autograd knows, and joins the
caller's `RoutingLog`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fairseq.distributed import fsdp_wrap
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.models.ffn import DenseFFN, build_ffn, identity, replaces_ffn
from fairseq_evomoe.modules.moe_layer import EvoMoELayer
from fairseq_evomoe.modules.plan import TokenBatch
from fairseq_evomoe.modules.records import current_log, recording

_TOKENS: ContextVar[TokenBatch | None] = ContextVar("tokens", default=None)


@contextmanager
def tokens_of(batch: TokenBatch | None) -> Iterator[None]:
    """Within, layers that this thread calls work on the states of `batch`; None means unknown."""
    token = _TOKENS.set(batch)
    try:
        yield
    finally:
        _TOKENS.reset(token)


class _Numbered(nn.Module):
    """Mixin: a layer that knows its number and our flags before fairseq builds its parts."""

    def __init__(self, cfg: Any, index: int, *args: Any, **kwargs: Any) -> None:
        self._index = index
        self._moe, self._memory = cfg.moe, cfg.memory
        super().__init__(cfg, *args, **kwargs)

    def _memory_attention(self, width: int, heads: int, cfg: Any, **kwargs: Any) -> nn.Module:
        return MemoryAttention(
            width, heads, dropout=cfg.attention_dropout, cfg=self._memory, **kwargs
        )

    def _has_memory_attention(self) -> bool:
        return has_memory_attention(self._memory, self._index)


class _ReplacedFFN(_Numbered):
    """Mixin: build the layer as fairseq does, then replace its FFN by `build_ffn`'s module."""

    side: str
    if TYPE_CHECKING:
        # torch.jit, which reads annotations at run time, knows no such types
        activation_fn: Callable[[Tensor], Tensor]
        activation_dropout_module: Any
        moe_layer: EvoMoELayer
        memory_ffn: nn.Module

    def __init__(self, cfg: Any, index: int, *args: Any, dictionary: Any, **kwargs: Any) -> None:
        super().__init__(cfg, index, *args, **kwargs)
        # fairseq has registered its two linear maps under the names of the methods below
        fc1, fc2 = self._modules.pop("fc1"), self._modules.pop("fc2")
        assert isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)
        dense = DenseFFN(
            fc1=fc1,
            fc2=fc2,
            activation=self.activation_fn,
            dropout=self.activation_dropout_module.p,
        )
        ffn = build_ffn(cfg.moe, cfg.memory, self.side, index, dense=dense, dictionary=dictionary)
        self.routes = isinstance(ffn, EvoMoELayer)
        self.add_module("moe_layer" if self.routes else "memory_ffn", ffn)
        self.activation_fn = identity
        self.activation_dropout_module = nn.Identity()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the tokens of the current pass, and hand on what it records."""
        if not self.routes:
            return super().__call__(*args, **kwargs)
        log = current_log()
        output = super().__call__(*args, tokens=_TOKENS.get(), record=log is not None, **kwargs)
        if log is None:
            return output
        *outputs, record, losses = output
        log.records.append(replace(record, losses=losses))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def forward(
        self, *args: Any, tokens: TokenBatch | None = None, record: bool = False, **kwargs: Any
    ) -> Any:
        """fairseq's forward pass; with `record` its outputs, the record and the losses, flat."""
        with tokens_of(tokens):
            if not record:
                return super().forward(*args, **kwargs)  # type: ignore[misc]
            with recording(isolated=True) as log:
                output = super().forward(*args, **kwargs)  # type: ignore[misc]
        (own,) = log.records
        outputs = output if isinstance(output, tuple) else (output,)
        return *outputs, replace(own, losses=own.losses.detach()), own.losses

    def fc1(self, x: Tensor) -> Tensor:
        """The whole feed-forward network, where fairseq expects the first linear map."""
        return self.moe_layer(x, _TOKENS.get()) if self.routes else self.memory_ffn(x)

    def fc2(self, x: Tensor) -> Tensor:
        """Return x: `fc1` has done everything."""
        return x

    def build_fc1(
        self, input_dim: int, output_dim: int, q_noise: float, qn_block_size: int
    ) -> nn.Module:
        width = self._expert_width(output_dim)
        return super().build_fc1(input_dim, width, q_noise, qn_block_size)  # type: ignore[misc]

    def build_fc2(
        self, input_dim: int, output_dim: int, q_noise: float, qn_block_size: int
    ) -> nn.Module:
        width = self._expert_width(input_dim)
        return super().build_fc2(width, output_dim, q_noise, qn_block_size)  # type: ignore[misc]

    def _expert_width(self, dense: int) -> int:
        if self._moe.is_moe_layer(self.side, self._index):
            return self._moe.moe_expert_ffn_dim or dense
        return dense


class _EncoderAttention(_Numbered):
    """Mixin for encoder layers: look-ups for the projections of attention, where flags say so."""

    def build_self_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        if not self._has_memory_attention():
            return super().build_self_attention(embed_dim, cfg)  # type: ignore[misc]
        heads = cfg.encoder.attention_heads
        return self._memory_attention(embed_dim, heads, cfg, self_attention=True)


class _DecoderAttention(_Numbered):
    """The same for decoder layers."""

    def build_self_attention(
        self, embed_dim: int, cfg: Any, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> nn.Module:
        if not self._has_memory_attention():
            return super().build_self_attention(  # type: ignore[misc]
                embed_dim, cfg, add_bias_kv, add_zero_attn
            )
        return self._memory_attention(
            embed_dim,
            cfg.decoder.attention_heads,
            cfg,
            self_attention=True,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
        )

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> nn.Module:
        if not self._has_memory_attention():
            return super().build_encoder_attention(embed_dim, cfg)  # type: ignore[misc]
        width = cfg.encoder.embed_dim
        return self._memory_attention(
            embed_dim,
            cfg.decoder.attention_heads,
            cfg,
            kdim=width,
            vdim=width,
            encoder_decoder_attention=True,
        )


class EncoderLayer(_ReplacedFFN, _EncoderAttention, TransformerEncoderLayerBase):
    """An encoder layer with experts or look-ups in place of its FFN."""

    side = "encoder"


class DecoderLayer(_ReplacedFFN, _DecoderAttention, TransformerDecoderLayerBase):
    """A decoder layer with experts or look-ups in place of its FFN."""

    side = "decoder"


class MemoryAttentionEncoderLayer(_EncoderAttention, TransformerEncoderLayerBase):
    """An encoder layer with look-ups in its attention alone."""


class MemoryAttentionDecoderLayer(_DecoderAttention, TransformerDecoderLayerBase):
    """A decoder layer with look-ups in its attention alone."""


def has_memory_attention(memory: MemoryConfig, index: int) -> bool:
    """Whether the attention of layer `index` (from 0) has look-ups for its projections."""
    return memory.memory_attention and memory.covers(index)


def build_layer(cfg: Any, side: str, index: int, *args: Any, dictionary: Any, **kw: Any) -> Any:
    """Layer `index` of "encoder" or "decoder": fairseq's own class wherever flags change nothing.

    Args:
        args, kw: for fairseq's class.
        dictionary: of the tokens that the layer sees.
    """
    encoder = side == "encoder"
    if replaces_ffn(cfg.moe, cfg.memory, side, index):
        cls: Any = EncoderLayer if encoder else DecoderLayer
        layer = cls(cfg, index, *args, dictionary=dictionary, **kw)
    elif has_memory_attention(cfg.memory, index):
        cls = MemoryAttentionEncoderLayer if encoder else MemoryAttentionDecoderLayer
        layer = cls(cfg, index, *args, **kw)
    else:
        cls = TransformerEncoderLayerBase if encoder else TransformerDecoderLayerBase
        layer = cls(cfg, *args, **kw)
    return wrap_layer(layer, cfg)


def wrap_layer(layer: nn.Module, cfg: Any) -> nn.Module:
    """Apply `--checkpoint-activations`, `--offload-activations` and FSDP as fairseq does."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    # under checkpointing FSDP wraps every layer, whatever its size
    min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
    return fsdp_wrap(layer, min_num_params=min_params)
