"""Python values as JSON and back, with their types, and what exports keep of a checkpoint so."""

import json
from argparse import Namespace
from pathlib import Path
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


KEPT = ("args", "cfg", "optimizer_history", "task_state")
"""What an export keeps of a checkpoint besides its tensors."""


def kept(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The entries of a checkpoint that exports keep, encoded."""
    return {k: encode(checkpoint[k]) for k in KEPT if k in checkpoint}


def restored(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `kept`; other entries of `values` are left out."""
    return {k: decode(values[k]) for k in KEPT if k in values}


def read(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}")
    return found
