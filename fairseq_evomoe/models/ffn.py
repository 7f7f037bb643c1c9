"""The one place that decides what replaces a layer's feed-forward network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.experts import MemoryBank
from fairseq_evomoe.memory.layer import MemoryBesideFFN, MemoryFFN
from fairseq_evomoe.modules.experts import Bank, ExpertBank
from fairseq_evomoe.modules.gates import GATES, GateContext
from fairseq_evomoe.modules.moe_layer import EvoMoELayer, layer_seed
from fairseq_evomoe.parallel.mesh import shard_of_layer


@dataclass(frozen=True, kw_only=True)
class DenseFFN:
    """The feed-forward network that a dense model has in a layer.

    Attributes:
        fc1, fc2: its linear maps D -> F -> D.
        activation: between them.
        dropout: dropout probability of hidden units during training.
    """

    fc1: nn.Linear
    fc2: nn.Linear
    activation: Callable[[Tensor], Tensor]
    dropout: float = 0.0


def replaces_ffn(moe: MoEConfig, memory: MemoryConfig, side: str, index: int) -> bool:
    """Whether layer `index` (from 0) of "encoder" or "decoder" has more than a dense FFN."""
    return moe.is_moe_layer(side, index) or (memory.memory_ffn and memory.covers(index))


def build_ffn(
    moe: MoEConfig,
    memory: MemoryConfig,
    side: str,
    index: int,
    *,
    dense: DenseFFN,
    dictionary: Any = None,
) -> nn.Module:
    """Build what replaces the FFN of layer `index` of `side`, where `replaces_ffn` says so.

    Args:
        side: "encoder" or "decoder".
        dense: what a dense model would use; it becomes the base expert of an MoE layer.
        dictionary: dictionary of the layer's tokens, for gates that route by token id.
    """
    if moe.is_moe_layer(side, index):
        return build_moe_layer(
            moe,
            memory,
            f"{side}.{index}",
            dense=dense,
            causal=side == "decoder",
            dictionary=dictionary,
        )
    if memory.memory_parallel:
        return MemoryBesideFFN(
            *(dense.fc1, dense.fc2, memory), activation=dense.activation, dropout=dense.dropout
        )
    before: dict[str, Any] = {}
    if memory.memory_spawn_update:
        before = {"fc1": dense.fc1, "fc2": dense.fc2, "activation": dense.activation}
    return MemoryFFN(dense.fc1.in_features, memory, dropout=dense.dropout, **before)


def build_moe_layer(
    moe: MoEConfig,
    memory: MemoryConfig | None,
    name: str,
    *,
    dense: DenseFFN,
    causal: bool = False,
    dictionary: Any = None,
) -> EvoMoELayer:
    """Build gate, experts and the layer around them.

    Args:
        memory: flags of look-ups, for `--moe-expert-type memory`.
        name: unique within the model, for example "encoder.1"; part of every seed.
        dense: becomes the base expert.
        causal: whether a position must not depend on later ones.
        dictionary: fairseq's, of the layer's tokens; None if it is unknown.
    """
    width = dense.fc1.in_features
    # `initial_seed` is --seed; reading it leaves the global random stream as in a dense model
    generator = torch.Generator().manual_seed(layer_seed(name, torch.initial_seed()))
    context = GateContext(
        dim=width, name=name, generator=generator, causal=causal, dictionary=dictionary
    )
    gate = GATES[moe.moe_gate](moe, context)
    num_experts = moe.moe_expert_count + int(moe.moe_shared_expert)
    common: dict[str, Any] = {
        "num_experts": num_experts,
        "dropout": dense.dropout,
        "generator": generator,
        "shared": moe.moe_shared_expert,
    }
    experts: Bank
    if moe.moe_expert_type == "memory":
        experts = MemoryBank(width, memory or MemoryConfig(), **common)
    else:
        experts = ExpertBank(dense.fc1, dense.fc2, activation=dense.activation, **common)
        if moe.moe_expert_storage == "int8":
            experts.to_int8()
    shard = shard_of_layer(num_experts, shared=moe.moe_shared_expert)
    if shard is not None:
        if moe.moe_expert_storage == "int8":
            raise ValueError(
                "--moe-expert-storage int8 is for inference on one worker: leave out "
                "--expert-parallel"
            )
        experts.distribute(shard)
    return EvoMoELayer(gate, experts, name=name)


def identity(x: Tensor) -> Tensor:
    """Return x: what remains of an FFN's other steps once a module computes all of it."""
    return x
