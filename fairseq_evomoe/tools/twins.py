"""A model of look-ups beside the dense model it was made from: which layer stands for which.

Letters: B rows, D input width, H output width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fairseq_evomoe.modules.memory_layer import MemoryAttention, MemoryFFN, MemoryLayer
from fairseq_evomoe.modules.transformer_layer import DecoderLayer, EncoderLayer


@dataclass(frozen=True)
class Unit:
    """One look-up layer and what it stands for.

    Attributes:
        name: of the layer.
        layer: the look-up.
        source: the dense module that is watched.
        target: (its keyword arguments, its output) -> what the look-up should give.
        free: what the look-up should give for an input (B, D) of its own, dense and undisturbed.
        weight: the linear map that it stands for, (H, D); None for a feed-forward network.
        norm: the LayerNorm before it in the dense model, if there is one.
        ffn: the memory FFN that it is the second half of.
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
    """The look-up for some of the projections q, k, v of an attention."""
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
    """Every look-up layer of `ours` that stands for something in `dense`, in forward order."""
    found: list[Unit] = []
    last: Any = None
    over: Any = None
    for name, layer in ours.named_modules():
        if not isinstance(layer, EncoderLayer | DecoderLayer):
            continue
        twin = dense.get_submodule(name)
        first = layer.side == "decoder" and name.endswith(".0")
        if first:
            # the decoder reads what the encoder's last norm made
            stack = getattr(dense, "encoder", None)
            over = getattr(stack, "layer_norm", None) or last
            last = None
        before = layer.normalize_before
        norm = twin.self_attn_layer_norm if before else last
        found += _attention(f"{name}.self_attn", layer.self_attn, twin.self_attn, norm, None)
        last = twin.self_attn_layer_norm
        if getattr(layer, "encoder_attn", None) is not None:
            norm = twin.encoder_attn_layer_norm if before else last
            found += _attention(
                f"{name}.encoder_attn", layer.encoder_attn, twin.encoder_attn, norm, over
            )
            last = twin.encoder_attn_layer_norm
        if hasattr(layer, "memory_ffn"):
            norm = twin.final_layer_norm if before else last
            found.append(_ffn(name, layer.memory_ffn, twin, norm))
        last = twin.final_layer_norm
    return found


class Watch:
    """Within, `seen[name]` collects rows, (B, H), of what passes a module."""

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
        """What was collected while `model` read the samples: name -> rows."""
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
    """1 - |y - y'|^2 / |y - mean y|^2 of each look-up y' in its place, y the dense layer's output.

    Differences of earlier layers count: 1 is exact, 0 no better than the mean.
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
