"""The hook between fairseq's training loop and the layers: a mixin for every task."""

import logging
from typing import Any

import torch
from torch import nn

from fairseq_evomoe.config import EvolutionConfig
from fairseq_evomoe.modules.experts import DIVERSIFY_MODES
from fairseq_evomoe.modules.moe_layer import EvoMoELayer
from fairseq_evomoe.schedule import EvolutionSchedule, resolve
from fairseq_evomoe.tasks.optimizer_views import OptimizerViews

logger = logging.getLogger(__name__)


def check_flags(cfg: EvolutionConfig) -> EvolutionSchedule:
    """The schedule that the task's flags describe.

    Raises:
        ValueError: a flag is out of range; the message names it and the fix.
    """
    if cfg.ddp_backend == "fully_sharded":
        raise ValueError(
            "--ddp-backend fully_sharded: experts cannot split while each worker holds a shard of "
            "them; use legacy_ddp or pytorch_ddp"
        )
    if cfg.evo_diversify not in DIVERSIFY_MODES:
        raise ValueError(
            f"--evo-diversify {cfg.evo_diversify!r}: choose one of {', '.join(DIVERSIFY_MODES)}"
        )
    if not 0 <= cfg.evo_diversify_ratio <= 1:
        raise ValueError(
            f"--evo-diversify-ratio {cfg.evo_diversify_ratio}: a share of hidden units, 0 to 1"
        )
    if cfg.evo_diversify_noise < 0:
        raise ValueError(f"--evo-diversify-noise {cfg.evo_diversify_noise}: must be >= 0")
    return resolve(
        spawn=cfg.evo_spawn_update,
        anneal=cfg.dts_anneal_updates,
        hard=cfg.dts_hard_update,
        start=cfg.dts_temperature_start,
        end=cfg.dts_temperature_end,
        shape=cfg.dts_temperature_schedule,
        max_update=cfg.max_update,
    )


def moe_layers(model: nn.Module) -> list[tuple[str, EvoMoELayer]]:
    """The MoE layers of a model, wrapped for data parallel or not, with their module names."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, EvoMoELayer)]


class EvolutionMixin:
    """Gives the layers their schedule, splits the experts on time, keeps validation in step.

    Everything derives from the number of finished updates and from the layers' saved state, so an
    interrupted run continues as if nothing had happened.
    """

    cfg: Any

    def build_model(self, cfg, from_checkpoint: bool = False):
        model = super().build_model(cfg, from_checkpoint)
        layers = moe_layers(model)
        # inference reads the stage from the checkpoint, a dense model has none
        if layers and not from_checkpoint:
            schedule = check_flags(self.cfg)
            for _, layer in layers:
                layer.follow(schedule)
            logger.info("evolution: %s", schedule)
        return model

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kw):
        self.evolve(model, optimizer, update_num)
        return super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad=ignore_grad, **kw
        )

    def optimizer_step(self, optimizer, model, update_num):
        super().optimizer_step(optimizer, model, update_num)
        # validation and the checkpoint that follow belong to the finished update
        model.set_num_updates(update_num + 1)

    def get_batch_iterator(
        self, dataset, *, epoch=1, disable_iterator_cache=False, update_epoch_batch_itr=False, **kw
    ):
        # fairseq seeds batches by the epoch in which it builds them, then reuses them: a run
        # resumed in epoch 3 would see other batches than one that came there from epoch 1
        reused = not (disable_iterator_cache or update_epoch_batch_itr)
        if reused and self.can_reuse_epoch_itr(dataset):
            epoch = 1
        return super().get_batch_iterator(
            dataset,
            epoch=epoch,
            disable_iterator_cache=disable_iterator_cache,
            update_epoch_batch_itr=update_epoch_batch_itr,
            **kw,
        )

    def evolve(self, model: nn.Module, optimizer: Any, update_num: int) -> None:
        """Split the base expert of each layer whose time has come; otherwise nothing."""
        due = [
            (name, layer)
            for name, layer in moe_layers(model)
            if not layer.spawned and layer.schedule and update_num >= layer.schedule.spawn
        ]
        if not due:
            return
        views = OptimizerViews(optimizer)
        for _, layer in due:
            split = layer.split(
                self.cfg.evo_diversify,
                ratio=self.cfg.evo_diversify_ratio,
                noise=self.cfg.evo_diversify_noise,
                seed=self.cfg.seed,
            )
            for name, parameter in layer.experts.named_parameters():
                master = views.master(parameter)
                split.weights_(name, master)
                if master is not parameter.data:
                    with torch.no_grad():
                        parameter.copy_(master)
                for moment in views.moments(parameter):
                    split.moments_(name, moment)
            layer.spawned = True
        logger.info(
            "update %d: split the base expert of %d layers (--evo-diversify %s)",
            update_num,
            len(due),
            self.cfg.evo_diversify,
        )
