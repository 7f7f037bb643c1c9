"""What the tools share: reading and writing checkpoints, and whose model a checkpoint holds."""

import argparse
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY

from fairseq_evomoe import compat

EXTRA = "_extra_state"


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, under torch's restrictions on what it may contain.

    Raises:
        ValueError: it is no fairseq checkpoint.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of fairseq: it holds no model")
    return state


def refuse_existing(path: Path) -> None:
    """Raises:
    FileExistsError: `path` exists.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten: remove it, or choose another")


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Save under a temporary name, then rename: a killed run leaves no half file.

    Raises:
        FileExistsError: `path` exists.
    """
    refuse_existing(path)
    partial = path.with_name(path.name + ".partial")
    torch.save(checkpoint, partial)
    os.replace(partial, path)


def flags_of(checkpoint: dict[str, Any]) -> Any:
    """The model's flags in a checkpoint: a Namespace, or a dictionary of a dataclass model.

    Raises:
        ValueError: the checkpoint is too old to say.
    """
    cfg = checkpoint.get("cfg")
    if not cfg or "model" not in cfg:
        raise ValueError("the checkpoint has no `cfg`: save it anew with a current fairseq")
    return cfg["model"]


def read_flag(flags: Any, name: str, default: Any = None) -> Any:
    """A flag of a model, however it is stored."""
    get = flags.get if hasattr(flags, "get") else lambda n, d: getattr(flags, n, d)
    return get(name, default)


def with_flags(flags: Any, **changes: Any) -> Any:
    """A copy of a model's flags with some changed."""
    if isinstance(flags, Namespace):
        return Namespace(**{**vars(flags), **changes})
    return {**flags, **changes}


def model_class(flags: Any) -> type:
    """The registered class of a model.

    Raises:
        ValueError: this environment does not know it.
    """
    name = read_flag(flags, "_name") or read_flag(flags, "arch")
    found = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if found is None:
        raise ValueError(f"unknown model {name!r}: import the plugin that registers it")
    return found


def command(
    name: str,
    parser: argparse.ArgumentParser,
    run: Callable[[Namespace], None],
    argv: Sequence[str] | None = None,
) -> None:
    """A console script: parse, mend fairseq, run; errors of the user end in one line."""
    parser.prog = name
    args = parser.parse_args(argv)
    compat.mend()
    try:
        run(args)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{name}: {error}\n")
