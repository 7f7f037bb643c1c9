"""The look-up on CPUs, in C++ (csrc/lookup_cpu.cpp), as ops of torch.

Letters: B rows, K tables, t bits a table, N = 2^t rows a table, H output width.
"""

import functools
import os

import torch
from torch import Tensor

from fairseq_evomoe.kernels import native
from fairseq_evomoe.kernels.reference import SCORES

ISAS = ("portable", "avx2", "avx512")
TABLES = (torch.float32, torch.bfloat16, torch.int8)


def why_not(z: Tensor, tables: Tensor) -> str:
    """What keeps this kernel from serving a call; "" where nothing does."""
    if not z.is_cpu:
        return f"it runs on CPUs, not on {z.device.type}"
    if z.dtype == torch.float64 or tables.dtype not in TABLES:
        return f"it has no {z.dtype} with tables of {tables.dtype}"
    return missing()


# torch.compile looks through a cache to what fills it, and takes the answers of these two as given


@torch.compiler.assume_constant_result
def missing() -> str:
    """Why the ops are not there; "" where they are."""
    return _load()


@torch.compiler.assume_constant_result
def isa() -> int:
    """The widest instruction set of this machine, or EVOMOE_CPU_ISA; index into `ISAS`. Read once.

    Raises:
        ValueError: EVOMOE_CPU_ISA names one that there is not.
    """
    return _isa()


@functools.cache
def _load() -> str:
    missing = native.load("lookup_cpu")
    if not missing:
        torch.library.register_fake("evomoe::lookup_cpu")(_fake)
        torch.library.register_fake("evomoe::lookup_cpu_infer")(lambda *args: _fake(*args)[0])
        torch.library.register_fake("evomoe::lookup_cpu_backward")(_fake_backward)
        torch.library.register_autograd("evomoe::lookup_cpu", _backward, setup_context=_keep)
    return missing


@functools.cache
def _isa() -> int:
    best = torch.ops.evomoe.lookup_cpu_isa()
    asked = os.environ.get("EVOMOE_CPU_ISA")
    if not asked:
        return best
    if asked not in ISAS[: best + 1]:
        raise ValueError(
            f"EVOMOE_CPU_ISA={asked!r}: this machine has {', '.join(ISAS[: best + 1])}"
        )
    return ISAS.index(asked)


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
    args = (
        wide.contiguous(),
        tables.contiguous(),
        row_scale,
        SCORES.index(score),
        temperature,
        isa(),
    )
    ops = torch.ops.evomoe
    if torch.is_grad_enabled() and (z.requires_grad or tables.requires_grad):
        y = ops.lookup_cpu.default(*args)[0]
    else:
        y = ops.lookup_cpu_infer.default(*args)
    return y if wide is z else y.to(z.dtype)


def _fake(z, tables, row_scale, score, temperature, isa):
    rows, count, _ = z.shape
    y = z.new_empty(rows, tables.size(2))
    return y, z.new_empty(rows, count, dtype=torch.int32), z.new_empty(rows, count)


def _fake_backward(dy, z, tables, code, p, score, temperature, need_z, need_t, isa):
    dz = z.new_empty(z.size(0) if need_z else 0, *z.shape[1:])
    return dz, z.new_empty(tables.size(0) if need_t else 0, *tables.shape[1:])


def _keep(ctx, inputs, output):
    z, tables, row_scale, ctx.score, ctx.temperature, ctx.isa = inputs
    if row_scale is not None:
        raise ValueError("tables with a scale a row are for inference: they have no gradient")
    _, code, p = output
    ctx.mark_non_differentiable(code, p)
    ctx.save_for_backward(z, tables, code, p)


def _backward(ctx, dy, *unused):
    z, tables, code, p = ctx.saved_tensors
    need_z, need_t = ctx.needs_input_grad[:2]
    dz, dt = torch.ops.evomoe.lookup_cpu_backward(
        dy.contiguous(), z, tables, code, p, ctx.score, ctx.temperature, need_z, need_t, ctx.isa
    )
    dt = dt.to(tables.dtype) if need_t else None
    return dz if need_z else None, dt, None, None, None, None
