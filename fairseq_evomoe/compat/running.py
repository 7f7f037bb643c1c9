"""Patches for how fairseq starts, optimises and logs."""

import argparse
import importlib.util
import logging
import os
import socket
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from fairseq import nan_detector, optim, options
from fairseq.distributed import utils as distributed_utils
from fairseq.modules import checkpoint_activations
from fairseq.trainer import Trainer
from omegaconf import open_dict

from fairseq_evomoe.compat.patching import patch
from fairseq_evomoe.kernels.transformer.attention import recomputed
from fairseq_evomoe.kernels.transformer.functions import are_fast, fast_functions
from fairseq_evomoe.old_names import warn_of_old_names

logger = logging.getLogger(__name__)


def _no_torch_xla() -> bool:
    return importlib.util.find_spec("torch_xla") is None


@patch(options, "parse_args_and_arch", test="tests/test_compat.py", needed=_no_torch_xla)
def keep_bf16_off_tpu(original: Any) -> Any:
    """Keep `--bf16` from setting `--tpu`.

    Without torch_xla every run with `--tpu` fails on `xla_device`. The patch is applied only if
    torch_xla is not installed.
    """

    def parse_args_and_arch(*args: Any, **kwargs: Any) -> Any:
        parsed = original(*args, **kwargs)
        for namespace in parsed if isinstance(parsed, tuple) else (parsed,):
            if getattr(namespace, "bf16", False) and isinstance(namespace, argparse.Namespace):
                namespace.tpu = False
        return parsed

    return parse_args_and_arch


@patch(options, "parse_args_and_arch", test="tests/test_old_names.py")
def say_old_names(original: Any) -> Any:
    """Warn of flags that a command line gives by an old name."""

    def parse_args_and_arch(parser: Any, input_args: Any = None, *args: Any, **kwargs: Any) -> Any:
        warn_of_old_names(sys.argv[1:] if input_args is None else map(str, input_args))
        return original(parser, input_args, *args, **kwargs)

    return parse_args_and_arch


@patch(distributed_utils, "call_main", test="tests/cli/test_commands.py")
def start_cpu_workers(original: Any) -> Any:
    """Spawn the workers of a multi-worker run on CPUs.

    fairseq spawns one worker per GPU. With `--cpu` it spawns none, so a multi-worker run can exit
    with status 0 without training.
    """

    def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
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
            port = flags.distributed_port if flags.distributed_port > 0 else free_port()
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
        return None

    return call_main


NEEDS = {
    "--write-checkpoints-asynchronously": ("checkpoint", "iopath"),
    "--wandb-project": ("common", "wandb"),
    "--aim-repo": ("common", "aim"),
}
"""Flag -> its group of fairseq's configuration, and the package that it needs."""


@patch(distributed_utils, "call_main", test="tests/test_compat.py")
def refuse_flags_without_their_package(original: Any) -> Any:
    """Stop with an error if a flag is given whose package is not installed.

    fairseq logs the reason among its first lines. Then it ends with exit code 0 without training
    (`--write-checkpoints-asynchronously`), or trains without a record of it (`--wandb-project`).
    """

    def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
        for flag, (group, package) in NEEDS.items():
            name = flag.removeprefix("--").replace("-", "_")
            given = getattr(getattr(cfg, group, None), name, None)
            if given and importlib.util.find_spec(package) is None:
                sys.exit(
                    f"{flag} needs the package {package}: pip install {package}, or leave the flag "
                    "out"
                )
        return original(cfg, main, **kwargs)

    return call_main


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@patch(optim, "build_optimizer", test="tests/models/test_memoryformer.py")
def own_weight_decay(original: Any) -> Any:
    """Make every optimizer use the weight decay in a parameter's `optim_overrides`.

    In fairseq only the composite optimizer reads `optim_overrides`. This patch puts parameters with
    a weight decay of their own into separate parameter groups. Under fp16 with flattened masters
    that is not possible, and all parameters have the same weight decay.
    """

    def build_optimizer(cfg: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
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


@patch(Trainer, "__init__", test="tests/tasks/test_precision.py")
def leave_mixed_precision_to_the_task(original: Any) -> Any:
    """Train without a loss scale under `--amp` on a CPU, where it means bfloat16.

    fairseq's `--amp` knows CUDA's float16 alone. This package's tasks run the criterion under
    torch's autocast for CPUs instead.
    """

    def __init__(self: Any, cfg: Any, task: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        common = getattr(cfg, "common", cfg)
        if common.amp and getattr(task, "autocasts_on_cpu", False):
            with open_dict(common):
                common.amp = False
        original(self, cfg, task, *args, **kwargs)

    return __init__


@patch(checkpoint_activations, "_checkpointed_forward", test="tests/tasks/test_precision.py")
def recompute_as_before(original: Any) -> Any:
    """Recompute a layer under `--checkpoint-activations` in the arithmetic of its first pass.

    fairseq recomputes outside of autocast, in float32, where a layer may route tokens differently.
    """

    def _checkpointed_forward(forward: Any, *args: Any, **kwargs: Any) -> Any:
        types = [t for t in ("cpu", "cuda") if torch.is_autocast_enabled(t)]
        dtypes = {t: torch.get_autocast_dtype(t) for t in types}
        fast = are_fast()
        if not (dtypes or fast):
            return original(forward, *args, **kwargs)

        def as_then(*inputs: Any, **options: Any) -> Any:
            with ExitStack() as stack:
                for device, dtype in dtypes.items():
                    stack.enter_context(torch.autocast(device, dtype))
                if fast:
                    stack.enter_context(fast_functions())
                    stack.enter_context(recomputed())
                return forward(*inputs, **options)

        return original(as_then, *args, **kwargs)

    return _checkpointed_forward


_CUDA = torch.Tensor.cuda


@contextmanager
def _cuda_changes_nothing() -> Iterator[None]:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    try:
        yield
    finally:
        # torch's own function, not what was there before: another thread may be in the block too
        torch.Tensor.cuda = _CUDA  # type: ignore[method-assign]


@patch(Trainer, "train_step", test="tests/tasks/test_bad_numbers.py")
def skip_overflowing_updates_on_cpus(original: Any) -> Any:
    """Let fp16 training on a CPU skip an update whose gradient overflows, as it does on a GPU.

    fairseq moves the norm of such an update to a GPU, which fails where there is none.
    """

    def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.cuda else _cuda_changes_nothing():
            return original(self, *args, **kwargs)

    return train_step


@patch(nan_detector.NanDetector, "add_hooks", test="tests/tasks/test_bad_numbers.py")
def find_nan_in_any_model(original: Any) -> Any:
    """Make fairseq's search for the source of a NaN work with any output of a module.

    After a NaN, fairseq repeats the batch with hooks that name the module. Its backward hooks
    support few types of output. If a module returns a dictionary of lists, as every encoder does,
    or an object, the search ends in a StopIteration or TypeError that hides the cause. This patch
    hooks the gradients of the output tensors themselves.
    """

    def add_hooks(self: Any, module: torch.nn.Module) -> None:
        def watch(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            for value in output if isinstance(output, tuple) else (output,):
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    value.register_hook(lambda g: self.bhook_fn(module, inputs, g))

        if self.forward:
            self.fhooks.append(module.register_forward_hook(self.fhook_fn))
        if self.backward:
            self.bhooks.append(module.register_forward_hook(watch))

    return add_hooks
