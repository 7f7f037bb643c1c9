"""kernels/pages.py: advice to the system about memory pages, which changes no values."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fairseq_evomoe.kernels import pages
from fairseq_evomoe.kernels.pages import large_pages


@pytest.mark.parametrize("now", [False, True])
@pytest.mark.parametrize("size", [0, 7, 2**20, 3 * 2**20 + 5])
def test_values_stay(size, now):
    """Tensors of any size keep their values and their address."""
    t = torch.randn(size)
    copy, place = t.clone(), t.data_ptr()
    assert large_pages(t, now=now) is t and t.data_ptr() == place
    assert torch.equal(t, copy)
    large_pages(torch.empty(2**22, dtype=torch.int8, device="meta"))


def huge(t):
    """KiB of large pages that hold a tensor, as Linux reports them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            a, b = (int(x, 16) for x in first.split("-"))
            inside = a <= t.data_ptr() + 2**22 < b
        elif inside and first == "AnonHugePages:":
            return int(line.split()[1])
    return 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports large pages")
def test_written_memory_moves(monkeypatch):
    """If the system offers large pages, a tensor of 64 MiB lies in them."""
    offer = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not offer.exists() or "[never]" in offer.read_text():
        pytest.skip("this system offers no large pages")
    t = large_pages(torch.zeros(2**24), now=True)
    t.add_(1)
    assert huge(t) > 2**13 or pages._madvise() is None


FAULTS = """
import ctypes, resource, sys, torch
sys.path.insert(0, sys.argv[2])
from pages import keep_freed_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: small pages, on any system
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for turn in range(30):
    if turn == 25:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is part of glibc")
def test_freed_memory_is_at_hand():
    """The last 5 of 30 blocks of 64 MiB cause few page faults unless the user configured malloc."""

    def faults(what, **env):
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC", "GLIBC"))}
        command = [sys.executable, "-c", FAULTS, what, Path(pages.__file__).parent]
        done = subprocess.run(command, env=clean | env, capture_output=True, text=True, check=True)
        kept, count = done.stdout.split()
        return kept == "True", int(count)

    kept, count = faults("keep")
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert count < 2000
    assert faults("leave")[1] > 40000
    for chosen in ({"MALLOC_TRIM_THRESHOLD_": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}):
        kept, count = faults("keep", **chosen)
        assert not kept and count > 40000
