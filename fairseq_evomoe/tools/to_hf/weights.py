"""Names of weights in fairseq's checkpoints and in exported models, and the way there and back."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

SIDES = (
    ("encoder.sentence_encoder.", "model.encoder."),
    ("encoder.lm_head.", "lm_head."),
    ("decoder.output_projection.", "lm_head."),
    ("encoder.", "model.encoder."),
    ("decoder.", "model.decoder."),
)
"""How names begin in fairseq and in transformers; the first that fits applies."""

OF_BASE_EXPERT = {
    **{"w1": "ffn.fc1.weight", "b1": "ffn.fc1.bias", "w2": "ffn.fc2.weight", "b2": "ffn.fc2.bias"},
    **{"tables1": "memory_ffn.first.tables", "linear1": "memory_ffn.first.linear"},
    **{"bias1": "memory_ffn.first.bias", "tables2": "memory_ffn.second.tables"},
    **{"linear2": "memory_ffn.second.linear", "bias2": "memory_ffn.second.bias"},
    **{"norm_weight": "memory_ffn.norm.weight", "norm_bias": "memory_ffn.norm.bias"},
}
"""A stacked weight of experts -> the weight of a layer that has the base expert alone."""


@dataclass
class Mapped:
    """The weights of a checkpoint, sorted by where they go.

    Attributes:
        model: name in transformers -> tensor.
        origin: name in fairseq -> name in transformers, and the expert that it is, or None if it
            is the whole tensor.
        order: the names in fairseq, in the order of the checkpoint.
        rest: the tensors that an exported model does not need, by their names in fairseq, for the
            way back.
    """

    model: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, tuple[str, int | None]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    rest: dict[str, Tensor] = field(default_factory=dict)


def name_for_hf(name: str) -> str:
    """Name in transformers of a weight that has a counterpart there."""
    if found := re.match(r"classification_heads\.[^.]+\.(.*)", name):
        return f"classifier.{found[1]}"
    start, ours = next((pair for pair in SIDES if name.startswith(pair[0])), ("", ""))
    name = ours + name.removeprefix(start)
    return re.sub(r"(\.layers\.\d+)\.(fc[12]\.)", r"\1.ffn.\2", name)


def to_hf(state: Mapping[str, Tensor], wanted: set[str]) -> Mapped:
    """Sort the tensors of a checkpoint.

    Args:
        state: fairseq's model, name -> tensor.
        wanted: names that the model for transformers has.

    Raises:
        ValueError: the checkpoint lacks a weight that the model has.
    """
    mapped = Mapped(order=list(state))
    for name, value in state.items():
        ours = name_for_hf(name)
        base = re.sub(r"moe_layer\.experts\.(\w+)$", lambda m: OF_BASE_EXPERT.get(m[1], ""), ours)
        if ours in wanted:
            mapped.model[ours] = value
            mapped.origin[name] = (ours, None)
        elif base != ours and base in wanted:
            mapped.model[base] = value[0]
            mapped.origin[name] = (base, 0)
            mapped.rest[name] = value
        else:
            mapped.rest[name] = value
    if missing := sorted(wanted - set(mapped.model)):
        raise ValueError(f"--format hf: the checkpoint has no weight for {', '.join(missing[:5])}")
    return mapped


def from_hf(
    model: Mapping[str, Tensor],
    rest: Mapping[str, Tensor],
    origin: Mapping[str, tuple[str, int | None]],
    order: list[str],
    tied: Mapping[str, str],
) -> dict[str, Tensor]:
    """The checkpoint's tensors in their order, the inverse of `to_hf`.

    Args:
        tied: name in transformers of a weight that the folder does not hold -> the one that it is.

    Raises:
        ValueError: the folder lacks a tensor.
    """
    state = {}
    for name in order:
        ours, expert = origin.get(name, (name, None))
        source = model if name in origin else rest
        ours = ours if ours in source else tied.get(ours, ours)
        if ours not in source:
            raise ValueError(f"the folder lacks the tensor {ours}")
        state[name] = source[ours]
        if expert is not None:
            state[name] = rest[name].clone()
            state[name][expert] = source[ours]
    return state


def contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, as safetensors needs them."""
    return {name: torch.clone(value).contiguous() for name, value in tensors.items()}
