"""Kernels for GPUs prove themselves on the device at hand before they serve.

At the first use of a kernel with a dtype on a device, a tiny case is computed by the kernel and by
torch, forward and backward. If the two differ, or the kernel does not compile, one log line says so
and torch serves instead. `EVOMOE_SELF_CHECK=0` leaves the check out.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ENABLED = os.environ.get("EVOMOE_SELF_CHECK", "1") != "0"

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error of a kernel in a dtype, relative to the largest value of the tensor."""
TF32 = 1e-2
"""The same in float32 if products may be rounded to TF32."""

_FOUND: dict[tuple[str, torch.device, torch.dtype], str] = {}
_LOCK = threading.RLock()

Case = Callable[[torch.device, torch.dtype], tuple[Sequence[Tensor], Sequence[Tensor]]]
"""Runs a tiny case on a device; returns what the kernel gives and what torch gives."""


def failure(kernel: str, like: Tensor, case: Case) -> str:
    """Reason why a kernel failed its check, or "" if it passed or cannot be checked now.

    The first call for a kernel, a device and a dtype makes the check, and the others know
    its result.
    Code under `torch.compile` and the capture of a CUDA graph do not check, because the check would
    become a part of them.

    Args:
        kernel: name of the kernel for the log.
        like: tensor of the device and dtype in question.
        case: the check.
    """
    if torch.compiler.is_compiling() or not _ENABLED:
        return ""
    key = (kernel, like.device, like.dtype)
    if key in _FOUND:
        return _FOUND[key]
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        return ""
    with _LOCK:
        if key not in _FOUND:
            _FOUND[key] = _check(*key, case)
            if _FOUND[key]:
                logger.warning(
                    "%s on %s: %s; torch serves instead. Please report this line together with the "
                    "output of evomoe-doctor.",
                    kernel,
                    _name(like.device),
                    _FOUND[key],
                )
        return _FOUND[key]


def results() -> dict[tuple[str, torch.device, torch.dtype], str]:
    """(kernel, device, dtype) -> why it failed its check, or ""; of all checks so far."""
    return dict(_FOUND)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _check(kernel: str, device: torch.device, dtype: torch.dtype, case: Case) -> str:
    try:
        with (
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            have, want = case(device, dtype)
            errors = [(difference(a, b), a.dtype) for a, b in zip(have, want, strict=True)]
    except Exception as found:  # whatever a compiler or a driver raises
        return f"it failed its self-check with {type(found).__name__}: {str(found)[:300]}"
    # a result is no more exact than its own dtype and that of the input
    if all(error <= max(_tolerance(dtype), _tolerance(own)) for error, own in errors):
        return ""
    worst = max(error for error, _ in errors)
    return f"it failed its self-check in {dtype} with a relative error of {worst:.2g}"


def _tolerance(dtype: torch.dtype) -> float:
    rounds = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return TF32 if rounds else TOLERANCE.get(dtype, 0.0)


def difference(have: Tensor, want: Tensor) -> float:
    """Largest difference, relative to the largest value wanted; infinite if a value is NaN."""
    exact, wide = want.detach().double(), have.detach().double()
    error = (wide - exact).abs().max() / exact.abs().max().clamp_min(1e-30)
    return float(error.nan_to_num(nan=float("inf")))


def draw(seed: int, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal numbers of a generator of their own: the streams of the training are not touched."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device, dtype).requires_grad_()


def with_gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The output and its gradients in the leaves, for an output gradient of cosines."""
    steps = torch.arange(y.numel(), device=y.device, dtype=torch.float32).cos()
    return [y, *torch.autograd.grad(y, leaves, steps.view(y.shape).to(y.dtype))]
