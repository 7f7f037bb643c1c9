"""kernels/pages.py: advice to the system, nothing else."""

import sys
from pathlib import Path

import pytest
import torch

from fairseq_evomoe.kernels import pages
from fairseq_evomoe.kernels.pages import large_pages


@pytest.mark.parametrize("now", [False, True])
@pytest.mark.parametrize("size", [0, 7, 2**20, 3 * 2**20 + 5])
def test_values_stay(size, now):
    """Tensors of any size keep their values and their place."""
    t = torch.randn(size)
    copy, place = t.clone(), t.data_ptr()
    assert large_pages(t, now=now) is t and t.data_ptr() == place
    assert torch.equal(t, copy)
    large_pages(torch.empty(2**22, dtype=torch.int8, device="meta"))


def huge(t):
    """KiB of large pages under a tensor, from the kernel's own account."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            a, b = (int(x, 16) for x in first.split("-"))
            inside = a <= t.data_ptr() + 2**22 < b
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps the account")
def test_written_memory_moves(monkeypatch):
    """Where the system has large pages on offer, a tensor of 64 MiB lies in them."""
    offer = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offer.exists() or "[never]" in offer.read_text():
        pytest.skip("this system offers none")
    t = large_pages(torch.zeros(2**24), now=True)
    t.add_(1)
    assert huge(t) > 2**13 or pages._madvise() is None
