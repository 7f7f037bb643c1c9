"""Which worker holds which experts.

Letters: W workers, S workers over which the experts are sharded, E routed experts of a layer.

The W workers form W / S groups of S neighbours. Within a group each worker holds E / S experts, and
workers with the same rank in their groups hold the same experts. So tokens travel only within a
group (within a node, if S is the number of its devices), and gradients are summed across groups.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Mesh:
    """This worker's place among the W workers.

    Attributes:
        group: process group of the S workers over which the experts are sharded, this one included.
        rank, size: this worker's rank in `group`, and S.
        replicas: process group of the W / S workers that hold the same experts, or None if S = W.
        world: W.
    """

    group: Any
    rank: int
    size: int
    replicas: Any
    world: int

    def __deepcopy__(self, memo: dict) -> "Mesh":
        return self


def group_size(world: int, experts: int, requested: int | None) -> int:
    """Return S: `--expert-parallel-size`, or if that is None the largest divisor of both W and E.

    Raises:
        ValueError: the size does not divide both; the message names the flag and the sizes that do.
    """
    both = math.gcd(world, experts)
    if requested is None:
        return both
    if requested < 1 or both % requested:
        sizes = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise ValueError(
            f"--expert-parallel-size {requested}: it must divide the number of workers, {world}, "
            f"and --moe-expert-count {experts}; choose one of {sizes}"
        )
    return requested


def make_mesh(size: int) -> Mesh:
    """Split all workers into groups of `size` neighbours. Every worker must call this function."""
    world, rank = dist.get_world_size(), dist.get_rank()
    starts = range(0, world, size)
    groups = [dist.new_group(list(range(i, i + size))) for i in starts]
    across = [dist.new_group(list(range(j, world, size))) for j in range(size)]
    replicas = across[rank % size] if world > size else None
    return Mesh(
        group=groups[rank // size], rank=rank % size, size=size, replicas=replicas, world=world
    )


class Shard:
    """One worker's shard of a layer's experts.

    Entry i of each stacked parameter is expert `expert_ids[i]`. The first entry is `common` to all
    workers while it holds the base expert, before the split, and always under
    `--moe-shared-expert`. Every worker then computes it for its own tokens, and its gradients are
    summed over all workers.

    Args:
        mesh: the mesh of the workers.
        total: number of experts of the layer, including the shared one.
        shared: whether expert 0 is a shared expert.
    """

    def __init__(self, mesh: Mesh, total: int, *, shared: bool) -> None:
        self.mesh, self.total, self.shared = mesh, total, shared
        self.per_worker = (total - shared) // mesh.size
        first = shared + mesh.rank * self.per_worker
        routed = list(range(first, first + self.per_worker))
        self.expert_ids = [0, *routed] if shared else routed
        self.has_split = True
        """Whether the base expert has already split."""

    def __deepcopy__(self, memo: dict) -> "Shard":
        return self

    @property
    def common(self) -> bool:
        """Whether the first entry is the same on all workers."""
        return self.shared or not self.has_split

    def local(self, stacked: Tensor, *, has_split: bool) -> Tensor:
        """Return a copy of this worker's part of a stacked tensor (E, ...).

        Args:
            has_split: whether the tensor dates from after the split. Before it, the first entry is
                expert 0.
        """
        part = stacked[self.expert_ids]
        if not has_split:
            part[0] = stacked[0]
        return part

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """Join all workers' parts, in the order of ranks, into the stacked tensor (E, ...)."""
        return torch.cat([parts[0], *(p[int(self.shared) :] for p in parts[1:])])


_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextmanager
def distributing(mesh: Mesh | None) -> Iterator[None]:
    """Shard the experts of layers built in this context over `mesh`; with None, shard nothing."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def shard_of_layer(total: int, *, shared: bool) -> Shard | None:
    """Return this worker's shard of a layer being built, or None if it holds all experts."""
    mesh = _MESH.get()
    return None if mesh is None else Shard(mesh, total, shared=shared)
