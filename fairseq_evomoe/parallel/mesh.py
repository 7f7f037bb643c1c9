"""Which worker holds which experts.

Letters: W workers, S workers that share the experts out among them, E routed experts of a layer.

The W workers stand in W / S groups of S neighbours. Within a group each worker holds E / S experts;
workers of equal rank in their groups hold the same ones. So tokens travel within a group only
(within a node, if S is the number of its devices), and gradients are summed across groups.
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


@dataclass(frozen=True, eq=False)
class Mesh:
    """This worker's place among the W workers.

    Attributes:
        group: the S workers that share the experts out, this one among them.
        rank, size: this worker's place in `group`; S.
        replicas: the W / S workers that hold the same experts; None where S = W.
        world: W.
    """

    group: Any
    rank: int
    size: int
    replicas: Any
    world: int

    def __deepcopy__(self, memo: dict) -> "Mesh":
        return self


def group_size(world: int, experts: int, asked: int) -> int:
    """S: `--expert-parallel-size`, or for 0 the largest that divides both W and E.

    Raises:
        ValueError: it does not divide both; names the flag and the sizes that do.
    """
    both = math.gcd(world, experts)
    if asked == 0:
        return both
    if asked < 1 or both % asked:
        sizes = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
        raise ValueError(
            f"--expert-parallel-size {asked}: it must divide the number of workers, {world}, and "
            f"--moe-expert-count {experts}: choose one of {sizes}"
        )
    return asked


def make_mesh(size: int) -> Mesh:
    """Split all workers into groups of `size` neighbours; every worker must call it."""
    world, rank = dist.get_world_size(), dist.get_rank()
    starts = range(0, world, size)
    groups = [dist.new_group(list(range(i, i + size))) for i in starts]
    across = [dist.new_group(list(range(j, world, size))) for j in range(size)]
    replicas = across[rank % size] if world > size else None
    return Mesh(groups[rank // size], rank % size, size, replicas, world)


class Share:
    """One worker's share of a layer's experts.

    Its stacked parameters hold `slots`, in order. The first slot is `common` to all workers while
    it holds the base expert, before the split, and for good under `--moe-shared-expert`: every
    worker then computes it for its own tokens, and its gradients are summed over all of them.

    Args:
        mesh: of the workers.
        total: experts of the layer, the shared one included.
        shared: expert 0 is the shared one.
    """

    def __init__(self, mesh: Mesh, total: int, *, shared: bool) -> None:
        self.mesh, self.total, self.shared = mesh, total, shared
        self.per_worker = (total - shared) // mesh.size
        first = shared + mesh.rank * self.per_worker
        routed = list(range(first, first + self.per_worker))
        self.slots = [0, *routed] if shared else routed
        self.split = True
        """Whether the base expert has split already."""

    def __deepcopy__(self, memo: dict) -> "Share":
        return self

    @property
    def common(self) -> bool:
        """Whether the first slot is the same on all workers."""
        return self.shared or not self.split

    def local(self, stacked: Tensor, *, split: bool) -> Tensor:
        """This worker's part of a stacked tensor (E, ...); a copy.

        Args:
            split: whether it is of a time after the split; before, the first slot is expert 0.
        """
        own = stacked[self.slots]
        if not split:
            own[0] = stacked[0]
        return own

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """The stacked tensor (E, ...) of all workers' parts, in order of their ranks."""
        return torch.cat([parts[0], *(p[int(self.shared) :] for p in parts[1:])])


_MESH: ContextVar[Mesh | None] = ContextVar("mesh", default=None)


@contextmanager
def sharing(mesh: Mesh | None) -> Iterator[None]:
    """Layers built within share their experts out over `mesh`; None: each holds all."""
    token = _MESH.set(mesh)
    try:
        yield
    finally:
        _MESH.reset(token)


def share_of(total: int, *, shared: bool) -> Share | None:
    """This worker's share of a layer that is being built; None: all of its experts."""
    mesh = _MESH.get()
    return None if mesh is None else Share(mesh, total, shared=shared)
