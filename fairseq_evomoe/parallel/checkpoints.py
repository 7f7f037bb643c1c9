"""One ordinary checkpoint whatever the number of workers.

At a save the workers of the first group hand their experts, and the optimizer's moments and
averages of them, to rank 0, which writes the file that a run without expert parallelism would have
written. At a load each worker keeps its share. fairseq calls `consolidate_optimizer` on every
worker before a save, whether or not a file follows: there the handing over takes place.
"""

import functools
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.models.ema.ema import EMA
from fairseq.trainer import Trainer
from torch import Tensor, nn

from fairseq_evomoe.compat.wrapping import wrap
from fairseq_evomoe.parallel.gradients import (
    clip_with_experts,
    reduce_expert_gradients,
    shared_out,
)
from fairseq_evomoe.parallel.mesh import Share


def install() -> None:
    """Make fairseq's trainer reduce, clip, save and load what is shared out.

    What it changes acts on marked parameters alone: other models train as before.
    """
    wrap(utils, "clip_grad_norm_", clip_with_experts)
    wrap(Trainer, "_build_optimizer", _with_expert_gradients)
    wrap(Trainer, "consolidate_optimizer", _with_handing_over)
    wrap(Trainer, "state_dict", _with_whole_experts)
    wrap(Trainer, "save_checkpoint", _with_forgetting)
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


def _collect_named(state: dict[str, Tensor], shares: dict[str, Share]) -> dict[str, Tensor | None]:
    return {n: collect(state[n], share) for n, share in shares.items() if n in state}


def moments_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Tensor, Share]]:
    """(index in the optimizer's state, key, moment, share) of the parameters shared out."""
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    for index, p in enumerate(p for g in groups for p in g["params"]):
        share = getattr(p, "expert", None)
        if isinstance(share, Share):
            for key, value in sorted(optimizer.state.get(p, {}).items()):
                if isinstance(value, Tensor) and value.shape == p.shape:
                    yield index, key, value, share


def local_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """An optimizer's state of whole stacks -> with this worker's share of each."""
    own = {k: dict(v) if isinstance(v, dict) else v for k, v in state["state"].items()}
    for index, p in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        share = getattr(p, "expert", None)
        if isinstance(share, Share):
            whole = (share.total, *p.shape[1:])
            for key, value in own.get(index, {}).items():
                if isinstance(value, Tensor) and value.shape == whole:
                    own[index][key] = share.local(value, split=share.split)
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


def _with_handing_over(original: Any) -> Any:
    def consolidate_optimizer(self: Trainer) -> None:
        original(self)
        shares = named_shares(self.get_model())
        # a worker that saves what it has because it failed must not wait for the others
        failing = sys.exc_info()[0] is not None
        if not shares or failing:
            return
        whole: dict[str, Any] = {"model": _collect_named(self.model.state_dict(), shares)}
        if self.cfg.ema.store_ema:
            averages = self.ema.get_model().state_dict()
            whole["ema"] = _collect_named(averages, shares)
            whole["ema_fp32_params"] = _collect_named(self.ema.fp32_params, shares)
        if not self.cfg.checkpoint.no_save_optimizer_state:
            found = [(i, k, collect(m, s)) for i, k, m, s in moments_of(self.optimizer.optimizer)]
            state = self.optimizer.state_dict()
            own = {i: dict(v) if isinstance(v, dict) else v for i, v in state["state"].items()}
            for index, key, value in found:
                own[index][key] = value
            whole["optimizer"] = {**state, "state": own}
        if self.is_data_parallel_master:
            self._whole = whole

    return consolidate_optimizer


def _with_whole_experts(original: Any) -> Any:
    def state_dict(self: Trainer) -> dict[str, Any]:
        whole = getattr(self, "_whole", None)
        if whole is None:
            return original(self)
        self._gathered_optim_state = whole.get("optimizer")
        state = original(self)
        state["model"] = {**state["model"], **whole["model"]}
        for key in ("ema", "ema_fp32_params"):
            if key in state["extra_state"]:
                state["extra_state"][key] = {**state["extra_state"][key], **whole[key]}
        return state

    return state_dict


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
            foreign = {n for n in shares if state_dict[n].shape != own[n].shape}
            state_dict = {
                n: shares[n].local(v, split=shares[n].split) if n in foreign else v
                for n, v in state_dict.items()
            }
        original(self, state_dict)

    return build_fp32_params
