"""One ordinary checkpoint whatever the number of workers.

At a save the workers of the first group hand their experts, and the optimizer's moments and
averages of them, to rank 0, which writes the file that a run without expert parallelism would have
written. At a load each worker keeps its share. fairseq calls `consolidate_optimizer` on every
worker before a save, whether or not a file follows: there the handing over takes place.
"""

import functools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer
from torch import Tensor, nn

from fairseq_evomoe.compat.wrapping import wrap
from fairseq_evomoe.parallel import shards
from fairseq_evomoe.parallel.gradients import (
    clip_with_experts,
    reduce_expert_gradients,
    shared_out,
)
from fairseq_evomoe.parallel.mesh import Share
from fairseq_evomoe.parallel.shards import own_part


def install() -> None:
    """Make fairseq's trainer reduce, clip, save and load what is shared out.

    What it changes acts on marked parameters alone: other models train as before.
    """
    wrap(utils, "clip_grad_norm_", clip_with_experts)
    wrap(Trainer, "_build_optimizer", _with_expert_gradients)
    wrap(Trainer, "consolidate_optimizer", _with_handing_over)
    wrap(Trainer, "state_dict", _with_whole_experts)
    wrap(Trainer, "save_checkpoint", _with_forgetting)
    wrap(Trainer, "load_checkpoint", _with_own_experts)
    wrap(EMA, "build_fp32_params", _with_own_averages)


def named_shares(model: nn.Module) -> dict[str, Share]:
    """Names in the state of a model, or of a copy -> share, for what is shared out."""
    return {
        f"{bank}.{part}": module.share
        for bank, module in model.named_modules()
        if isinstance(getattr(module, "share", None), Share)
        for part, _ in module.named_parameters(recurse=False)
    }


def collect(part: Tensor, share: Share) -> Tensor | None:
    """The stacked tensor of all workers' parts, on the CPU of the group's first; None elsewhere.

    Every worker of the group must call it.
    """
    mesh = share.mesh
    first = mesh.rank == 0
    parts = [torch.empty_like(part) for _ in range(mesh.size)] if first else None
    root = dist.get_global_rank(mesh.group, 0)
    dist.gather(part.contiguous(), parts, dst=root, group=mesh.group)
    return None if parts is None else share.whole([p.cpu() for p in parts])


def _stacks(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, nn.Parameter, Share]]:
    """(index in the optimizer's state, parameter, share) of what is shared out."""
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    for index, p in enumerate(p for g in groups for p in g["params"]):
        share = getattr(p, "expert", None)
        if isinstance(share, Share):
            yield index, p, share


def moments_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Tensor, Share]]:
    """(index in the optimizer's state, key, moment, share) of the parameters shared out."""
    for index, p, share in _stacks(optimizer):
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            if isinstance(value, Tensor) and value.shape == p.shape:
                yield index, key, value, share


def local_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """An optimizer's state of whole stacks -> with this worker's share of each."""
    own = {k: dict(v) if isinstance(v, dict) else v for k, v in state["state"].items()}
    for index, p, share in _stacks(optimizer):
        for key, value in own.get(index, {}).items():
            own[index][key] = own_part(value, share, p.shape, split=share.split)
    return {**state, "state": own}


def _with_expert_gradients(original: Any) -> Any:
    def _build_optimizer(self: Trainer) -> None:
        original(self)
        optimizer = self._optimizer
        if not shared_out(self.model.parameters()):
            return
        masters = getattr(optimizer, "fp32_params", None)
        for p, master in zip(optimizer.fp16_params, masters, strict=True) if masters else ():
            if hasattr(p, "expert"):
                # fairseq copies the mark, not what it says
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


def _parts(trainer: Trainer, shares: dict[str, Share]) -> dict[str, tuple[Tensor, Share]]:
    """Everything that a checkpoint holds of shared-out experts: name -> this worker's part."""
    states = {"model": trainer.get_model().state_dict()}
    if trainer.cfg.ema.store_ema:
        states["ema"] = trainer.ema.get_model().state_dict()
        states["ema_fp32_params"] = trainer.ema.fp32_params
    parts = {
        f"{where}/{name}": (state[name], share)
        for where, state in states.items()
        for name, share in shares.items()
        if name in state
    }
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        for index, key, moment, share in moments_of(trainer.optimizer.optimizer):
            parts[f"optimizer/{index}/{key}"] = (moment, share)
    return parts


def _with_handing_over(original: Any) -> Any:
    def consolidate_optimizer(self: Trainer) -> None:
        original(self)
        shares = named_shares(self.get_model())
        # a worker that saves what it has because it failed must not wait for the others
        failing = sys.exc_info()[0] is not None
        if not shares or failing:
            return
        parts = _parts(self, shares)
        sharded = self.cfg.task.expert_parallel_save == "sharded"
        folder = Path(self.cfg.checkpoint.save_dir)
        name = shards.new_folder(folder, self.get_num_updates()) if sharded else ""
        first_group = dist.get_global_rank(next(iter(shares.values())).mesh.group, 0) == 0
        if not first_group:
            return
        if sharded:
            shards.write(folder / name, parts)
            whole = {path: shards.reference(path) for path in parts}
        else:
            whole = {path: collect(part, share) for path, (part, share) in parts.items()}
        if self.is_data_parallel_master:
            self._whole, self._shards = whole, name

    return consolidate_optimizer


def _with_whole_experts(original: Any) -> Any:
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
            extra[shards.FOLDER] = self._shards
        return state

    return state_dict


def _with_own_experts(original: Any) -> Any:
    def load_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        if not named_shares(self.get_model()):
            return original(self, *args, **kwargs)
        with shards.each_reads_its_own():
            return original(self, *args, **kwargs)

    return load_checkpoint


def _with_forgetting(original: Any) -> Any:
    def save_checkpoint(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:
            self._whole = None

    return save_checkpoint


def _with_own_averages(original: Any) -> Any:
    def build_fp32_params(self: EMA, state_dict: dict[str, Tensor] | None = None) -> None:
        if state_dict is not None:
            own, shares = self.model.state_dict(), named_shares(self.model)
            state_dict = dict(state_dict)
            for name, share in shares.items():
                state_dict[name] = own_part(
                    state_dict[name], share, own[name].shape, split=share.split
                )
        original(self, state_dict)

    return build_fp32_params
