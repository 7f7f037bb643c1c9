"""Matches the look-up layers of a model with the layers of the dense model it was made from.

Letters: B rows, D input width, H output width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.layer import MemoryFFN, MemoryLayer


@dataclass(frozen=True)
class Unit:
    """One look-up layer and the part of the dense model that it replaces.

    Attributes:
        name: name of the look-up layer.
        layer: the look-up layer.
        source: the dense module whose calls are recorded.
        target: maps (keyword arguments, output) of a call of `source` to the output that the
            look-up should give.
        free: maps any input (B, D) of the dense part to its output, which the look-up should give.
        weight: weights of the linear layers that are replaced, stacked to (H, D), or None for a
            feed-forward network.
        norm: the LayerNorm before the dense part, or None if there is none.
        ffn: the memory FFN whose second half the look-up is, or None.
    """

    name: str
    layer: MemoryLayer
    source: nn.Module
    target: Callable[[dict[str, Any], Any], Tensor]
    free: Callable[[Tensor], Tensor]
    weight: Tensor | None
    norm: nn.Module | None
    ffn: MemoryFFN | None = None


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


class Watch:
    """Collects inputs or outputs of modules by forward hooks.

    `seen[name]` has one tensor per call, with one row per position: (B, D) or (B, H).
    """

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        self.hooks: list[Any] = []

    def _keep(self, name: str, value: Tensor) -> None:
        rows = value.detach().float().reshape(-1, value.size(-1))
        self.seen.setdefault(name, []).append(rows)

    def inputs(self, unit: Unit) -> None:
        hook = lambda module, args: self._keep(unit.name, args[0])
        self.hooks.append(unit.layer.register_forward_pre_hook(hook))

    def outputs(self, unit: Unit) -> None:
        hook = lambda module, args, out: self._keep(unit.name, out)
        self.hooks.append(unit.layer.register_forward_hook(hook))

    def targets(self, unit: Unit) -> None:
        hook = lambda module, args, kw, out: self._keep(unit.name, unit.target(kw, out))
        self.hooks.append(unit.source.register_forward_hook(hook, with_kwargs=True))

    @torch.no_grad()
    def run(self, model: nn.Module, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Run `model` on the samples, remove the hooks, and return name -> collected rows."""
        try:
            for sample in samples:
                model(**sample["net_input"])
        finally:
            for hook in self.hooks:
                hook.remove()
        return {name: torch.cat(rows) for name, rows in self.seen.items()}


def variance_kept(
    ours: nn.Module, made: Sequence[Unit], samples: Sequence[Any], wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Return 1 - |y - y'|^2 / |y - mean y|^2 of each look-up.

    y is the dense layer's output and y' the look-up's output within its model, so that the errors
    of earlier look-ups are included. 1 is an exact match, 0 is no better than the mean.
    """
    watch = Watch()
    for unit in made:
        watch.outputs(unit)
    found = watch.run(ours, samples)
    kept = {}
    for name, y in wanted.items():
        spread = (y - y.mean(0)).square().sum().clamp_min(1e-12)
        kept[name] = float(1 - (found[name] - y).square().sum() / spread)
    return kept
