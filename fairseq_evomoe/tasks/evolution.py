"""The hook between fairseq's training loop and the layers: a mixin for every task."""

import logging
from typing import Any

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fairseq_evomoe.config import EvolutionConfig, MoEConfig
from fairseq_evomoe.kernels.pages import keep_freed_memory
from fairseq_evomoe.modules.gates import Gate, ScoreGate, StableGate
from fairseq_evomoe.modules.moe_layer import EvoMoELayer, moe_layers
from fairseq_evomoe.modules.split import Diversity, SplitRule, diversity
from fairseq_evomoe.parallel import checkpoints
from fairseq_evomoe.parallel.mesh import Mesh, group_size, make_mesh, sharing
from fairseq_evomoe.schedule import EvolutionSchedule, Stage, resolve
from fairseq_evomoe.tasks.averages import start_averages_at_split
from fairseq_evomoe.tasks.optimizer_views import OptimizerViews

logger = logging.getLogger(__name__)


def check_flags(cfg: EvolutionConfig, gate: Gate) -> EvolutionSchedule:
    """The schedule that the task's flags describe for a kind of gate.

    Raises:
        ValueError: a flag is out of range; the message names it and the fix.
    """
    if cfg.ddp_backend == "fully_sharded":
        raise ValueError(
            "--ddp-backend fully_sharded: experts cannot split while each worker holds a shard of "
            "them; use legacy_ddp or pytorch_ddp"
        )
    SplitRule.from_flags(cfg, shared=gate.cfg.moe_shared_expert)
    spawn = cfg.evo_spawn_update
    if spawn == -1 and not gate.evolves:
        spawn = 0
    if not gate.changes_over_time:
        return resolve(spawn=spawn, anneal=0, hard=0, max_update=cfg.max_update)
    if isinstance(gate, StableGate):
        return resolve(
            spawn=spawn,
            anneal=0,
            hard=cfg.stable_freeze_update,
            hard_flag="--stable-freeze-update",
            max_update=cfg.max_update,
        )
    return resolve(
        spawn=spawn,
        anneal=cfg.dts_anneal_updates,
        hard=cfg.dts_hard_update,
        start=cfg.dts_temperature_start,
        end=cfg.dts_temperature_end,
        shape=cfg.dts_temperature_schedule,
        max_update=cfg.max_update,
    )


