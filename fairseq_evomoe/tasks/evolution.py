"""The hook between fairseq's training loop and the layers: a mixin for every task."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_evomoe.config import EvolutionConfig
from fairseq_evomoe.kernels.pages import keep_freed_memory
from fairseq_evomoe.kernels.transformer.functions import fast_functions
from fairseq_evomoe.kernels.transformer.matmul import by_onednn, choose, products
from fairseq_evomoe.modules.gates import Gate
from fairseq_evomoe.modules.moe_layer import EvoMoELayer, moe_layers
from fairseq_evomoe.modules.records import RoutingLog, recording
from fairseq_evomoe.old_names import upgrade_values
from fairseq_evomoe.parallel import checkpoints
from fairseq_evomoe.parallel.mesh import distributing
from fairseq_evomoe.schedule import Stage
from fairseq_evomoe.tasks.checks import (
    check_criterion,
    check_machine,
    check_workers,
    expert_mesh,
    on_cpu,
    schedule_of,
)
from fairseq_evomoe.tasks.spawning import spawn_tables_when_due
from fairseq_evomoe.tasks.splitting import split_when_due
from fairseq_evomoe.tasks.unused import setting_of, unused, unused_losses

logger = logging.getLogger(__name__)


class EvolutionMixin:
    """Gives the layers their schedule, splits the experts on time, keeps validation in step.

    Everything derives from the number of finished updates and from the layers' saved state, so an
    interrupted run continues as if nothing had happened.
    """

    cfg: Any
    args: Any
    can_reuse_epoch_itr: Callable[[Any], bool]
    _gate: Gate | None = None
    spawn_update = 0
    """Update at which dense layers become look-ups, `--memory-spawn-update`; 0 means never, or that
    they have."""
    autocasts_on_cpu = False
    """Whether the criterion runs under torch's autocast to bfloat16: `--amp` on a CPU."""

    @property
    def flags(self) -> EvolutionConfig:
        """The task's configuration; fairseq's older tasks keep it in `args`."""
        return self.args if getattr(self, "cfg", None) is None else self.cfg

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        mesh = None
        if not from_checkpoint:
            upgrade_values(self.flags, warn=True)
            mesh = expert_mesh(self.flags, cfg)
            check_workers(cfg)
            check_machine(self.flags)
            self.autocasts_on_cpu = bool(self.flags.amp) and on_cpu(self.flags)
        with distributing(mesh):
            model = super().build_model(cfg, from_checkpoint)
        layers, spawn = [layer for _, layer in moe_layers(model)], 0
        # inference takes the stage from the checkpoint, and a dense model has none
        if layers and not from_checkpoint:
            self._gate = layers[0].gate
            self._load = LoadOfUpdate()
            schedule = schedule_of(self.flags, self._gate)
            spawn = schedule.spawn
            for layer in layers:
                layer.set_schedule(schedule)
                layer.gate.check_ready()
            distributed = list(checkpoints.named_shards(model))
            if distributed:
                # torch's DDP would average them
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
                    model, distributed
                )
            logger.info("evolution: %s", schedule)
        if not from_checkpoint:
            self.spawn_update = int(getattr(cfg, "memory_spawn_update", 0))
            for line in unused(setting_of(model, cfg, self.flags, spawn)):
                logger.warning(line)
        return model

    def build_criterion(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        criterion = super().build_criterion(cfg, *args, **kwargs)
        if self._gate is not None:
            check_criterion(criterion, self._gate)
        for line in unused_losses(cfg, self._gate):
            logger.warning(line)
        return criterion

    def train_step(
        self,
        sample: Any,
        model: nn.Module,
        criterion: Any,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        **kwargs: Any,
    ) -> Any:
        if _is_on_cpu(model):
            keep_freed_memory()
            criterion = _fast_on_cpu(criterion, autocast=self.autocasts_on_cpu)
        step = partial(
            super().train_step,
            *(sample, model, criterion, optimizer, update_num, ignore_grad),
            **kwargs,
        )
        # the backward pass is a part of the step
        with self._products(model):
            split_when_due(model, optimizer, self.flags, update_num, sample)
            spawn_tables_when_due(self, model, optimizer, update_num)
            if self._gate is None or not self._gate.cfg.moe_balance_bias:
                return step()
            # without a gradient on the router this is the first micro-batch of an update: what was
            # counted before belongs to an update that is over, or that fairseq has skipped
            if all(p.grad is None for p in self._gate.parameters()):
                self._load = LoadOfUpdate()
            with recording() as log:
                result = step()
        # a dummy batch, for a worker that has run out of data, balances nothing
        if not ignore_grad:
            self._load.add(log)
        return result

    def valid_step(self, sample: Any, model: nn.Module, criterion: Any) -> Any:
        with self._products(model), _fast_functions_by_onednn():
            return super().valid_step(sample, model, criterion)

    def inference_step(self, generator: Any, models: Any, *args: Any, **kwargs: Any) -> Any:
        with self._products(models[0]), _fast_functions_by_onednn():
            return super().inference_step(generator, models, *args, **kwargs)

    def _products(self, model: nn.Module) -> AbstractContextManager[None]:
        """A block in which float32 products are made as `--cpu-matmul` says, on a CPU."""
        if not _is_on_cpu(model):
            return nullcontext()
        # tasks of older checkpoints lack the flag
        return products(choose(str(getattr(self.flags, "cpu_matmul", "auto"))))

    def optimizer_step(self, optimizer: Any, model: Any, update_num: int) -> None:
        super().optimizer_step(optimizer, model, update_num)
        # validation and the checkpoint that follow belong to the finished update
        model.set_num_updates(update_num + 1)
        for name, layer in moe_layers(model):
            event = layer.gate.after_update(layer.phase, lambda layer=layer: self._load.of(layer))
            if event:
                logger.info("update %d: %s of %s", update_num + 1, event, name)

    def get_batch_iterator(
        self,
        dataset: Any,
        *args: Any,
        epoch: int = 1,
        disable_iterator_cache: bool = False,
        update_epoch_batch_itr: bool = False,
        **kwargs: Any,
    ) -> Any:
        # fairseq seeds batches by the epoch in which it builds them and then reuses them: a run
        # resumed in epoch 3 would see other batches than a run that came there from epoch 1
        reused = not (disable_iterator_cache or update_epoch_batch_itr)
        if reused and self.can_reuse_epoch_itr(dataset):
            epoch = 1
        return super().get_batch_iterator(
            dataset,
            *args,
            epoch=epoch,
            disable_iterator_cache=disable_iterator_cache,
            update_epoch_batch_itr=update_epoch_batch_itr,
            **kwargs,
        )


def _is_on_cpu(model: nn.Module) -> bool:
    return next(model.parameters()).device.type == "cpu"


def _fast_functions_by_onednn() -> AbstractContextManager[None]:
    return fast_functions() if by_onednn() else nullcontext()


def _fast_on_cpu(criterion: Any, *, autocast: bool) -> Callable[[Any, Any], Any]:
    """A criterion whose forward pass runs in `fast_functions`; the backward pass after it does not.

    With `autocast` it runs in bfloat16 too.
    """

    def run(model: Any, sample: Any) -> Any:
        with fast_functions(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return criterion(model, sample)

    return run


class LoadOfUpdate:
    """The load of each layer's experts, summed over the micro-batches of one update."""

    def __init__(self) -> None:
        self._load: dict[str, Tensor] = {}

    def add(self, log: RoutingLog) -> None:
        """Add what a micro-batch recorded; before the split there is nothing to balance."""
        for record in log.records:
            if record.stage == Stage.DIVERSIFY:
                continue
            load = self._load.get(record.name)
            self._load[record.name] = record.load if load is None else load + record.load

    def of(self, layer: EvoMoELayer) -> Tensor:
        """Pairs of each expert of a layer, (E,), summed over all workers; all must call it."""
        device = next(layer.parameters()).device
        load = self._load.get(layer.name)
        if load is None:
            load = torch.zeros(layer.cfg.moe_expert_count, device=device)
        load = load.detach().clone()
        if dist.is_initialized() and distributed_utils.get_data_parallel_world_size() > 1:
            dist.all_reduce(load, group=distributed_utils.get_data_parallel_group())
        return load
