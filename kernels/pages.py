"""Large pages for large tensors on CPUs (Linux).

Fresh memory comes in pages of 4 KiB, each with a page fault when it is first written: for the
weight gradients of many experts that costs as much as some of the matrix products that fill them.
Pages of 2 MiB have one fault in 512, and random reads find their address sooner.
"""

import ctypes
import functools
import sys
from typing import Any

from torch import Tensor

_PAGE = 1 << 21
_HUGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE; MADV_COLLAPSE, since Linux 6.1


@functools.cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "madvise", None)
    if call is not None:
        call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


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
