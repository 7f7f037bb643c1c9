"""parallel/mesh.py: every expert is held once a group, and the whole comes back from its parts."""

import pytest
import torch

from fairseq_evomoe.parallel.mesh import Mesh, Share, group_size


def shares(size, experts, *, shared):
    meshes = [Mesh(None, rank, size, None, size) for rank in range(size)]
    return [Share(m, experts + shared, shared=shared) for m in meshes]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("size", "experts"), [(1, 3), (2, 4), (4, 4), (4, 8)])
def test_parts_make_the_whole(size, experts, shared):
    """Every expert is in exactly one share (the shared one in all), and `whole` undoes `local`."""
    all_shares = shares(size, experts, shared=shared)
    held = sorted(e for s in all_shares for e in s.slots if not (shared and e == 0))
    assert held == list(range(int(shared), experts + shared))
    stacked = torch.randn(experts + shared, 3, 2)
    parts = [s.local(stacked, split=True) for s in all_shares]
    assert torch.equal(all_shares[0].whole(parts), stacked)


@pytest.mark.parametrize("shared", [False, True])
def test_before_the_split_all_hold_the_base(shared):
    """The first slot of every worker is then expert 0, and is common to all."""
    stacked = torch.randn(5, 2)
    for share in shares(4, 4, shared=shared) if shared else shares(5, 5, shared=False):
        share.split = False
        assert torch.equal(share.local(stacked, split=False)[0], stacked[0])
        assert share.common
        share.split = True
        assert share.common == shared


@pytest.mark.parametrize(
    ("world", "experts", "asked", "size"),
    [(4, 8, 0, 4), (8, 4, 0, 4), (6, 4, 0, 2), (3, 4, 0, 1), (4, 8, 2, 2), (4, 4, 1, 1)],
)
def test_group_size(world, experts, asked, size):
    """By default as many workers as divide both share out the experts."""
    assert group_size(world, experts, asked) == size


@pytest.mark.parametrize("asked", [3, 8, -1])
def test_wrong_group_sizes_are_refused(asked):
    """A size that does not divide both: the error says which do."""
    with pytest.raises(ValueError, match=r"--expert-parallel-size .* choose one of 1, 2, 4"):
        group_size(4, 8, asked)
