"""What fairseq needs to run on today's torch, each mend with its reason.

A mend is applied only where its fault is present, touches one name in one fairseq module, and is
safe to apply twice. Nothing here turns off torch's checks on what a checkpoint may contain.
"""

import argparse
import atexit
import contextlib
import functools
import importlib.util
import logging
import os
import queue
import shutil
import socket
import threading
import time
import types
import typing
import warnings
import zipfile
from collections import defaultdict

import numpy as np
import omegaconf
import torch
from fairseq import checkpoint_utils, file_io, optim, options
from fairseq.data import data_utils, iterators, language_pair_dataset, token_block_dataset
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar
from fairseq.models.ema import ema

logger = logging.getLogger(__name__)

DETAIL = "moe_load/"
"""Prefix of metrics that are too many for a progress bar; JSON logs and TensorBoard get them."""

_MARK = "_evomoe"

_NOISE = (
    "deprecated keyword in package header",
    "is validated against ConfigStore schema",
    "strict flag in the compose API",
    "torch.cuda.amp.autocast",
    "mismatched key_padding_mask and attn_mask",
    "'pin_memory' argument is set as true",
)


def mend() -> None:
    """Apply every mend. Called once, when the plugin is imported, before fairseq parses a flag."""
    allow_config_classes_in_checkpoints()
    keep_bf16_off_tpu()
    start_cpu_workers()
    keep_last_batch()
    keep_numpy_compat()
    own_weight_decay()
    average_weights_alone()
    copy_checkpoints_whole()
    name_damaged_checkpoints()
    atexit.register(stop_loading_batches)
    shorten_progress_bar()
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=rf"(?s)\s*.*{text}")


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


def wrap(owner: typing.Any, name: str, make: typing.Callable) -> None:
    """Put make(original) in the place of `owner.name`, unless that has been done before."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _MARK, True)
    setattr(owner, name, replacement)


def keep_bf16_off_tpu() -> None:
    """`--bf16` sets `--tpu`, and without torch_xla every run then dies on `xla_device`."""
    if importlib.util.find_spec("torch_xla") is not None:
        return

    def make(original):
        def parse_args_and_arch(*args, **kwargs):
            parsed = original(*args, **kwargs)
            for namespace in parsed if isinstance(parsed, tuple) else (parsed,):
                if getattr(namespace, "bf16", False) and isinstance(namespace, argparse.Namespace):
                    namespace.tpu = False
            return parsed

        return parse_args_and_arch

    wrap(options, "parse_args_and_arch", make)


def start_cpu_workers() -> None:
    """fairseq starts one worker a GPU: with `--cpu` none, and a run may train nothing, exit 0."""

    def make(original):
        def call_main(cfg, main, **kwargs):
            flags = cfg.distributed_training
            torchrun = all(
                k in os.environ for k in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
            )
            on_gpu = torch.cuda.is_available() and not cfg.common.cpu
            if on_gpu or (flags.distributed_world_size <= 1 and not torchrun):
                return original(cfg, main, **kwargs)

            if flags.distributed_backend == "nccl":
                flags.distributed_backend = "gloo"
            if flags.ddp_backend in ("c10d", "pytorch_ddp"):
                logger.info("CPU workers: --ddp-backend %s -> legacy_ddp", flags.ddp_backend)
                flags.ddp_backend = "legacy_ddp"
            if torchrun:
                flags.distributed_init_method = "env://"
                flags.distributed_world_size = int(os.environ["WORLD_SIZE"])
                flags.distributed_rank = int(os.environ["RANK"])
                flags.distributed_no_spawn = True
                return distributed_utils.distributed_main(0, main, cfg, kwargs)
            if flags.distributed_no_spawn:
                return original(cfg, main, **kwargs)
            if flags.distributed_init_method is None:
                port = flags.distributed_port if flags.distributed_port > 0 else _free_port()
                flags.distributed_init_method = f"tcp://localhost:{port}"
            flags.distributed_num_procs = flags.distributed_world_size
            flags.distributed_rank = None
            kwargs["start_rank"] = 0
            torch.multiprocessing.spawn(
                distributed_utils.distributed_main,
                args=(main, cfg, kwargs),
                nprocs=flags.distributed_world_size,
                join=True,
            )

        return call_main

    wrap(distributed_utils, "call_main", make)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def keep_last_batch() -> None:
    """`--required-batch-size-multiple` (8 by default) drops the last batch: sentences vanish.

    Training, validation and fairseq-generate lose the last n mod 8 sentences, the longest. They
    come back as one batch more.
    """

    def make(original):
        def batch_by_size(indices, *args, **kwargs):
            if not isinstance(indices, np.ndarray):
                indices = np.fromiter(indices, dtype=np.int64, count=-1)
            batches = original(indices, *args, **kwargs)
            fixed_shapes = kwargs.get("fixed_shapes") is not None or len(args) > 5
            kept = sum(len(b) for b in batches)
            if fixed_shapes or kept == len(indices):
                return batches
            return [*batches, indices[kept:]]

        return batch_by_size

    wrap(data_utils, "batch_by_size", make)


def keep_numpy_compat() -> None:
    """numpy 2 lacks `np.compat.long`: `--sample-break-mode eos` and length buckets need it."""
    if hasattr(np, "compat"):
        return

    class NumPy:
        compat = types.SimpleNamespace(long=np.int64)

        def __getattr__(self, name: str) -> typing.Any:
            return getattr(np, name)

    for module in (token_block_dataset, language_pair_dataset):
        module.np = NumPy()


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


def own_weight_decay() -> None:
    """A parameter's `optim_overrides` are heard by fairseq's composite optimizer alone.

    Here the weight decay in them is heeded by every optimizer: such parameters get a group of
    their own. fp16 with flattened masters cannot, and decays all alike.
    """

    def make(original):
        def build_optimizer(cfg, params, *args, **kwargs):
            optimizer = original(cfg, params, *args, **kwargs)
            for group in list(getattr(optimizer, "param_groups", ())):
                apart = defaultdict(list)
                for p in group["params"]:
                    own = (getattr(p, "optim_overrides", None) or {}).get("optimizer", {})
                    apart[own.get("weight_decay", group.get("weight_decay"))].append(p)
                group["params"] = apart.pop(group.get("weight_decay"), [])
                options = {k: v for k, v in group.items() if k != "params"}
                for decay, mine in apart.items():
                    optimizer.optimizer.add_param_group(
                        {**options, "weight_decay": decay, "params": mine}
                    )
            return optimizer

        return build_optimizer

    wrap(optim, "build_optimizer", make)


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


def stop_loading_batches(patience: float = 5.0) -> None:
    """End the threads that load batches ahead, before the interpreter ends.

    A run that stops within an epoch leaves one at work; Python kills it inside torch's C++ code,
    and a training that has succeeded and saved ends with an abort, now and then.
    """
    deadline = time.monotonic() + patience
    for thread in threading.enumerate():
        if isinstance(thread, iterators.BackgroundConsumer):
            thread._max_len = 0
            while thread.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):
                    # it may be waiting for room in its queue
                    thread._queue.get_nowait()
                thread.join(0.01)


def shorten_progress_bar() -> None:
    """A bar shows every metric it is given; one per layer and expert would drown the rest."""

    def make(original):
        def _format_stats(self, stats):
            return original(self, {k: v for k, v in stats.items() if DETAIL not in k})

        return _format_stats

    wrap(progress_bar.BaseProgressBar, "_format_stats", make)