def expert_mesh(cfg: EvolutionConfig, model: Any) -> Mesh | None:
    """Who holds which experts, by the task's flags and a model's; None: every worker all.

    Raises:
        ValueError: something else is asked for that expert parallelism cannot serve.
    """
    if not cfg.expert_parallel:
        if cfg.expert_parallel_size:
            raise ValueError(
                f"--expert-parallel-size {cfg.expert_parallel_size}: give --expert-parallel too"
            )
        return None
    if cfg.expert_parallel_save not in ("gathered", "sharded"):
        raise ValueError(
            f"--expert-parallel-save {cfg.expert_parallel_save}: choose gathered or sharded"
        )
    flattened = cfg.fp16 and not (cfg.fp16_no_flatten_grads or cfg.memory_efficient_fp16)
    refused = {
        "--fp16": (
            flattened,
            "flattened masters forget which of them are experts; add --fp16-no-flatten-grads or "
            "--memory-efficient-fp16",
        ),
        "--amp": (cfg.amp, "each worker would skip its own batches; use --bf16 or --fp16"),
        "--use-bmuf": (cfg.use_bmuf, "it averages all weights; leave it out"),
        "--ddp-backend slowmo": (
            cfg.ddp_backend == "slowmo",
            "it averages all weights; use legacy_ddp or pytorch_ddp",
        ),
        "--zero-sharding os": (
            cfg.zero_sharding == "os",
            "it shards the optimizer by other rules; leave it out",
        ),
        "--write-checkpoints-asynchronously": (
            cfg.expert_parallel_save == "sharded" and cfg.write_checkpoints_asynchronously,
            "with --expert-parallel-save sharded a folder would wait for its file; leave it out",
        ),
        "--eval-bleu": (
            getattr(cfg, "eval_bleu", False),
            "workers generate in steps of their own, and would wait for each other for ever; score "
            "checkpoints by fairseq-generate",
        ),
    }
    for flag, (given, fix) in refused.items():
        if given:
            raise ValueError(f"{flag}: not with --expert-parallel: {fix}")
    moe = MoEConfig.from_args(model)
    if not dist.is_initialized() or dist.get_world_size() == 1 or not moe.moe_expert_count:
        logger.info("--expert-parallel: nothing to share out, one worker or no experts")
        return None
    size = group_size(dist.get_world_size(), moe.moe_expert_count, cfg.expert_parallel_size)
    checkpoints.install()
    logger.info(
        "--expert-parallel: %d of %d experts a layer on each worker, %d copies of each",
        *(moe.moe_expert_count // size, moe.moe_expert_count, dist.get_world_size() // size),
    )
    return make_mesh(size)


class EvolutionMixin:
    """Gives the layers their schedule, splits the experts on time, keeps validation in step.

    Everything derives from the number of finished updates and from the layers' saved state, so an
    interrupted run continues as if nothing had happened.
    """

    cfg: Any
    args: Any

    @property
    def flags(self) -> EvolutionConfig:
        """The task's configuration; fairseq's older tasks keep it in `args`."""
        return self.args if getattr(self, "cfg", None) is None else self.cfg

    def build_model(self, cfg, from_checkpoint: bool = False):
        with sharing(None if from_checkpoint else expert_mesh(self.flags, cfg)):
            model = super().build_model(cfg, from_checkpoint)
        layers = moe_layers(model)
        # inference reads the stage from the checkpoint, a dense model has none
        if layers and not from_checkpoint:
            schedule = check_flags(self.flags, layers[0][1].gate)
            for _, layer in layers:
                layer.follow(schedule)
                layer.gate.ready()
            self._gate = layers[0][1].gate
            start_averages_at_split()
            apart = list(checkpoints.named_shares(model))
            if apart:
                # torch's DDP would average them
                DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, apart)
            logger.info("evolution: %s", schedule)
        return model

    def build_criterion(self, cfg, *args, **kwargs):
        criterion = super().build_criterion(cfg, *args, **kwargs)
        gate = getattr(self, "_gate", None)
        if gate is not None:
            self._check_criterion(criterion, gate)
        return criterion

    @staticmethod
    def _check_criterion(criterion: Any, gate: Gate) -> None:
        routing = getattr(criterion, "routing", None)
        if isinstance(gate, StableGate) and (routing is None or not routing.trains("distill")):
            raise ValueError(
                "--moe-gate stable freezes a router that its distillation loss teaches: train with "
                "a moe_ criterion and --moe-distill-loss-wt above 0"
            )
        if routing is None:
            logger.warning(
                "this criterion knows no routing losses: nothing balances the experts, and no "
                "routing metric is logged; use its moe_ twin"
            )

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, **kw):
        if next(model.parameters()).device.type == "cpu":
            keep_freed_memory()
        self.evolve(model, optimizer, update_num, sample)
        for _, layer in moe_layers(model):
            # a dummy batch, for a worker that has run out of data, balances nothing
            layer.gate.counting = not ignore_grad
            if isinstance(layer.gate, ScoreGate):
                layer.gate.forget_skipped()
        return super().train_step(
            sample, model, criterion, optimizer, update_num, ignore_grad=ignore_grad, **kw
        )

    def optimizer_step(self, optimizer, model, update_num):
        super().optimizer_step(optimizer, model, update_num)
        # validation and the checkpoint that follow belong to the finished update
        model.set_num_updates(update_num + 1)
        for name, layer in moe_layers(model):
            gate = layer.gate
            if isinstance(gate, ScoreGate) and layer.cfg.moe_balance_bias:
                gate.move_bias(_sum_over_workers)
            if isinstance(gate, StableGate) and not gate.frozen and layer.clock.stage == Stage.HARD:
                gate.freeze()
                logger.info("update %d: froze the router of %s", update_num + 1, name)

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

    def evolve(self, model: nn.Module, optimizer: Any, update_num: int, sample: Any = None) -> None:
        """Split the base expert of each layer whose time has come; otherwise nothing.

        With a `sample`, a pass over it measures what the split does, for the log.
        """
        due = [
            (name, layer)
            for name, layer in moe_layers(model)
            if not layer.spawned and layer.schedule and update_num >= layer.schedule.spawn
        ]
        if not due:
            return
        views = OptimizerViews(optimizer)
        rule = SplitRule.from_flags(self.flags)
        inputs = layer_inputs(model, [layer for _, layer in due], sample)
        for name, layer in due:
            x = inputs.get(layer)
            before = None if x is None else layer.experts.eval().base(x)
            split = layer.split(rule, seed=self.flags.seed)
            for part, parameter in layer.experts.named_parameters():
                master = views.master(parameter)
                split.weights_(part, master)
                if master is not parameter.data:
                    with torch.no_grad():
                        parameter.copy_(master)
                for moment in views.moments(parameter):
                    split.moments_(part, moment)
            layer.spawned = True
            layer.experts.train(layer.training)
            if x is not None and before is not None:
                measured: Diversity = diversity(layer.experts, x, before)
                logger.info("update %d: split %s: %s", update_num, name, measured)
        logger.info(
            "update %d: split the base expert of %d layers (--evo-diversify %s)",
            update_num,
            len(due),
            self.flags.evo_diversify,
        )


def _sum_over_workers(counts: Tensor) -> None:
    if dist.is_initialized() and distributed_utils.get_data_parallel_world_size() > 1:
        dist.all_reduce(counts, group=distributed_utils.get_data_parallel_group())


@torch.no_grad()
def layer_inputs(
    model: nn.Module, layers: list[EvoMoELayer], sample: Any, *, most: int = 1024
) -> dict[EvoMoELayer, Tensor]:
    """What each layer reads of a batch in evaluation: layer -> (T, D), `most` real tokens at most.

    Draws no random number and leaves the model as it was. Empty without a sample.
    """
    if not sample or "net_input" not in sample:
        return {}
    seen: dict[EvoMoELayer, Tensor] = {}

    def keep(layer: EvoMoELayer, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].size(-1))
        real = layer.tokens.real if layer.tokens is not None else None
        seen[layer] = (x if real is None else x.index_select(0, real))[:most].clone()

    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    training = model.training
    try:
        model.eval()
        model(**sample["net_input"])
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen
