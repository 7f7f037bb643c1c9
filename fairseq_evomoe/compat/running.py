"""Mends of how fairseq starts, optimises and logs."""

import argparse
import importlib.util
import logging
import os
import socket
from collections import defaultdict

import torch
from fairseq import nan_detector, optim, options
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar

from fairseq_evomoe.compat.wrapping import wrap

logger = logging.getLogger(__name__)

DETAIL = "moe_load/"
"""Prefix of metrics that are too many for a progress bar; JSON logs and TensorBoard get them."""


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

        return call_main

    wrap(distributed_utils, "call_main", make)


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


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


def shorten_progress_bar() -> None:
    """A bar shows every metric it is given; one per layer and expert would drown the rest."""

    def make(original):
        def _format_stats(self, stats):
            return original(self, {k: v for k, v in stats.items() if DETAIL not in k})

        return _format_stats

    wrap(progress_bar.BaseProgressBar, "_format_stats", make)


def find_nan_in_any_model() -> None:
    """After a NaN fairseq repeats the batch to name the module, by hooks that know few outputs.

    A dictionary of lists, as every encoder returns, or an object ends the search in a StopIteration
    or TypeError that hides what went wrong. Here gradients are watched at the tensors themselves.
    """

    def make(original):
        def add_hooks(self, module):
            def watch(module, inputs, output):
                for value in output if isinstance(output, tuple) else (output,):
                    if isinstance(value, torch.Tensor) and value.requires_grad:
                        value.register_hook(lambda g: self.bhook_fn(module, inputs, g))

            if self.forward:
                self.fhooks.append(module.register_forward_hook(self.fhook_fn))
            if self.backward:
                self.bhooks.append(module.register_forward_hook(watch))

        return add_hooks

    wrap(nan_detector.NanDetector, "add_hooks", make)
