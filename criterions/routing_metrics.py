"""Routing records -> loss terms -> logging outputs -> metrics. Every metric key is named here.

Letters: R MoE layers, E experts.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor

from fairseq_evomoe.compat.running import DETAIL
from fairseq_evomoe.criterions.bucket_metrics import count, log_buckets
from fairseq_evomoe.criterions.logs import summed
from fairseq_evomoe.modules.buckets import counting
from fairseq_evomoe.modules.records import LOSSES, RecordingLayer, recording
from fairseq_evomoe.schedule import Stage

_FLAGS = (
    "--moe-gate-loss-wt",
    "--moe-z-loss-wt",
    "--moe-entropy-loss-wt",
    "--moe-distill-loss-wt",
)


@dataclass
class RoutingLossConfig(FairseqDataclass):
    """Weights of the routing losses: a part of every MoE criterion's configuration."""

    moe_gate_loss_wt: float = field(
        default=0.01, metadata={"help": "weight of the load-balance loss"}
    )
    moe_z_loss_wt: float = field(
        default=0.0, metadata={"help": "weight of the router z-loss; 0.001 is usual"}
    )
    moe_entropy_loss_wt: float = field(
        default=0.0, metadata={"help": "weight of the gate's entropy; > 0 pushes to fewer experts"}
    )
    moe_distill_loss_wt: float = field(
        default=0.3, metadata={"help": "weight of StableMoE's distillation of its word router"}
    )
    moe_gate_loss_combine_method: str = field(
        default="sum", metadata={"help": "combine the layers' routing losses: sum or average"}
    )


