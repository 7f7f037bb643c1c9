"""Gradients and their norm where workers hold different experts.

fairseq skips parameters marked `expert` when it averages gradients over W workers, and leaves them
out of the norm. But its trainer multiplies every gradient by W / sample size, since averages lack
that W: an expert's gradient, which sums all workers' tokens already, comes out W times too large.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_evomoe.parallel.mesh import Share


def shared_out(parameters: Iterable[nn.Parameter]) -> list[tuple[nn.Parameter, Share]]:
    """The parameters that are stacks of a worker's own experts, with its share of each layer."""
    found = ((p, getattr(p, "expert", None)) for p in parameters)
    return [(p, share) for p, share in found if isinstance(share, Share)]


@torch.no_grad()
def reduce_expert_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the workers that hold the same expert, and divide by W as averages are."""
    for p, share in shared_out(parameters):
        if not p.requires_grad:
            continue
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        own = p.grad
        if share.common:
            dist.all_reduce(own[0])
            own = own[1:]
        if share.mesh.replicas is not None and share.split and len(own):
            dist.all_reduce(own, group=share.mesh.replicas)
        p.grad.div_(share.mesh.world)


def clip_with_experts(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """fairseq's `clip_grad_norm_` with the gradients of all workers' experts in the norm."""

    @torch.no_grad()
    def clip_grad_norm_(params: Any, max_norm: float, aggregate_norm_fn: Any = None) -> Tensor:
        params = [params] if isinstance(params, Tensor) else list(params)
        experts = shared_out(p for p in params if p.grad is not None)
        if not experts:
            return original(params, max_norm, aggregate_norm_fn)
        others = [p for p in params if not hasattr(p, "expert")]
        norm = original(others, 0.0, aggregate_norm_fn)

        own, common = (torch.zeros((), dtype=torch.float64, device=norm.device) for _ in range(2))
        for p, share in experts:
            assert p.grad is not None
            wide = torch.promote_types(p.dtype, torch.float32)
            squares = torch.linalg.vector_norm(p.grad.flatten(1), dim=1, dtype=wide) ** 2
            if share.common:
                common += squares[0]
            own += squares[int(share.common) :].sum()
        dist.all_reduce(own, group=experts[0][1].mesh.group)
        norm = (norm.double().square() + common + own).sqrt().to(norm.dtype)
        if max_norm > 0:
            gradients = [p.grad for p in params if p.grad is not None]
            torch._foreach_mul_(gradients, (float(max_norm) / (norm + 1e-6)).clamp_(max=1))
        return norm

    return clip_grad_norm_
