"""Python values as JSON and back, with their types."""

from argparse import Namespace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

_TAG = "__python__"


def encode(value: Any) -> Any:
    """Encode plain Python data as JSON, from which `decode` restores equal values and types.

    Raises:
        ValueError: the data holds other types than numbers, text, containers and Namespaces.
    """
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [encode(v) for v in value]}
    if isinstance(value, Namespace):
        return {_TAG: "Namespace", "items": encode(vars(value))}
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value) and _TAG not in value:
            return {k: encode(v) for k, v in value.items()}
        return {_TAG: "dict", "items": [[encode(k), encode(v)] for k, v in value.items()]}
    raise ValueError(f"cannot write a {type(value).__name__} as JSON: {value!r:.80}")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {k: decode(v) for k, v in value.items()}
    if kind == "tuple":
        return tuple(decode(v) for v in value["items"])
    if kind == "Namespace":
        return Namespace(**decode(value["items"]))
    if kind == "dict":
        return {decode(k): decode(v) for k, v in value["items"]}
    raise ValueError(f"the file holds an unknown {_TAG} {kind!r}")