class RoutingLosses:
    """The routing part of a criterion.

    Args:
        cfg: anything with the fields of `RoutingLossConfig`.

    Raises:
        ValueError: a weight is negative or the method unknown; the message names the flag.
    """

    def __init__(self, cfg: RoutingLossConfig) -> None:
        weights = {
            "balance": cfg.moe_gate_loss_wt,
            "z": cfg.moe_z_loss_wt,
            "entropy": cfg.moe_entropy_loss_wt,
            "distill": cfg.moe_distill_loss_wt,
        }
        for flag, value in zip(_FLAGS, weights.values(), strict=True):
            if not value >= 0:
                raise ValueError(f"{flag} {value}: a loss weight must be >= 0")
        if cfg.moe_gate_loss_combine_method not in ("sum", "average"):
            raise ValueError(
                f"--moe-gate-loss-combine-method {cfg.moe_gate_loss_combine_method!r}: "
                "choose sum or average"
            )
        self.weights = [weights[name] for name in LOSSES]
        self.average = cfg.moe_gate_loss_combine_method == "average"

    def trains(self, name: str) -> bool:
        """Whether the loss `name`, one of `LOSSES`, has a weight."""
        return self.weights[LOSSES.index(name)] > 0

    def add(
        self, loss: Tensor, layers: Sequence[RecordingLayer], *, sample_size: Any, training: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss to optimise, and what to log of the routing.

        In training it is task + sample_size * sum_i w_i * loss_i, so that fairseq's division by the
        sample size leaves the weights as given; in validation the task loss alone, so that the best
        checkpoint is chosen by the task.

        Args:
            loss: the task loss, summed over the batch.
            layers: MoE layers with their `record` of this batch.
            sample_size: what fairseq divides the loss by.
            training: whether the model trains.

        Returns:
            loss; logging outputs that may be summed over micro-batches and workers.
        """
        records = [layer.record for layer in layers]
        made = [r for r in records if r is not None]
        if not made:
            return loss, {}
        if training:
            # every layer has a port, run or dropped (--encoder-layerdrop): nothing stale is read
            zeros = torch.zeros_like(made[0].losses)
            values = torch.stack(
                [
                    layer.port.open(zeros if layer.record is None else layer.record.losses)
                    for layer in layers
                ]
            )
            combined = values.mean(0) if self.average else values.sum(0)
            routing_loss = (combined * combined.new_tensor(self.weights)).sum()
            loss = loss + routing_loss.to(loss.dtype) * sample_size

        def stacked(name: str) -> Tensor:
            empty = torch.zeros_like(getattr(made[0], name))
            return torch.stack([empty if r is None else getattr(r, name) for r in records])

        return loss, {
            "moe_losses": stacked("losses").sum(0) / len(made) * sample_size,
            "moe_sample_size": sample_size,
            "moe_tokens": stacked("tokens"),
            "moe_load": stacked("load"),
            "moe_entropy": stacked("entropy"),
            "moe_dropped": stacked("dropped"),
            "moe_batches": 1,
            "moe_stage": float(made[0].stage),
            "moe_temperature": made[0].temperature,
            "moe_layer_ids": torch.tensor([_layer_id(layer.name) for layer in layers]),
        }


class RoutingMixin:
    """Adds the routing losses and metrics to a fairseq criterion; stands before it in the bases."""

    routing: RoutingLosses

    @classmethod
    def build_criterion(cls, cfg, task):
        criterion = super().build_criterion(cfg, task)
        criterion.routing = RoutingLosses(cfg)
        return criterion

    def forward(self, model, sample, reduce=True):
        with recording(model) as layers, counting(model) as look_ups:
            loss, sample_size, log = super().forward(model, sample, reduce)
            log.update(count(look_ups))
            if reduce:
                loss, routing = self.routing.add(
                    loss, layers, sample_size=sample_size, training=model.training
                )
                log.update(routing)
        return loss, sample_size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        super().reduce_metrics(logging_outputs)
        log_routing(logging_outputs)
        log_buckets(logging_outputs)


_SIDES = ("encoder", "decoder")


def _layer_id(name: str) -> int:
    """ "encoder.3" -> 3, "decoder.3" -> 1003: names travel as numbers, workers exchange tensors."""
    side, index = name.split(".")
    return 1000 * _SIDES.index(side) + int(index)


def _layer_name(number: float) -> str:
    side, index = divmod(round(number), 1000)
    return f"{_SIDES[side]}.{index}"


def log_routing(logs: Sequence[Mapping[str, Any]]) -> None:
    """Log the routing metrics of one update or validation run.

    | key | meaning |
    | --- | --- |
    | moe_gate_loss, moe_z_loss | routing losses, unweighted, mean over layers |
    | moe_distill_loss | StableMoE's, nats per token; only where there is one |
    | moe_overflow | share of pairs that a capacity dropped; only where it dropped any |
    | moe_stage | 0 diversify, 1 sparsify, 2 hard |
    | moe_temperature | of the gate's softmax |
    | moe_active_experts | mean active experts per real token |
    | moe_gate_entropy | of the clean gate, nats per token |
    | moe_load_max_mean | load of the busiest expert over the mean, worst layer |
    | moe_dead_experts | share of experts with less than 1 / (10 E) of their layer's load |
    | moe_load/<layer>/e<i> | share of the layer's load on expert i |
    """
    logs = [log for log in logs if "moe_load" in log]
    batches = float(sum(log["moe_batches"] for log in logs))
    if not logs or not batches:
        return

    total = functools.partial(summed, logs)
    tokens, load = total("moe_tokens"), total("moe_load")
    if not tokens.sum():
        return
    sample_size = float(total("moe_sample_size"))
    stage = float(total("moe_stage")) / batches
    _log("moe_stage", stage, 1, priority=40)
    _log("moe_temperature", float(total("moe_temperature")) / batches, 1, priority=41)
    pairs = load.sum(1)
    dropped = total("moe_dropped").sum()
    active = (pairs.sum() - dropped) / tokens.sum()
    _log("moe_active_experts", active, float(tokens.sum()), priority=42)
    if sample_size:
        values = dict(zip(LOSSES, (total("moe_losses") / sample_size).tolist(), strict=True))
        _log("moe_gate_loss", values["balance"], sample_size, priority=43)
        _log("moe_z_loss", values["z"], sample_size, priority=44)
        if values["distill"]:
            _log("moe_distill_loss", values["distill"], sample_size, priority=44)
    if stage < Stage.SPARSIFY:
        return
    if dropped:
        _log("moe_overflow", dropped / pairs.sum(), float(tokens.sum()), priority=48)
    experts = load.size(1)
    share = load / pairs[:, None].clamp(min=1)
    weight = float(tokens.sum())
    _log("moe_gate_entropy", total("moe_entropy").sum() / tokens.sum(), weight, priority=45)
    _log("moe_load_max_mean", share.max() * experts, weight, priority=46)
    _log("moe_dead_experts", (share < 1 / (10 * experts)).double().mean(), weight, priority=47)
    ids = (total("moe_layer_ids") / batches).tolist()
    for number, row in zip(ids, share.tolist(), strict=True):
        for e, value in enumerate(row):
            key = f"{DETAIL}{_layer_name(number)}/e{e}"
            metrics.log_scalar(key, value, weight, priority=900, round=4)


def _log(key: str, value: Any, weight: float, *, priority: int) -> None:
    metrics.log_scalar(key, float(value), weight, priority=priority, round=4)
