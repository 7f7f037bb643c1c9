"""Routing records -> loss terms -> logging outputs -> metrics. Every metric key is defined here.

Letters: R MoE layers, E experts.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.constants import StrEnum
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_evomoe.compat.loggers import DETAIL
from fairseq_evomoe.criterions.logs import summed
from fairseq_evomoe.criterions.rerouted import FirstExperts, log_rerouted
from fairseq_evomoe.criterions.table_metrics import count_rows, log_rows
from fairseq_evomoe.memory.usage import counting_rows
from fairseq_evomoe.modules.moe_layer import EvoMoELayer, moe_layers
from fairseq_evomoe.modules.records import LOSSES, RoutingLog, RoutingRecord, recording
from fairseq_evomoe.options import option, values_of
from fairseq_evomoe.schedule import Stage


class LayerLosses(StrEnum):
    """Values of `--moe-gate-loss-combine-method`."""

    sum = "sum"
    average = "average"


@dataclass
class RoutingLossConfig(FairseqDataclass):
    """Weights of the routing losses. It is part of every MoE criterion's configuration."""

    moe_gate_loss_wt: float = option(0.01, "weight of the load-balance loss")
    moe_z_loss_wt: float = option(0.0, "weight of the router z-loss; 0.001 is usual")
    moe_entropy_loss_wt: float = option(
        0.0, "weight of the gate's entropy; above 0 it pushes tokens to fewer experts"
    )
    stable_distill_loss_wt: float = option(
        0.3,
        "weight of the loss that distils StableMoE's word router",
        old_name="--moe-distill-loss-wt",
    )
    moe_gate_loss_combine_method: LayerLosses = option(
        "sum", "combine the routing losses of the layers: sum or average"
    )


class RoutingLosses:
    """The routing part of a criterion.

    Args:
        cfg: anything with the fields of `RoutingLossConfig`.

    Raises:
        ValueError: a weight is negative or the method is unknown; the message names the flag.
    """

    def __init__(self, cfg: RoutingLossConfig) -> None:
        weights = {
            "balance": ("--moe-gate-loss-wt", cfg.moe_gate_loss_wt),
            "z": ("--moe-z-loss-wt", cfg.moe_z_loss_wt),
            "entropy": ("--moe-entropy-loss-wt", cfg.moe_entropy_loss_wt),
            "distill": ("--stable-distill-loss-wt", cfg.stable_distill_loss_wt),
        }
        for flag, value in weights.values():
            if not value >= 0:
                raise ValueError(f"{flag} {value}: a loss weight must be >= 0")
        method = str(cfg.moe_gate_loss_combine_method)
        methods = values_of(LayerLosses)
        if method not in methods:
            raise ValueError(
                f"--moe-gate-loss-combine-method {method!r}: choose {' or '.join(methods)}"
            )
        self.weights = [weights[name][1] for name in LOSSES]
        self.average = method == "average"

    def trains(self, name: str) -> bool:
        """Whether the loss `name`, one of `LOSSES`, has a weight."""
        return self.weights[LOSSES.index(name)] > 0

    def add(
        self,
        loss: Tensor,
        log: RoutingLog,
        layers: Sequence[EvoMoELayer],
        *,
        sample_size: Any,
        training: bool,
    ) -> tuple[Tensor, dict[str, Any]]:
        """The loss to optimise, and what to log about the routing.

        In training the loss is task + sample_size * sum_i w_i * loss_i, so that fairseq's division
        by the sample size leaves the weights as given. In validation it is the task loss alone, so
        that the best checkpoint is chosen by the task.

        Args:
            loss: the task loss, summed over the batch.
            log: what the layers recorded in this forward pass. A layer that was dropped
                (`--encoder-layerdrop`) has no record and counts with zeros, and a layer that ran
                several times counts with the mean of its losses.
            layers: all MoE layers of the model, so that every worker logs the same keys.
            sample_size: what fairseq divides the loss by.
            training: whether the model trains.

        Returns:
            loss; logging outputs that may be summed over micro-batches and workers.
        """
        if not layers:
            return loss, {}
        each = [_one_record(layer, log.of(layer.name), loss.device) for layer in layers]
        losses = torch.stack([r.losses for r in each])
        if training:
            combined = losses.mean(0) if self.average else losses.sum(0)
            routing_loss = (combined * combined.new_tensor(self.weights)).sum()
            loss = loss + routing_loss.to(loss.dtype) * sample_size

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(r, name) for r in each])

        ran = log.records
        return loss, {
            "moe_losses": losses.detach().sum(0) / max(1, len({r.name for r in ran})) * sample_size,
            "moe_sample_size": sample_size * (1 if ran else 0),
            "moe_tokens": stacked("tokens"),
            "moe_load": stacked("load"),
            "moe_entropy": stacked("entropy"),
            "moe_dropped": stacked("dropped"),
            "moe_batches": 1 if ran else 0,
            "moe_stage": float(ran[0].stage) if ran else 0.0,
            "moe_temperature": ran[0].temperature if ran else 0.0,
            "moe_layer_batches": 1,
            "moe_layer_ids": torch.tensor([_layer_id(layer.name) for layer in layers]),
        }


