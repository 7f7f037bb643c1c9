"""Dense layers become look-ups in the middle of a run (`--memory-spawn-update`).

A projection of attention keeps its weights, which are the linear part of its tables, and with them
the optimizer's moments. A feed-forward network gets look-ups that are fitted to it without data
first. Then, layer after layer, all tables are fitted to the dense layers' outputs on some batches
of the training set. Which batches these are follows from `--seed` alone, so that an interrupted run
that comes to the update again does the same.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from torch import Tensor, nn

from fairseq_evomoe.memory.conversion import Unit, Watch, calibrate, start, variance_kept
from fairseq_evomoe.memory.layer import MemoryFFN, MemoryLayer
from fairseq_evomoe.tasks.optimizer_views import OptimizerViews

logger = logging.getLogger(__name__)

TOKENS = 16384
"""Number of tokens on which tables are fitted; a quarter more tests the fit."""


def _unit(name: str, part: MemoryLayer | MemoryFFN, norm: nn.Module | None) -> Unit:
    """A part as `memory.conversion` knows it: what it computes now is what it shall compute."""
    output = lambda kw, out: out
    if isinstance(part, MemoryLayer):
        return Unit(name, part, part, output, part, part.dense_weight(), None)
    dtype = part.fc1.weight.dtype
    free = lambda x: part.dense(x.to(dtype)).float()
    return Unit(name, part.second, part, output, free, None, norm, part)


def units_of(model: nn.Module) -> list[Unit]:
    """The parts that are still dense, in forward order."""
    found = []
    for name, module in model.named_modules():
        # a feed-forward network's own look-ups are not parts for themselves
        if isinstance(module, MemoryLayer | MemoryFFN) and module.was_dense and module.is_dense:
            layer = model.get_submodule(name.rpartition(".")[0])
            before = getattr(layer, "normalize_before", False)
            norm = getattr(layer, "final_layer_norm", None) if before else None
            found.append(_unit(name, module, norm))
    return found


def batches(task: Any, model: Any, *, tokens: int, max_tokens: int) -> Iterator[dict[str, Any]]:
    """Batches of random sentences of the training set, with `tokens` target tokens in all.

    Args:
        task: whose training set is loaded.
        model: whose device they are moved to.
        tokens: when there are so many, the iteration ends; it ends early with the set.
        max_tokens: number of tokens after which a batch is full.
    """
    data = task.dataset(task.flags.train_subset)
    limits = model.max_positions()
    limit = min(limits) if isinstance(limits, tuple) else limits
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(task.flags.seed))
    cuda = next(model.parameters()).is_cuda
    chosen: list[Any] = []
    size = read = 0
    for i in order.tolist():
        length = data.num_tokens(i)
        if length > limit:
            continue
        chosen.append(data[i])
        size += length
        read += length
        if size >= max_tokens or read >= tokens:
            batch = data.collater(chosen)
            yield utils.move_to_cuda(batch) if cuda else batch
            chosen, size = [], 0
        if read >= tokens:
            return
    if chosen:
        batch = data.collater(chosen)
        yield utils.move_to_cuda(batch) if cuda else batch


@torch.no_grad()
def spawn(model: nn.Module, units: Sequence[Unit], samples: Sequence[Any], *, seed: int) -> None:
    """Turn the dense parts into look-ups, each fitted to what it computed before.

    Args:
        model: in evaluation mode.
        units: of `units_of`.
        samples: batches to fit the tables on.
        seed: of the random inputs of the fit without data.
    """
    watch = Watch()
    for unit in units:
        watch.targets(unit)
    wanted = watch.run(model, samples)
    for unit in units:
        (unit.ffn or unit.layer).become_look_up()
    # the rows of a projection are 0, which is its fit without data
    start([unit for unit in units if unit.ffn is not None], samples=8192, seed=seed)
    calibrate(model, units, samples, wanted)


def spawn_tables_when_due(task: Any, model: Any, optimizer: Any, update_num: int) -> None:
    """Turn dense layers into look-ups if their time has come; otherwise do nothing.

    Weights, fp32 masters and, on all workers, the same values are set.
    """
    if not task.spawn_update or update_num < task.spawn_update:
        return
    units = units_of(model)
    # done now, or in the run whose checkpoint was loaded: the model is not searched again
    task.spawn_update = 0
    if not units:
        return
    found = list(batches(task, model, tokens=TOKENS + TOKENS // 4, max_tokens=TOKENS // 4))
    fitting, testing = (found[:-1], found[-1:]) if len(found) > 1 else (found, found)
    training = model.training
    model.eval()
    try:
        watch = Watch()
        for unit in units:
            watch.targets(unit)
        wanted = watch.run(model, testing)
        spawn(model, units, fitting, seed=task.flags.seed)
        kept = variance_kept(model, units, testing, wanted)
    finally:
        model.train(training)
    views = OptimizerViews(optimizer)
    for unit in units:
        part: nn.Module = unit.ffn or unit.layer
        for parameter in part.parameters():
            _same_everywhere(parameter, views.master(parameter))
    for name, share in kept.items():
        logger.info("update %d: %s keeps %.3f of the variance", update_num, name, share)
    logger.info(
        "update %d: %d dense layers have become look-ups (--memory-spawn-update)",
        *(update_num, len(units)),
    )


@torch.no_grad()
def _same_everywhere(parameter: nn.Parameter, master: Tensor) -> None:
    """Give every worker the first one's values, and the optimizer's float32 copy too."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(parameter.data, 0)
    if master.data_ptr() != parameter.data_ptr():
        master.copy_(parameter)
