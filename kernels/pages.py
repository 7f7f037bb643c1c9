"""Memory of large tensors on CPUs (Linux): large pages, and reuse of freed memory.

Fresh memory comes in pages of 4 KiB, and the first write to each of them causes a page fault. For
the weight gradients of many experts the faults cost as much as some of the matrix products that
fill them. With pages of 2 MiB there is one fault instead of 512, and the addresses of random reads
are translated faster. Memory that the process has used before causes no faults.
"""

import ctypes
import functools
import os
import sys
from typing import Any

from torch import Tensor

_PAGE = 1 << 21
_HUGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, since Linux 6.1
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of mallopt
_MOST = 2**31 - 1


def _libc(name: str, *types: Any) -> Any:
    """A function of the C library, or None if it has no function of that name."""
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
    """Have glibc keep freed memory for the whole process; return whether it accepted.

    By default glibc returns every block of more than 32 MiB to the system when it is freed, so that
    in each training step the gradients of all experts lie in fresh pages. With this setting peak
    memory grows by up to a tenth, because the kept blocks do not always fit the next request. If
    the user has set ``MALLOC_...`` or malloc's ``GLIBC_TUNABLES``, nothing is changed.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    call = _libc("mallopt", ctypes.c_int, ctypes.c_int)
    if call is None or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    # older versions refuse the first setting; the second alone would only turn off adaptation
    return call(_MMAP_THRESHOLD, _MOST) == 1 and call(_TRIM_THRESHOLD, _MOST) == 1


def large_pages(tensor: Tensor, *, now: bool = False) -> Tensor:
    """Advise the system to back a tensor's memory with large pages, and return the tensor.

    A system without large pages ignores the advice. The values do not change.

    Args:
        tensor: any tensor; only CPU tensors of several MiB are affected.
        now: whether memory that has already been written moves to large pages at once.
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