def _one_record(
    layer: EvoMoELayer, records: Sequence[RoutingRecord], device: torch.device
) -> RoutingRecord:
    """A layer's records of one call as one: counts are added up, losses averaged."""
    if len(records) == 1:
        return records[0]
    phase = layer.phase
    zero = torch.zeros((), device=device)
    load = torch.zeros(layer.cfg.moe_expert_count, device=device)
    losses = torch.zeros(len(LOSSES), device=device)
    return RoutingRecord(
        name=layer.name,
        stage=phase.stage,
        temperature=phase.temperature,
        tokens=sum((r.tokens for r in records), zero),
        load=sum((r.load for r in records), load),
        entropy=sum((r.entropy for r in records), zero),
        dropped=sum((r.dropped for r in records), zero),
        losses=sum((r.losses for r in records), losses) / max(1, len(records)),
    )


def refuse_compiled(model: nn.Module, layers: Sequence[EvoMoELayer], log: RoutingLog) -> None:
    """Raise an error if layers left no record because torch.compile runs them."""
    silent = [layer.name for layer in layers if not log.of(layer.name)]
    # the modules are looked through only where LayerDrop or a compiler has left a gap
    if silent and any(
        isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
        for m in model.modules()
    ):
        raise RuntimeError(
            "torch.compile: routing losses and metrics do not pass through a compiled MoE layer "
            f"({', '.join(silent)}); compile for inference, or train with a criterion of fairseq's "
            "own"
        )


class RoutingMixin:
    """Adds routing losses and metrics to a fairseq criterion; list it first among the bases."""

    routing: RoutingLosses
    first_experts: FirstExperts

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> Any:
        criterion = super().build_criterion(cfg, task)
        criterion.routing = RoutingLosses(cfg)
        criterion.first_experts = FirstExperts()
        return criterion

    def forward(self, model: Any, sample: Any, reduce: bool = True) -> Any:
        with recording() as log, counting_rows() as counts:
            loss, sample_size, logging_output = super().forward(model, sample, reduce)
        layers = [layer for _, layer in moe_layers(model)]
        refuse_compiled(model, layers, log)
        if not model.training:
            logging_output.update(count_rows(model, counts))
            if layers:
                tokens = sample["net_input"]["src_tokens"]
                logging_output.update(self.first_experts.compare(tokens, log))
        if reduce:
            loss, routing = self.routing.add(
                loss, log, layers, sample_size=sample_size, training=model.training
            )
            logging_output.update(routing)
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs: Any) -> None:
        super().reduce_metrics(logging_outputs)
        log_routing(logging_outputs)
        log_rerouted(logging_outputs)
        log_rows(logging_outputs)


_SIDES = ("encoder", "decoder")


def _layer_id(name: str) -> int:
    """Encode a layer name as a number, since workers exchange tensors.

    "encoder.3" becomes 3 and "decoder.3" becomes 1003.
    """
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
    fraction = load / pairs[:, None].clamp(min=1)
    weight = float(tokens.sum())
    _log("moe_gate_entropy", total("moe_entropy").sum() / tokens.sum(), weight, priority=45)
    _log("moe_load_max_mean", fraction.max() * experts, weight, priority=46)
    _log("moe_dead_experts", (fraction < 1 / (10 * experts)).double().mean(), weight, priority=47)
    ids = (total("moe_layer_ids") / total("moe_layer_batches")).tolist()
    for number, row in zip(ids, fraction.tolist(), strict=True):
        for e, value in enumerate(row):
            key = f"{DETAIL}{_layer_name(number)}/e{e}"
            metrics.log_scalar(key, value, weight, priority=900, round=4)


def _log(key: str, value: Any, weight: float, *, priority: int) -> None:
    metrics.log_scalar(key, float(value), weight, priority=priority, round=4)
