"""Functions that the tools share: read and write checkpoints, and identify the model in one."""

import argparse
import dataclasses
import os
import re
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
from fairseq_evomoe.old_names import read_flag, upgrade_checkpoint
from fairseq_evomoe.options import Flags
from fairseq_evomoe.parallel import sharded_files

EXTRA = "_extra_state"
FAMILIES = {
    TransformerModel: "transformer_evomoe",
    TransformerLanguageModel: "transformer_lm_evomoe",
    RobertaModel: "roberta_evomoe",
}
"""Maps each class of dense models to the name of our model of the same family."""


VOCABULARY = (
    r"size mismatch for \S*(?:embed_tokens|output_projection|lm_head)\.weight: .*?\[(\d+), .*?"
    r"\[(\d+), "
)
"""How torch reports that a checkpoint's vocabulary and the model's differ in size."""


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU with `weights_only=True`, torch's limit on its contents.

    Experts that are stored in a folder beside the checkpoint are loaded as well.

    Raises:
        ValueError: the file is not a fairseq checkpoint.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        # torch raises half a dozen kinds of errors, from KeyError and UnpicklingError to OSError
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint, or a damaged one: {first}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{path} is not a checkpoint of fairseq because it holds no model")
    if isinstance(state.get("cfg"), dict):
        upgrade_checkpoint(state)
    return sharded_files.resolve(state, path.parent, whole=True)


def build(path: Path, data: str | None) -> tuple[Any, Any, Any]:
    """Build (model, configuration, task) of a checkpoint in the way fairseq's own commands do.

    Args:
        path: the checkpoint.
        data: folder with the dictionaries. None means the folder named in the checkpoint.

    Raises:
        ValueError: the dictionaries are not those of the training.
    """
    overrides = {"data": data} if data else None
    try:
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    except RuntimeError as error:
        if found := re.search(VOCABULARY, str(error)):
            raise ValueError(
                f"{path} was trained with {found[1]} words, but the dictionary in "
                f"{data or 'the folder that the checkpoint names'} has {found[2]}; give --data the "
                "folder of the training"
            ) from error
        raise
    return model, cfg, task


def refuse_existing(path: Path) -> None:
    """Refuse an output path that cannot be used, before any work is done.

    Raises:
        FileExistsError: `path` exists.
        FileNotFoundError: the folder of `path` does not exist.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists and is not overwritten; remove it, or choose another")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.absolute().parent}")


@contextmanager
def in_place_of(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, to which the caller writes.

    The file or folder there is renamed to `path` at the end, or removed after an error.

    Raises:
        FileExistsError, FileNotFoundError: as in `refuse_existing`.
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
    """Save under a temporary name, then rename it, so that `path` is never incomplete.

    Raises:
        FileExistsError: `path` exists.
    """
    with in_place_of(path) as partial:
        torch.save(checkpoint, partial)


def flags_of(checkpoint: dict[str, Any]) -> Any:
    """Return the model's flags from a checkpoint.

    They are a Namespace, or a dictionary if the model is configured by a dataclass.

    Raises:
        ValueError: the checkpoint is too old to hold them.
    """
    cfg = checkpoint.get("cfg")
    if not cfg or "model" not in cfg:
        raise ValueError("the checkpoint has no `cfg`; save it again with a current fairseq")
    return cfg["model"]


def with_flags(flags: Any, **changes: Any) -> Any:
    """Return a copy of a model's flags with some of them changed."""
    if isinstance(flags, Namespace):
        return Namespace(**{**vars(flags), **changes})
    return {**flags, **changes}


def model_class(flags: Any) -> type:
    """Return the class that is registered for a model.

    Raises:
        ValueError: no such model is registered.
    """
    name = read_flag(flags, "_name") or read_flag(flags, "arch")
    found = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if found is None:
        raise ValueError(f"unknown model {name!r}: import the plugin that registers it")
    return found


def target_model(flags: Any) -> str:
    """Return the name of our model that belongs to the same family as a dense model.

    Raises:
        ValueError: we have no model of its family.
    """
    cls = model_class(flags)
    ours = cls.__module__.startswith("fairseq_evomoe.")
    for base, name in FAMILIES.items():
        if cls is base or (ours and issubclass(cls, base)):
            return name
    known = ", ".join(c.__name__ for c in FAMILIES)
    raise ValueError(f"{cls.__name__} cannot be converted; give {known} or one of our dense models")


def built(flags: Any) -> Any:
    """Return the flags in the form that `build_model` expects.

    fairseq passes a DictConfig to models that are configured by a dataclass.
    """
    return OmegaConf.create(flags) if isinstance(flags, dict) else flags


def command_line(flags: Flags) -> str:
    """Format the flags that differ from their defaults as on a command line."""
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
    """Run a console script: parse the arguments, patch fairseq, and call `run`.

    An OSError or ValueError of `run` ends the script with one line on stderr and exit code 1.
    """
    parser.prog = name
    args = parser.parse_args(argv)
    compat.apply_patches()
    try:
        run(args)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{name}: {error}\n")
