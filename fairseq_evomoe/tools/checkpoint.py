"""What the tools share: reading and writing checkpoints, and whose model a checkpoint holds."""

import argparse
import dataclasses
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf

from fairseq_evomoe import compat
from fairseq_evomoe.config import Flags
from fairseq_evomoe.parallel import shards

EXTRA = "_extra_state"
FAMILIES = {
    TransformerModel: "transformer_evomoe",
    TransformerLanguageModel: "transformer_lm_evomoe",
    RobertaModel: "roberta_evomoe",
}
"""Classes of dense models -> our model of the same family."""


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, under torch's restrictions on what it may contain.

    Raises:
        ValueError: it is no fairseq checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        # torch raises half a dozen kinds, from KeyError and UnpicklingError to OSError
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint, or a damaged one: {first}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of fairseq: it holds no model")
    return shards.resolve(state, path.parent, whole=True)


def build(path: Path, data: str | None) -> tuple[Any, Any, Any]:
    """(model, configuration, task) of a checkpoint, as fairseq's own commands build them.

    Args:
        data: folder with the dictionaries; None: the one named in the checkpoint.
    """
    overrides = {"data": data} if data else None
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    return model, cfg, task


def refuse_existing(path: Path) -> None:
    """Refuse an output before any work is done.

    Raises:
        FileExistsError: `path` exists.
        FileNotFoundError: its folder does not.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten: remove it, or choose another")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.absolute().parent}")


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it at the end, removed after an error.

    Raises:
        FileExistsError, FileNotFoundError: as `refuse_existing`.
    """
    refuse_existing(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Save under a temporary name, then rename: `path` is whole or not there.

    Raises:
        FileExistsError: `path` exists.
    """
    with in_place_of(path) as partial:
        torch.save(checkpoint, partial)


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


def target_model(flags: Any) -> str:
    """Name of our model for the family of a dense one.

    Raises:
        ValueError: the model is of another family.
    """
    cls = model_class(flags)
    ours = cls.__module__.startswith("fairseq_evomoe.")
    for base, name in FAMILIES.items():
        if cls is base or (ours and issubclass(cls, base)):
            return name
    known = ", ".join(c.__name__ for c in FAMILIES)
    raise ValueError(f"{cls.__name__} cannot be converted: only {known} and our own dense models")


def built(flags: Any) -> Any:
    """Flags as `build_model` wants them: fairseq hands dataclass models a DictConfig."""
    return OmegaConf.create(flags) if isinstance(flags, dict) else flags


def command_line(flags: Flags) -> str:
    """The flags that are not at their defaults, as a command line has them."""
    words = []
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if field.name != "_name" and value != field.default:
            flag = "--" + field.name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return " ".join(words)


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
