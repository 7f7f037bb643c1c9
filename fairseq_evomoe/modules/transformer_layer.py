"""fairseq's Transformer layers with another feed-forward network in place.

fairseq computes fc2(dropout(activation(fc1(x)))). Here `fc1` names the whole replacement and the
other three steps do nothing, so fairseq's own forward passes, with every option of attention,
normalisation and incremental decoding, run unchanged.
"""

from typing import Any

from fairseq.distributed import fsdp_wrap
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_evomoe.modules.ffn import build_ffn, identity
from fairseq_evomoe.modules.memory_layer import MemoryAttention
from fairseq_evomoe.modules.moe_layer import EvoMoELayer
from fairseq_evomoe.modules.plan import TokenBatch


class _ReplaceFFN(nn.Module):
    """Mixin: build the layer as fairseq does, then put `build_ffn`'s module in its FFN's place."""

    side: str
    fc1: Any
    fc2: Any
    activation_fn: Any
    activation_dropout_module: Any

    def __init__(
        self, cfg: Any, index: int, *args: Any, dictionary: Any = None, **kwargs: Any
    ) -> None:
        self._index = index
        self._moe, self._memory = cfg.moe, cfg.memory
        super().__init__(cfg, *args, **kwargs)
        dropout = self.activation_dropout_module.p
        ffn = build_ffn(
            cfg.moe,
            cfg.memory,
            self.side,
            index,
            fc1=self.fc1,
            fc2=self.fc2,
            activation=self.activation_fn,
            dropout=dropout,
            dictionary=dictionary,
        )
        if ffn is None:
            return
        del self.fc1, self.fc2
        setattr(self, "moe_layer" if isinstance(ffn, EvoMoELayer) else "memory_ffn", ffn)
        # an alias outside nn.Module's registry: the parameters have one name, `moe_layer.*`
        object.__setattr__(self, "fc1", ffn)
        object.__setattr__(self, "fc2", identity)
        self.activation_fn = identity
        self.activation_dropout_module = nn.Identity()

    def _width(self, dense: int) -> int:
        if self._moe.is_moe_layer(self.side, self._index):
            return self._moe.moe_expert_ffn_dim or dense
        return dense

    def _attention(self, width: int, heads: int, cfg: Any, **kwargs: Any) -> nn.Module:
        return MemoryAttention(
            width, heads, dropout=cfg.attention_dropout, cfg=self._memory, **kwargs
        )

    @property
    def _looks_up(self) -> bool:
        return self._memory.memory_attention and self._memory.at(self._index)

    def build_fc1(self, input_dim, output_dim, q_noise, qn_block_size):
        return super().build_fc1(input_dim, self._width(output_dim), q_noise, qn_block_size)

    def build_fc2(self, input_dim, output_dim, q_noise, qn_block_size):
        return super().build_fc2(self._width(input_dim), output_dim, q_noise, qn_block_size)


class EncoderLayer(_ReplaceFFN, TransformerEncoderLayerBase):
    side = "encoder"

    def build_self_attention(self, embed_dim, cfg):
        if not self._looks_up:
            return super().build_self_attention(embed_dim, cfg)
        return self._attention(embed_dim, cfg.encoder.attention_heads, cfg, self_attention=True)


class DecoderLayer(_ReplaceFFN, TransformerDecoderLayerBase):
    side = "decoder"

    def build_self_attention(self, embed_dim, cfg, add_bias_kv=False, add_zero_attn=False):
        if not self._looks_up:
            return super().build_self_attention(embed_dim, cfg, add_bias_kv, add_zero_attn)
        return self._attention(
            embed_dim,
            cfg.decoder.attention_heads,
            cfg,
            self_attention=True,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
        )

    def build_encoder_attention(self, embed_dim, cfg):
        if not self._looks_up:
            return super().build_encoder_attention(embed_dim, cfg)
        width = cfg.encoder.embed_dim
        return self._attention(
            embed_dim,
            cfg.decoder.attention_heads,
            cfg,
            kdim=width,
            vdim=width,
            encoder_decoder_attention=True,
        )


class LayerStack(nn.Module):
    """Mixin for encoders and decoders: numbers the layers, hands token ids to those that route."""

    padding_idx: int
    _built = 0

    def next_index(self) -> int:
        """Number of the layer being built: fairseq's builders are not told."""
        self._built += 1
        return self._built - 1

    def hand_down(self, ids: Tensor) -> None:
        """Tell the MoE layers which tokens, (B, L) int64, the coming states belong to."""
        if not hasattr(self, "_moe_layers"):
            self._moe_layers = [m for m in self.modules() if isinstance(m, EvoMoELayer)]
        if self._moe_layers:
            batch = TokenBatch(ids, self.padding_idx)
            for layer in self._moe_layers:
                layer.tokens = batch


def wrap(layer: nn.Module, cfg: Any) -> nn.Module:
    """Apply `--checkpoint-activations`, `--offload-activations` and FSDP as fairseq does."""
    if cfg.checkpoint_activations:
        layer = checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    # under checkpointing FSDP wraps every layer, whatever its size
    min_params = 0 if cfg.checkpoint_activations else cfg.min_params_to_wrap
    return fsdp_wrap(layer, min_num_params=min_params)
