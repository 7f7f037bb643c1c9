"""The look-up on CPUs, in C++ (csrc/lookup_cpu.cpp), as custom ops of torch.

Letters: B rows, K tables, t bits per table, N = 2^t rows per table, H output width.
"""

import functools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.kernels import native
from fairseq_evomoe.kernels.backend import constant_when_compiled
from fairseq_evomoe.kernels.lookup.score import SCORES

SOURCES = Path(__file__).parent / "csrc"
TABLES = (torch.float32, torch.bfloat16, torch.int8)


def unsupported(z: Tensor, tables: Tensor) -> str:
    """Reason why this kernel cannot serve a call, or "" if it can."""
    if not z.is_cpu:
        return f"it runs on CPUs, not on {z.device.type}"
    if z.dtype == torch.float64 or tables.dtype not in TABLES:
        return f"it has no {z.dtype} with tables of {tables.dtype}"
    return unavailable()


# a cached function does not keep two threads from running it at the same time
_LOCK = threading.RLock()

# torch.compile traces through functools.cache into the function behind it. It does not trace into
# the following two functions, whose results it takes as constants.


@constant_when_compiled
def unavailable() -> str:
    """Reason why the ops are unavailable, or "" if they are loaded."""
    with _LOCK:
        return _load()


@constant_when_compiled
def isa() -> int:
    """Index into `native.ISAS` of the instruction set to use.

    See `native.chosen_isa`; the variable is read once.
    """
    return _isa()


@functools.cache
def _load() -> str:
    reason = native.load(SOURCES, "lookup_cpu")
    if not reason:
        torch.library.register_fake("evomoe::lookup_cpu")(_fake)
        torch.library.register_fake("evomoe::lookup_cpu_infer")(lambda *args: _fake(*args)[0])
        torch.library.register_fake("evomoe::lookup_cpu_backward")(_fake_backward)
        torch.library.register_autograd("evomoe::lookup_cpu", _backward, setup_context=_keep)
    return reason


@functools.cache
def _isa() -> int:
    return native.chosen_isa(torch.ops.evomoe.lookup_cpu_isa())


def lookup(
    z: Tensor,
    tables: Tensor,
    *,
    score: str,
    temperature: float = 1.0,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See `lookup.lookup`."""
    wide = z if z.dtype == torch.float32 else z.float()
    ops = torch.ops.evomoe
    rule = SCORES.index(score), temperature, isa()
    grad = torch.is_grad_enabled() and (z.requires_grad or tables.requires_grad)
    if grad and row_scale is None:
        y = ops.lookup_cpu.default(wide.contiguous(), tables.contiguous(), None, *rule)[0]
    else:
        # Tables with one scale per row are for inference: their look-up is a constant to autograd.
        scale = None if row_scale is None else row_scale.float().contiguous()
        y = ops.lookup_cpu_infer.default(
            wide.detach().contiguous(), tables.detach().contiguous(), scale, *rule
        )
    return y if wide is z else y.to(z.dtype)


def _fake(
    z: Tensor, tables: Tensor, row_scale: Tensor | None, score: int, temperature: float, isa: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows, count, _ = z.shape
    y = z.new_empty(rows, tables.size(2))
    return y, z.new_empty(rows, count, dtype=torch.int32), z.new_empty(rows, count)


def _fake_backward(
    dy: Tensor,
    z: Tensor,
    tables: Tensor,
    code: Tensor,
    p: Tensor,
    score: int,
    temperature: float,
    need_z: bool,
    need_t: bool,
    isa: int,
) -> tuple[Tensor, Tensor]:
    dz = z.new_empty(z.size(0) if need_z else 0, *z.shape[1:])
    return dz, z.new_empty(tables.size(0) if need_t else 0, *tables.shape[1:])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, tables, row_scale, ctx.score, ctx.temperature, ctx.isa = inputs
    assert row_scale is None, "look-ups with a scale per row go through the inference op"
    _, code, p = output
    ctx.mark_non_differentiable(code, p)
    ctx.save_for_backward(z, tables, code, p)


def _backward(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    z, tables, code, p = ctx.saved_tensors
    need_z, need_t = ctx.needs_input_grad[:2]
    dz, dt = torch.ops.evomoe.lookup_cpu_backward(
        dy.contiguous(), z, tables, code, p, ctx.score, ctx.temperature, need_z, need_t, ctx.isa
    )
    dt = dt.to(tables.dtype) if need_t else None
    return dz if need_z else None, dt, None, None, None, None
