"""Gradients and their norm where workers hold different experts.

fairseq skips parameters marked `expert` when it averages gradients over W workers, and leaves them
out of the norm. Its trainer then multiplies every gradient by W / sample size, to turn averages
into sums. An expert's gradient is already a sum over all workers' tokens, so it would come out W
times too large.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from fairseq_evomoe.parallel.mesh import Shard


def distributed_parameters(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Shard]]:
    """Return the sharded parameters, which stack this worker's experts, each with its shard."""
    found = ((p, getattr(p, "expert", None)) for p in parameters)
    return [(p, shard) for p, shard in found if isinstance(shard, Shard)]


@torch.no_grad()
def reduce_expert_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum an expert's gradients over the workers that hold it; divide by W, as averaging does."""
    for p, shard in distributed_parameters(parameters):
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        own = p.grad
        if shard.common:
            dist.all_reduce(own[0])
            own = own[1:]
        if shard.mesh.replicas is not None and shard.has_split and len(own):
            dist.all_reduce(own, group=shard.mesh.replicas)
        p.grad.div_(shard.mesh.world)
