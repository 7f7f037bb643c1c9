"""Runs a trained model over a data set, to measure its loss and the load of its experts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import utils
from fairseq.logging import metrics
from torch import Tensor
from tqdm import tqdm

from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import RoutingPlan


def batches(
    model: Any, task: Any, subset: str, max_tokens: int, *, shuffle: bool = False
) -> Iterator[dict[str, Any]]:
    """Iterate over the batches of `subset`, which are the same in every pass."""
    return task.get_batch_iterator(
        dataset=task.dataset(subset),
        max_tokens=max_tokens,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        required_batch_size_multiple=1,
        ignore_invalid_inputs=True,
        # a second pass must not count as a second epoch, in which a masked LM masks other tokens
        disable_iterator_cache=True,
    ).next_epoch_itr(shuffle=shuffle)


@dataclass(frozen=True)
class Usage:
    """Result of a pass over a validation set.

    Attributes:
        loss: loss of the task, as fairseq-validate prints it.
        load: layer name -> each expert's share of the layer's (token, expert) pairs, (E,) float64.
    """

    loss: float
    load: dict[str, Tensor]


@torch.no_grad()
def measure(model: Any, task: Any, cfg: Any, *, subset: str, max_tokens: int) -> Usage:
    """Run the model once over `subset` and return the loss and the load of each expert.

    Raises:
        ValueError: the set gives no batch.
    """
    cuda = torch.cuda.is_available() and not cfg.common.cpu
    if cuda:
        model.cuda()
    model.eval()
    layers = dict(moe_layers(model))
    load = {n: torch.zeros(m.cfg.moe_expert_count, dtype=torch.float64) for n, m in layers.items()}

    def count(name: str) -> Callable[[Any, Any, RoutingPlan], None]:
        def hook(gate: Any, args: Any, plan: RoutingPlan) -> None:
            load[name] += plan.active.sum(0).cpu()

        return hook

    hooks = [m.gate.register_forward_hook(count(n)) for n, m in layers.items()]
    criterion = task.build_criterion(cfg.criterion)
    logs = []
    try:
        for sample in tqdm(
            batches(model, task, subset, max_tokens), desc=subset, unit="batch", disable=None
        ):
            sample = utils.move_to_cuda(sample) if cuda else sample
            logs.append(task.valid_step(sample, model, criterion)[2])
    finally:
        for hook in hooks:
            hook.remove()
    if not logs:
        raise ValueError(f"--valid-subset {subset}: no batch fits; raise --max-tokens")
    with metrics.aggregate() as seen:
        task.reduce_metrics(logs, criterion)
    share = {n: x / x.sum().clamp(min=1) for n, x in load.items()}
    return Usage(float(seen.get_smoothed_values()["loss"]), share)
