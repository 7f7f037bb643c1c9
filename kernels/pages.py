"""Memory of large tensors on CPUs (Linux): large pages, and freed memory that stays at hand.

Fresh memory comes in pages of 4 KiB, each with a page fault when it is first written: for the
weight gradients of many experts that costs as much as some of the matrix products that fill them.
Pages of 2 MiB have one fault in 512, and random reads find their address sooner. Memory that the
process has had before has none.
"""

import ctypes
import functools
import os
import sys
from typing import Any

from torch import Tensor

_PAGE = 1 << 21
_HUGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, since Linux 6.1
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_..., of mallopt
_MOST = 2**31 - 1


def _libc(name: str, *types: Any) -> Any:
    """A function of the C library; None where it has none of that name."""
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), name, None)
    if call is not None:
        call.argtypes = types
    return call


@functools.cache
def _madvise() -> Any:
    return _libc("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@functools.cache
def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, for the whole process; whether it will.

    By itself it gives every block of over 32 MiB back to the system, so that each step of training
    meets the gradients of all experts as fresh pages. Peak memory grows by up to a tenth, as kept
    pieces do not always fit the next request. A choice of the user's (``MALLOC_...``,
    ``GLIBC_TUNABLES``) stands.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    call = _libc("mallopt", ctypes.c_int, ctypes.c_int)
    if call is None or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    # older versions refuse the first; the second alone would only turn off their own adaptation
    return call(_MMAP_THRESHOLD, _MOST) == 1 and call(_TRIM_THRESHOLD, _MOST) == 1


def large_pages(tensor: Tensor, *, now: bool = False) -> Tensor:
    """The tensor itself; its memory shall come in large pages where the system offers them.

    Advice that a system without them does not take; values stay as they are.

    Args:
        tensor: any; only a CPU's of several MiB is touched.
        now: memory that has been written already moves at once.
    """
    size = tensor.numel() * tensor.element_size()
    if size < 2 * _PAGE or tensor.device.type != "cpu":
        return tensor
    call = _madvise()
    if call is not None:
        first = -(-tensor.data_ptr() // _PAGE) * _PAGE
        length = (tensor.data_ptr() + size) // _PAGE * _PAGE - first
        if length > 0 and call(first, length, _HUGE) == 0 and now:
            call(first, length, _COLLAPSE)
    return tensor
