"""What the flags of a task mean for a model, and which of them cannot work together."""

import logging
from typing import Any

import torch
import torch.distributed as dist

from fairseq_evomoe.config import EvolutionConfig, MoEConfig
from fairseq_evomoe.modules.gates import Gate
from fairseq_evomoe.modules.split import SplitRule
from fairseq_evomoe.options import ExpertSave, values_of
from fairseq_evomoe.parallel.mesh import Mesh, group_size, make_mesh
from fairseq_evomoe.schedule import EvolutionSchedule

logger = logging.getLogger(__name__)


def schedule_of(flags: EvolutionConfig, gate: Gate) -> EvolutionSchedule:
    """The schedule that a task's flags describe for a kind of gate.

    Raises:
        ValueError: a flag is out of range; the message names it and the fix.
    """
    if flags.ddp_backend == "fully_sharded":
        raise ValueError(
            "--ddp-backend fully_sharded: experts cannot split while each worker holds a shard of "
            "them; use legacy_ddp or pytorch_ddp"
        )
    SplitRule.from_flags(flags)
    return gate.schedule(flags)


def on_cpu(flags: EvolutionConfig) -> bool:
    """Whether the model will train on a CPU."""
    return bool(flags.cpu) or not torch.cuda.is_available()


def check_machine(flags: EvolutionConfig) -> None:
    """Refuse flags that cannot work on this machine, which fairseq would notice late or never.

    Raises:
        ValueError: names the flag and the fix.
    """
    if flags.fp16 and on_cpu(flags):
        if not (flags.fp16_no_flatten_grads or flags.memory_efficient_fp16):
            raise ValueError(
                "--fp16: fairseq keeps flattened fp32 weights on GPUs only; on a CPU give --amp "
                "or --bf16 instead, or add --fp16-no-flatten-grads"
            )
        logger.warning("--fp16: CPUs have no fast fp16 products; use --amp or --bf16, or fp32")


def check_workers(model: Any) -> None:
    """Refuse flags of a model with which workers would wait for each other, or mix their layers.

    Raises:
        ValueError: names the flag and the fix.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 or not getattr(model, "moe_balance_all_ranks", False):
        return
    for side in ("encoder", "decoder"):
        if getattr(model, f"{side}_layerdrop", 0) > 0:
            raise ValueError(
                f"--{side}-layerdrop: not with --moe-balance-all-ranks on several workers: each "
                "drops other layers, and their loads would be added up; leave out one of the two"
            )


def check_criterion(criterion: Any, gate: Gate) -> None:
    """Refuse a criterion without a loss that the gate needs; warn of one without any.

    Raises:
        ValueError: names the flag and the fix.
    """
    routing = getattr(criterion, "routing", None)
    for loss in gate.needs_losses:
        if routing is None or not routing.trains(loss):
            raise ValueError(
                f"--moe-gate {gate.cfg.moe_gate} freezes a router that its distillation loss "
                "teaches: train with a moe_ criterion and --stable-distill-loss-wt above 0"
            )
    if routing is None:
        logger.warning(
            "this criterion knows no routing losses: nothing balances the experts, and no routing "
            "metric is logged; use the moe_ criterion of the same name"
        )


def expert_mesh(flags: EvolutionConfig, model: Any) -> Mesh | None:
    """Who holds which experts, by the flags of a task and a model; None: every worker holds all.

    Raises:
        ValueError: another flag is given that expert parallelism cannot serve.
    """
    size = flags.expert_parallel_size
    if not flags.expert_parallel:
        if size is not None:
            raise ValueError(f"--expert-parallel-size {size}: give --expert-parallel too")
        return None
    _refuse_with_expert_parallel(flags, model)
    moe = MoEConfig.from_args(model)
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 or not moe.moe_expert_count:
        logger.info("--expert-parallel: there is one worker or no expert, nothing to distribute")
        return None
    size = group_size(world, moe.moe_expert_count, size)
    logger.info(
        "--expert-parallel: %d of %d experts per layer on each worker, %d copies of each",
        *(moe.moe_expert_count // size, moe.moe_expert_count, world // size),
    )
    return make_mesh(size)


def _refuse_with_expert_parallel(flags: EvolutionConfig, model: Any) -> None:
    saves = values_of(ExpertSave)
    if flags.expert_parallel_save not in saves:
        raise ValueError(
            f"--expert-parallel-save {flags.expert_parallel_save}: choose {' or '.join(saves)}"
        )
    flattened = flags.fp16 and not (flags.fp16_no_flatten_grads or flags.memory_efficient_fp16)
    sharded = flags.expert_parallel_save == "sharded"
    refused = {
        "--fp16": (
            flattened,
            "flattened masters forget which of them are experts; add --fp16-no-flatten-grads or "
            "--memory-efficient-fp16",
        ),
        "--amp": (flags.amp, "each worker would skip batches on its own; use --bf16 or --fp16"),
        "--use-bmuf": (flags.use_bmuf, "it averages all weights; leave it out"),
        "--ddp-backend slowmo": (
            flags.ddp_backend == "slowmo",
            "it averages all weights; use legacy_ddp or pytorch_ddp",
        ),
        "--zero-sharding os": (
            flags.zero_sharding == "os",
            "it shards the optimizer by other rules; leave it out",
        ),
        "--write-checkpoints-asynchronously": (
            sharded and flags.write_checkpoints_asynchronously,
            "with --expert-parallel-save sharded the folder of experts would exist before the "
            "checkpoint that refers to it; leave it out",
        ),
        "--eval-bleu": (
            getattr(flags, "eval_bleu", False),
            "workers generate in different numbers of steps and would wait for each other for "
            "ever; score checkpoints with fairseq-generate",
        ),
        **{
            f"--{side}-layerdrop": (
                getattr(model, f"{side}_layerdrop", 0) > 0,
                "workers would drop different layers, and those that keep a layer would wait for "
                "the others; leave it out",
            )
            for side in ("encoder", "decoder")
        },
    }
    for flag, (given, fix) in refused.items():
        if given:
            raise ValueError(f"{flag}: not with --expert-parallel: {fix}")
