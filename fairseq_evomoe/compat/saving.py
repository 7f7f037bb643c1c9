"""Patches for what fairseq saves and loads."""

import argparse
import os
import shutil
import tempfile
import typing
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import omegaconf
import torch
from fairseq import checkpoint_utils, file_io
from fairseq.distributed import utils as distributed_utils
from fairseq.models.ema import ema

from fairseq_evomoe.compat.patching import patch
from fairseq_evomoe.old_names import read_flag, upgrade_checkpoint
from fairseq_evomoe.parallel import sharded_files


def allow_config_classes_in_checkpoints() -> None:
    """Let torch >= 2.6 load the classes in which fairseq stores flags.

    Without this patch a run can neither resume nor generate. `argparse.Namespace` is in every
    checkpoint of an argparse model. The omegaconf containers are pickled when rank 0 sends a loaded
    checkpoint to the other workers. All of them hold data and execute no code, so they are added to
    torch's allow-list. Everything else stays forbidden.
    """
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            omegaconf.DictConfig,
            omegaconf.ListConfig,
            omegaconf.base.ContainerMetadata,
            omegaconf.base.Metadata,
            omegaconf.nodes.AnyNode,
            typing.Any,
            distributed_utils._TensorPlaceholder,
            dict,
            list,
            int,
            defaultdict,
        ]
    )


@patch(file_io.PathManager, "copy", test="tests/cli/test_faults.py")
def copy_checkpoints_whole(original: Any) -> Any:
    """Give the copy of a checkpoint its name only when it is complete.

    fairseq writes `checkpoint_last.pt` and `checkpoint_best.pt` by copying a checkpoint over the
    old file of that name. A run killed meanwhile leaves a truncated `checkpoint_last.pt`, which no
    restart can read. This patch writes a temporary file and renames it, as fairseq does for the
    checkpoints that it saves.
    """

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if file_io.PathManager.path_requires_pathmanager(dst_path):
            return original(src_path, dst_path, overwrite=overwrite)
        shutil.copyfile(src_path, f"{dst_path}.tmp")
        os.replace(f"{dst_path}.tmp", dst_path)
        return True

    return copy


@patch(checkpoint_utils, "load_checkpoint_to_cpu", test="tests/cli/test_faults.py")
def name_damaged_checkpoints(original: Any) -> Any:
    """Name the file and the fix if a checkpoint cannot be read, which torch and fairseq do not."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(path, *args, **kwargs)
        except Exception as error:
            # a complete checkpoint is a zip archive
            if not os.path.isfile(path) or zipfile.is_zipfile(path):
                raise
            raise ValueError(
                f"{path} is damaged, or no checkpoint: give an earlier one of its folder with "
                "--restore-file (or --path)"
            ) from error

    return load_checkpoint_to_cpu


@patch(checkpoint_utils, "load_checkpoint_to_cpu", test="tests/parallel/test_sharded_files.py")
def read_expert_folders(original: Any) -> Any:
    """Let fairseq read checkpoints whose experts are in a folder beside them."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        state = original(path, *args, **kwargs)
        whole = not sharded_files.keeps_references()
        return sharded_files.resolve(state, Path(path).parent, whole=whole)

    return load_checkpoint_to_cpu


@patch(checkpoint_utils, "load_checkpoint_to_cpu", test="tests/models/test_old_checkpoints.py")
def read_old_flags(original: Any) -> Any:
    """Bring the flags in checkpoints of version 0.1.0 up to date."""

    def load_checkpoint_to_cpu(*args: Any, **kwargs: Any) -> Any:
        state = original(*args, **kwargs)
        upgrade_checkpoint(state)
        return state

    return load_checkpoint_to_cpu


@patch(checkpoint_utils, "load_checkpoint_to_cpu", test="tests/memory/test_mapped_ngrams.py")
def leave_mapped_tables_in_the_file(original: Any) -> Any:
    """Map a checkpoint whose n-gram tables stay in the file, instead of reading it whole."""

    def load_checkpoint_to_cpu(path: str, *args: Any, **kwargs: Any) -> Any:
        state = _mapped(path)
        if state is None:
            return original(path, *args, **kwargs)
        # fairseq prepares the flags; the weights go around it
        weights = state.pop("model")
        with tempfile.TemporaryDirectory() as folder:
            rest = os.path.join(folder, os.path.basename(path))
            torch.save({**state, "model": {}}, rest)
            return {**original(rest, *args, **kwargs), "model": weights}

    return load_checkpoint_to_cpu


def _mapped(path: str) -> dict[str, Any] | None:
    """The contents of such a checkpoint, mapped; None for any other file."""
    if not (os.path.isfile(path) and zipfile.is_zipfile(path)):
        return None
    state = torch.load(path, map_location="cpu", mmap=True)
    flags = (state.get("cfg") or {}).get("model")
    return state if read_flag(flags, "memory_ngram_mapped") else None


@patch(ema.EMA, "__init__", test="tests/cli/test_commands.py")
def average_weights_alone(original: Any) -> Any:
    """Let `--store-ema` average only floating-point weights.

    fairseq averages every entry of a model's state, which fails on integers. With this patch,
    such entries (routing tables) and the evolution state (stage, number of updates) are copied.
    """

    def init(self: Any, model: Any, config: Any, device: Any = None, skip_keys: Any = None) -> None:
        state = model.state_dict().items()
        copied = {n for n, v in state if n.endswith("_extra_state") or not _is_floating(v)}
        original(self, model, config, device, copied | set(skip_keys or ()))

    return init


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
