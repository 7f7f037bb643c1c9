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
        self._moe = cfg.moe
        super().__init__(cfg, *args, **kwargs)
        dropout = self.activation_dropout_module.p
        moe_layer = build_ffn(
            cfg.moe,
            self.side,
            index,
            fc1=self.fc1,
            fc2=self.fc2,
            activation=self.activation_fn,
            dropout=dropout,
            dictionary=dictionary,
        )
        if moe_layer is None:
            return
        del self.fc1, self.fc2
        self.moe_layer = moe_layer
        # an alias outside nn.Module's registry: the parameters have one name, `moe_layer.*`
        object.__setattr__(self, "fc1", moe_layer)
        object.__setattr__(self, "fc2", identity)
        self.activation_fn = identity
        self.activation_dropout_module = nn.Identity()

    def _width(self, dense: int) -> int:
        if self._moe.is_moe_layer(self.side, self._index):
            return self._moe.moe_expert_ffn_dim or dense
        return dense

    def build_fc1(self, input_dim, output_dim, q_noise, qn_block_size):
        return super().build_fc1(input_dim, self._width(output_dim), q_noise, qn_block_size)

    def build_fc2(self, input_dim, output_dim, q_noise, qn_block_size):
        return super().build_fc2(self._width(input_dim), output_dim, q_noise, qn_block_size)


class EncoderLayer(_ReplaceFFN, TransformerEncoderLayerBase):
    side = "encoder"


class DecoderLayer(_ReplaceFFN, TransformerDecoderLayerBase):
    side = "decoder"


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
