"""Which implementation serves an op.

``reference`` is the plain statement of the maths and ``torch`` the path built from library calls;
both run on every device. ``native`` is C++ for CPUs and CUDA C++ for GPUs, and ``triton`` serves
CUDA devices. By default the fastest implementation that can serve the call is chosen.

``EVOMOE_BACKEND`` forces one of them for a process, and `use` for a block of code. A forced backend
holds for every op that has it. An op that lacks it chooses automatically. An op that has it, but
cannot serve the call with it, raises an error.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

BACKENDS = ("native", "triton", "torch", "reference")
"""All backends, the fastest first."""

# The environment is read once: reading it on every call would be a noticeable part of a look-up
# of one row, which takes a few microseconds.
_FROM_ENVIRONMENT = os.environ.get("EVOMOE_BACKEND", "")
_FORCED: ContextVar[str] = ContextVar("forced", default=_FROM_ENVIRONMENT)


def constant_when_compiled(function: _Function) -> _Function:
    """Have torch.compile take a function's result as a constant, without tracing into it.

    This is what `torch.compiler.assume_constant_result` does, which imports all of torch's compiler
    for it: more than a second, at the start of every command.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def forced_backend() -> str:
    """The backend that is forced here; "" means the package chooses."""
    return _FORCED.get()


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force a backend within a `with` block; "" lets the package choose again.

    The choice belongs to the current thread. It does not reach threads in which autograd runs the
    backward pass of another device.

    Raises:
        ValueError: there is no backend of that name.
    """
    _check(name)
    token = _FORCED.set(name)
    try:
        yield
    finally:
        _FORCED.reset(token)


def _check(name: str) -> None:
    if name and name not in BACKENDS:
        raise ValueError(f"EVOMOE_BACKEND={name!r}: choose one of {', '.join(BACKENDS)}")


def supported() -> str:
    """The answer of an implementation that serves every call."""
    return ""


def triton_unsupported(device: str) -> str:
    """Why Triton kernels cannot serve a device of this type; "" if they can."""
    if device != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return str(error)
    return ""


def choose_backend(**unsupported: Callable[[], str]) -> str:
    """Choose the implementation that serves a call.

    Args:
        unsupported: backend name -> function that says why this backend cannot serve the call, or
            returns "". The op lacks every backend that is not named.

    Returns:
        The forced backend if the op has it, otherwise the fastest that can serve the call.

    Raises:
        ValueError: ``EVOMOE_BACKEND`` names an unknown backend, or one that the op has but that
            cannot serve this call.
    """
    forced = forced_backend()
    _check(forced)
    if forced in unsupported:
        reason = unsupported[forced]()
        if reason:
            raise ValueError(
                f"EVOMOE_BACKEND={forced!r} cannot serve this op: {reason}. "
                "Unset EVOMOE_BACKEND to let the package choose."
            )
        return forced
    return next(n for n in BACKENDS if n in unsupported and not unsupported[n]())
