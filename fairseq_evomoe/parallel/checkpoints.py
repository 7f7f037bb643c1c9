"""Save and load one ordinary checkpoint, whatever the number of workers.

On save, the workers of the first group send their experts, with the optimizer's moments and the
moving averages of them, to rank 0, which writes the file that a run without expert parallelism
would have written. On load, each worker keeps its shard. fairseq calls `consolidate_optimizer` on
every worker before a save, whether or not that worker then writes a file, so the experts are
gathered there.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_evomoe.parallel.mesh import Shard
from fairseq_evomoe.parallel.sharded_files import local_part


def named_shards(model: nn.Module) -> dict[str, Shard]:
    """Map each sharded parameter's name in the state of a model, or of a copy, to its shard."""
    return {
        f"{bank}.{part}": module.shard
        for bank, module in model.named_modules()
        if isinstance(getattr(module, "shard", None), Shard)
        for part, _ in module.named_parameters(recurse=False)
    }


def collect(part: Tensor, shard: Shard) -> Tensor | None:
    """Gather all workers' parts into the stacked tensor, on the CPU of the group's first worker.

    Every worker of the group must call it. It returns None on the other workers.
    """
    mesh = shard.mesh
    first = mesh.rank == 0
    parts = [torch.empty_like(part) for _ in range(mesh.size)] if first else None
    root = dist.get_global_rank(mesh.group, 0)
    dist.gather(part.contiguous(), parts, dst=root, group=mesh.group)
    return None if parts is None else shard.whole([p.cpu() for p in parts])


def _stacks(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, nn.Parameter, Shard]]:
    """Yield (index in the optimizer's state, parameter, shard) of each sharded parameter."""
    groups: Iterable[dict[str, Any]] = optimizer.param_groups
    for index, p in enumerate(p for g in groups for p in g["params"]):
        shard = getattr(p, "expert", None)
        if isinstance(shard, Shard):
            yield index, p, shard


def moments_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, str, Tensor, Shard]]:
    """Yield (index in the optimizer's state, key, moment, shard) of the sharded parameters."""
    for index, p, shard in _stacks(optimizer):
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            if isinstance(value, Tensor) and value.shape == p.shape:
                yield index, key, value, shard


def local_optimizer_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Cut the stacked tensors in an optimizer's state to this worker's shard."""
    own = {k: dict(v) if isinstance(v, dict) else v for k, v in state["state"].items()}
    for index, p, shard in _stacks(optimizer):
        for key, value in own.get(index, {}).items():
            own[index][key] = local_part(value, shard, p.shape, has_split=shard.has_split)
    return {**state, "state": own}
