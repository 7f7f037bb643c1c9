"""parallel/mesh.py: each group holds every expert once, and the parts make up the whole."""

import pytest
import torch

from fairseq_evomoe.parallel.mesh import Mesh, Shard, group_size


def shards(size, experts, *, shared):
    meshes = [
        Mesh(group=None, rank=rank, size=size, replicas=None, world=size) for rank in range(size)
    ]
    return [Shard(m, experts + shared, shared=shared) for m in meshes]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("size", "experts"), [(1, 3), (2, 4), (4, 4), (4, 8)])
def test_parts_make_the_whole(size, experts, shared):
    """Every expert is on exactly one worker (the shared one on all), and `whole` undoes `local`."""
    all_shards = shards(size, experts, shared=shared)
    held = sorted(e for s in all_shards for e in s.expert_ids if not (shared and e == 0))
    assert held == list(range(int(shared), experts + shared))
    stacked = torch.randn(experts + shared, 3, 2)
    parts = [s.local(stacked, has_split=True) for s in all_shards]
    assert torch.equal(all_shards[0].whole(parts), stacked)


@pytest.mark.parametrize("shared", [False, True])
def test_before_the_split_all_hold_the_base(shared):
    """Before the split, the first entry of every worker is expert 0 and is common to all."""
    stacked = torch.randn(5, 2)
    for shard in shards(4, 4, shared=shared) if shared else shards(5, 5, shared=False):
        shard.has_split = False
        assert torch.equal(shard.local(stacked, has_split=False)[0], stacked[0])
        assert shard.common
        shard.has_split = True
        assert shard.common == shared


@pytest.mark.parametrize(
    ("world", "experts", "requested", "size"),
    [
        (4, 8, None, 4),
        (8, 4, None, 4),
        (6, 4, None, 2),
        (3, 4, None, 1),
        (4, 8, 2, 2),
        (4, 4, 1, 1),
    ],
)
def test_group_size(world, experts, requested, size):
    """By default the group is the largest size that divides both the workers and the experts."""
    assert group_size(world, experts, requested) == size


@pytest.mark.parametrize("requested", [3, 8, 0, -1])
def test_wrong_group_sizes_are_refused(requested):
    """A size that does not divide both is refused, and the error lists the sizes that do."""
    with pytest.raises(ValueError, match=r"--expert-parallel-size .* choose one of 1, 2, 4"):
        group_size(4, 8, requested)
