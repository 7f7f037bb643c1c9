"""Patches of fairseq's trainer for experts that are distributed over workers.

They act only on parameters that are marked with a `Shard`; other models train as before.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer
from torch import Tensor

from fairseq_evomoe.compat.patching import patch
from fairseq_evomoe.parallel import sharded_files
from fairseq_evomoe.parallel.checkpoints import (
    collect,
    local_optimizer_state,
    moments_of,
    named_shards,
)
from fairseq_evomoe.parallel.gradients import distributed_parameters, reduce_expert_gradients
from fairseq_evomoe.parallel.mesh import Shard
from fairseq_evomoe.parallel.sharded_files import local_part

MIXES_EXPERTS = ("adafactor", "lamb")
"""Optimizers whose step of one weight depends on the whole tensor, here on all experts."""


@patch(utils, "clip_grad_norm_", test="tests/parallel/test_exchange.py")
def clip_with_experts(original: Any) -> Any:
    """Wrap fairseq's `clip_grad_norm_` to include the experts of all workers in the norm."""

    @torch.no_grad()
    def clip_grad_norm_(params: Any, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        params = [params] if isinstance(params, Tensor) else list(params)
        experts = distributed_parameters(p for p in params if p.grad is not None)
        if not experts:
            return original(params, max_norm, aggregate_norm_fn)
        others = [p for p in params if not hasattr(p, "expert")]
        norm = original(others, 0.0, aggregate_norm_fn)

        own, common = (torch.zeros((), dtype=torch.float64, device=norm.device) for _ in range(2))
        for p, shard in experts:
            assert p.grad is not None
            wide = torch.promote_types(p.dtype, torch.float32)
            squares = torch.linalg.vector_norm(p.grad.flatten(1), dim=1, dtype=wide) ** 2
            if shard.common:
                common += squares[0]
            own += squares[int(shard.common) :].sum()
        dist.all_reduce(own, group=experts[0][1].mesh.group)
        norm = (norm.double().square() + common + own).sqrt().to(norm.dtype)
        if max_norm > 0:
            gradients = [p.grad for p in params if p.grad is not None]
            torch._foreach_mul_(gradients, (float(max_norm) / (norm + 1e-6)).clamp_(max=1))
        return norm

    return clip_grad_norm_


@patch(Trainer, "_build_optimizer", test="tests/cli/test_expert_parallel.py")
def reduce_expert_gradients_once(original: Any) -> Any:
    """Sum an expert's gradients over the workers that hold it, and load its part of the moments."""

    def _build_optimizer(self: Trainer) -> None:
        original(self)
        optimizer = self._optimizer
        if not distributed_parameters(self.model.parameters()):
            return
        name = self.cfg.optimizer._name
        if name in MIXES_EXPERTS:
            raise ValueError(
                f"--optimizer {name}: not with --expert-parallel: it scales the step of an expert "
                "by statistics of all experts of its layer, which no worker holds; use adam"
            )
        masters = getattr(optimizer, "fp32_params", None)
        for p, master in zip(optimizer.fp16_params, masters, strict=True) if masters else ():
            if hasattr(p, "expert"):
                # fairseq sets the master's mark to True; the shard itself is needed
                master.expert = p.expert
        reduce, load = optimizer.all_reduce_grads, optimizer.load_state_dict

        @functools.wraps(reduce)
        def all_reduce_grads(module: Any) -> None:
            reduce(module)
            reduce_expert_gradients(module.parameters())

        @functools.wraps(load)
        def load_state_dict(state: dict[str, Any], overrides: Any = None) -> None:
            load(local_optimizer_state(state, optimizer.optimizer), overrides)

        optimizer.all_reduce_grads, optimizer.load_state_dict = all_reduce_grads, load_state_dict

    return _build_optimizer


@patch(Trainer, "consolidate_optimizer", test="tests/cli/test_expert_parallel.py")
def gather_experts_before_a_save(original: Any) -> Any:
    """Gather the experts on the first worker before a save, which every worker takes part in."""

    def consolidate_optimizer(self: Trainer) -> None:
        original(self)
        shards_by_name = named_shards(self.get_model())
        # a worker that saves its state because it has failed must not wait for the others
        failing = sys.exc_info()[0] is not None
        if not shards_by_name or failing:
            return
        parts = expert_parts(self, shards_by_name)
        sharded = self.cfg.task.expert_parallel_save == "sharded"
        folder = Path(self.cfg.checkpoint.save_dir)
        name = sharded_files.new_folder(folder, self.get_num_updates()) if sharded else ""
        first_group = dist.get_global_rank(next(iter(shards_by_name.values())).mesh.group, 0) == 0
        if not first_group:
            return
        if sharded:
            sharded_files.write(folder / name, parts)
            whole = {path: sharded_files.reference(path) for path in parts}
        else:
            whole = {path: collect(part, shard) for path, (part, shard) in parts.items()}
        if self.is_data_parallel_master:
            self._whole, self._shards = whole, name

    return consolidate_optimizer


@patch(Trainer, "state_dict", test="tests/cli/test_expert_parallel.py")
def save_all_experts(original: Any) -> Any:
    """Put all workers' experts, and their moments and averages, into the checkpoint."""

    def state_dict(self: Trainer) -> dict[str, Any]:
        whole = getattr(self, "_whole", None)
        if whole is None:
            return original(self)
        if not self.cfg.checkpoint.no_save_optimizer_state:
            state = self.optimizer.state_dict()
            moments = {i: dict(v) if isinstance(v, dict) else v for i, v in state["state"].items()}
            for path, value in whole.items():
                where, _, name = path.partition("/")
                if where == "optimizer":
                    index, key = name.split("/")
                    moments[int(index)][key] = value
            self._gathered_optim_state = {**state, "state": moments}
        state = original(self)
        extra = state["extra_state"]
        for where, holder in (("model", state), ("ema", extra), ("ema_fp32_params", extra)):
            if where in holder:
                start = f"{where}/"
                found = {k.removeprefix(start): v for k, v in whole.items() if k.startswith(start)}
                holder[where] = {**holder[where], **found}
        if self._shards:
            extra[sharded_files.FOLDER] = self._shards
        return state

    return state_dict


@patch(Trainer, "load_checkpoint", test="tests/cli/test_expert_parallel.py")
def load_own_experts(original: Any) -> Any:
    """Let each worker read its own experts from a folder of experts."""

    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not named_shards(self.get_model()):
            return original(self, *args, **kwargs)
        with sharded_files.keeping_references():
            return original(self, *args, **kwargs)

    return load_checkpoint


@patch(Trainer, "save_checkpoint", test="tests/cli/test_expert_parallel.py")
def forget_gathered_experts(original: Any) -> Any:
    """Drop the gathered experts after a save."""

    def save_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            self._whole = None

    return save_checkpoint


@patch(EMA, "build_fp32_params", test="tests/cli/test_expert_parallel.py")
def keep_own_averages(original: Any) -> Any:
    """Keep this worker's part of the moving averages in float32."""

    def build_fp32_params(self: EMA, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            own, shards_by_name = self.model.state_dict(), named_shards(self.model)
            state_dict = dict(state_dict)
            for name, shard in shards_by_name.items():
                state_dict[name] = local_part(
                    state_dict[name], shard, own[name].shape, has_split=shard.has_split
                )
        original(self, state_dict)

    return build_fp32_params


def expert_parts(
    trainer: Trainer, shards_by_name: dict[str, Shard]
) -> dict[str, tuple[Tensor, Shard]]:
    """Map all that a checkpoint stores for sharded experts to this worker's part and shard."""
    states = {"model": trainer.get_model().state_dict()}
    if trainer.cfg.ema.store_ema:
        states["ema"] = trainer.ema.get_model().state_dict()
        states["ema_fp32_params"] = trainer.ema.fp32_params
    parts = {
        f"{where}/{name}": (state[name], shard)
        for where, state in states.items()
        for name, shard in shards_by_name.items()
        if name in state
    }
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        for index, key, moment, shard in moments_of(trainer.optimizer.optimizer):
            parts[f"optimizer/{index}/{key}"] = (moment, shard)
    return parts
