"""Which implementation serves an op.

``reference`` is the plain statement of the maths, ``torch`` the path built from library calls; they
run on every device. ``native`` is C++ for CPUs and CUDA C++ for GPUs, ``triton`` serves CUDA
devices. ``EVOMOE_BACKEND`` forces one of them for a process; unset means the fastest that can serve
the call.
"""

import os
from collections.abc import Callable

BACKENDS = ("native", "triton", "torch", "reference")


def always() -> str:
    """For an implementation that serves every call."""
    return ""


def without_triton(device: str) -> str:
    """Why Triton's kernels cannot serve a device of this type; "" where they can."""
    if device != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


forced = os.environ.get("EVOMOE_BACKEND", "")
"""The backend to use, "" where the choice is ours. Read once: a look-up of one row takes 10 us."""


def choose(**reason: Callable[[], str]) -> str:
    """Name of the implementation to call, the fastest that can.

    Args:
        reason: backend name -> what says why it cannot serve this call, "" where it can. An op
            lacks the backends that are not named.

    Raises:
        ValueError: ``EVOMOE_BACKEND`` names something unknown, or something that cannot serve.
    """
    if not forced:
        for name in BACKENDS:
            if name in reason and not reason[name]():
                return name
    if forced not in BACKENDS:
        raise ValueError(f"EVOMOE_BACKEND={forced!r}: choose one of {', '.join(BACKENDS)}")
    why = reason[forced]() if forced in reason else f"it has {', '.join(reason)}"
    if why:
        raise ValueError(
            f"EVOMOE_BACKEND={forced!r} cannot serve this op: {why}. "
            "Unset EVOMOE_BACKEND to let the package choose."
        )
    return forced
