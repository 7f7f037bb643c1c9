"""The one place that decides what stands in for a layer's feed-forward network."""

from typing import Any

from torch import Tensor, nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory_config import MemoryConfig
from fairseq_evomoe.modules.memory_layer import MemoryFFN
from fairseq_evomoe.modules.moe_layer import EvoMoELayer


def build_ffn(
    moe: MoEConfig,
    memory: MemoryConfig,
    side: str,
    index: int,
    *,
    fc1: nn.Linear,
    fc2: nn.Linear,
    activation,
    dropout: float,
    dictionary: Any = None,
) -> nn.Module | None:
    """The module (L, B, D) -> (L, B, D) for layer `index` of `side`, or None to leave it dense.

    Args:
        side: "encoder" or "decoder".
        fc1, fc2: the linear maps that the dense layer would use.
        activation, dropout: between them.
        dictionary: of the tokens that pass here, for gates that route by identity.
    """
    if not moe.is_moe_layer(side, index):
        if memory.memory_ffn and memory.at(index):
            return MemoryFFN(fc1.in_features, memory, dropout=dropout)
        return None
    return EvoMoELayer(
        fc1,
        fc2,
        cfg=moe,
        memory=memory,
        name=f"{side}.{index}",
        activation=activation,
        dropout=dropout,
        causal=side == "decoder",
        dictionary=dictionary,
    )


def identity(x: Tensor) -> Tensor:
    """What an FFN's remaining steps become once a module computes all of it."""
    return x
