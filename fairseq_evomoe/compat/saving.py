"""Mends of what fairseq saves and reads."""

import argparse
import os
import shutil
import typing
import zipfile
from collections import defaultdict

import omegaconf
import torch
from fairseq import checkpoint_utils, file_io
from fairseq.distributed import utils as distributed_utils
from fairseq.models.ema import ema

from fairseq_evomoe.compat.wrapping import wrap


def allow_config_classes_in_checkpoints() -> None:
    """torch >= 2.6 refuses the classes in which fairseq stores flags: no resume, no generate.

    `argparse.Namespace` is in every checkpoint of an argparse model; the omegaconf containers
    travel when rank 0 hands a loaded checkpoint to the other workers. They hold data and run
    nothing, so they join torch's allow-list; everything else stays forbidden.
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


def copy_checkpoints_whole() -> None:
    """fairseq names a checkpoint `last` and `best` by copying it over the old file of that name.

    A run killed meanwhile leaves a cut-off `checkpoint_last.pt`, which no restart can read. Here a
    copy gets its name when it is whole, as fairseq does with what it saves.
    """

    def make(original: typing.Callable) -> typing.Callable:
        def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
            if file_io.PathManager.path_requires_pathmanager(dst_path):
                return original(src_path, dst_path, overwrite=overwrite)
            shutil.copyfile(src_path, f"{dst_path}.tmp")
            os.replace(f"{dst_path}.tmp", dst_path)
            return True

        return copy

    wrap(file_io.PathManager, "copy", make)


def name_damaged_checkpoints() -> None:
    """torch does not say which file it could not read, nor fairseq what to do about it."""

    def make(original: typing.Callable) -> typing.Callable:
        def load_checkpoint_to_cpu(
            path: str, *args: typing.Any, **kwargs: typing.Any
        ) -> typing.Any:
            try:
                return original(path, *args, **kwargs)
            except Exception as error:
                # a whole checkpoint is a zip archive
                if not os.path.isfile(path) or zipfile.is_zipfile(path):
                    raise
                raise ValueError(
                    f"{path} is damaged, or no checkpoint: give an earlier one of its folder with "
                    "--restore-file (or --path)"
                ) from error

        return load_checkpoint_to_cpu

    wrap(checkpoint_utils, "load_checkpoint_to_cpu", make)


def average_weights_alone() -> None:
    """`--store-ema` averages every entry of a model's state and dies on integers.

    Routing tables and the evolution state (stage, number of updates) are copied instead.
    """

    def make(original):
        def __init__(self, model, config, device=None, skip_keys=None):
            state = model.state_dict().items()
            copied = {n for n, v in state if n.endswith("_extra_state") or not _is_floating(v)}
            original(self, model, config, device, copied | set(skip_keys or ()))

        return __init__

    wrap(ema.EMA, "__init__", make)


def _is_floating(value: typing.Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
