"""The split of the base experts in the middle of a run, and what it does, for the log."""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_evomoe.config import EvolutionConfig
from fairseq_evomoe.modules.moe_layer import EvoMoELayer, moe_layers
from fairseq_evomoe.modules.plan import TokenBatch, real_rows
from fairseq_evomoe.modules.split import SplitRule, diversity
from fairseq_evomoe.tasks.optimizer_views import OptimizerViews

logger = logging.getLogger(__name__)


def split_when_due(
    model: nn.Module,
    optimizer: Any,
    flags: EvolutionConfig,
    update_num: int,
    sample: Any = None,
) -> None:
    """Split the base expert of each layer whose time has come; otherwise do nothing.

    Weights, fp32 masters and optimizer state are split alike. With a `sample`, a pass over it
    measures what the split does, for the log.
    """
    due = [
        (name, layer)
        for name, layer in moe_layers(model)
        if (schedule := layer.timeline.schedule) is not None
        and not layer.timeline.has_split
        and update_num >= schedule.spawn
    ]
    if not due:
        return
    views = OptimizerViews(optimizer)
    rule = SplitRule.from_flags(flags)
    inputs = layer_inputs(model, [layer for _, layer in due], sample)
    for name, layer in due:
        x = inputs.get(layer)
        experts = layer.experts
        before = None if x is None else experts.eval().run_base(x).detach()
        split = layer.split(rule, seed=flags.seed)
        split.apply(experts, master=views.master, moments=views.moments)
        for parameter in experts.parameters():
            views.mean_over_base(parameter)
        layer.set_split(True)
        experts.train(layer.training)
        if x is not None and before is not None:
            measured = diversity(experts, x, before)
            logger.info("update %d: split %s: %s", update_num, name, measured)
    logger.info(
        "update %d: split the base expert of %d layers (--evo-diversify %s)",
        *(update_num, len(due), flags.evo_diversify),
    )


@torch.no_grad()
def layer_inputs(
    model: nn.Module, layers: list[EvoMoELayer], sample: Any, *, max_tokens: int = 1024
) -> dict[EvoMoELayer, Tensor]:
    """What each layer reads of a batch in evaluation: layer -> (T, D), of `max_tokens` at most.

    No random number is drawn and the model is left as it was. Without a sample the result is empty.
    """
    if not sample or "net_input" not in sample:
        return {}
    seen: dict[EvoMoELayer, Tensor] = {}

    def keep(layer: EvoMoELayer, args: tuple[Tensor, TokenBatch | None]) -> None:
        states, _ = real_rows(*args)
        seen[layer] = states[:max_tokens].clone()

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
