"""Matches the look-up layers of a model with the layers of the dense model it was made from.

Letters: B rows, D input width, H output width.
"""

from typing import Any, cast

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import nn

from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.conversion import Unit
from fairseq_evomoe.memory.layer import MemoryLayer


def _projections(name: str, layer: Any, dense: Any, which: str, norm: Any) -> Unit:
    """Pair a look-up with the projections of an attention that it replaces, some of q, k, v."""
    maps = [getattr(dense, f"{x}_proj") for x in which]
    free = lambda x: torch.cat([m(x) for m in maps], -1)
    given = "query" if "q" in which else "key"
    weight = torch.cat([m.weight for m in maps])
    return Unit(name, layer, dense, lambda kw, out: free(kw[given]), free, weight, norm)


def _attention(name: str, ours: Any, dense: Any, norm: Any, over: Any) -> list[Unit]:
    if not isinstance(ours, MemoryAttention):
        return []
    if ours.self_attention:
        units = [_projections(f"{name}.qkv", ours.qkv, dense, "qkv", norm)]
    else:
        units = [
            _projections(f"{name}.q", ours.q, dense, "q", norm),
            _projections(f"{name}.kv", ours.kv, dense, "kv", over),
        ]
    if ours.projects == "memory":
        linear = dense.out_proj
        target = lambda kw, out: out[0]
        look_up = cast(MemoryLayer, ours.out)
        units.append(Unit(f"{name}.out", look_up, dense, target, linear, linear.weight, None))
    return units


def _ffn(name: str, ours: Any, layer: Any, norm: Any) -> Unit:
    free = lambda x: layer.fc2(layer.activation_fn(layer.fc1(x)))
    second = f"{name}.memory_ffn.second"
    return Unit(second, ours.second, layer.fc2, lambda kw, out: out, free, None, norm, ours)


def units(ours: nn.Module, dense: nn.Module) -> list[Unit]:
    """List the look-up layers of `ours` that replace a part of `dense`, in forward order."""
    found: list[Unit] = []
    last: Any = None
    over: Any = None
    for name, layer in ours.named_modules():
        if not isinstance(layer, TransformerEncoderLayerBase | TransformerDecoderLayerBase):
            continue
        counterpart = dense.get_submodule(name)
        first = isinstance(layer, TransformerDecoderLayerBase) and name.endswith(".0")
        if first:
            # attention over the encoder reads the output of the encoder's last norm
            stack = getattr(dense, "encoder", None)
            over = getattr(stack, "layer_norm", None) or last
            last = None
        before = layer.normalize_before
        norm = counterpart.self_attn_layer_norm if before else last
        found += _attention(f"{name}.self_attn", layer.self_attn, counterpart.self_attn, norm, None)
        last = counterpart.self_attn_layer_norm
        if getattr(layer, "encoder_attn", None) is not None:
            norm = counterpart.encoder_attn_layer_norm if before else last
            found += _attention(
                f"{name}.encoder_attn", layer.encoder_attn, counterpart.encoder_attn, norm, over
            )
            last = counterpart.encoder_attn_layer_norm
        if hasattr(layer, "memory_ffn"):
            norm = counterpart.final_layer_norm if before else last
            found.append(_ffn(name, layer.memory_ffn, counterpart, norm))
        last = counterpart.final_layer_norm
    return found
