"""Hashed table look-up: signs choose a row in each table, and their confidence weights it.

Letters: B rows, K tables, t bits per table (tau), N = 2^t rows per table, H output width.

This is section 2.3 of MemoryFormer (arXiv 2411.12992). Hash, score, sum and table gradient are
float32 (or float64) whatever the dtypes of input and tables. The official code packs codes in the
input's dtype, in which bfloat16 gets every second code wrong from 10 bits on; here codes are
integers.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor

from fairseq_evomoe.kernels import backend, self_check
from fairseq_evomoe.kernels.lookup import cpu, cuda, eager, reference
from fairseq_evomoe.kernels.lookup.score import SCORES, quantise


def lookup(
    z: Tensor,
    tables: Tensor,
    *,
    score: str,
    temperature: float = 1.0,
    row_scale: Tensor | None = None,
) -> Tensor:
    """y_b = sum_k p(z_bk) T_k[code(z_bk)], eq. 11 of arXiv 2411.12992.

    code = sum_i [z_i >= 0] 2^i, so that the first value is the lowest bit (eq. 4). The score p
    depends on `score`. For `prob` it is prod_i sigmoid(2 |z_i| / temperature) (eq. 10). For
    `abs_prob` it is that times S = sum_i |z_i|, as in the official code. For `l1` it is S / t. The
    code has no gradient; dp/dz_i = sign(z_i) dp/d|z_i| with sign(0) = +1 (eq. 12).

    Args:
        z: (B, K, t), any float dtype.
        tables: (K, N, H), any float dtype, or int8 together with a `row_scale`.
        score: one of `SCORES`.
        temperature: temperature of `prob` and `abs_prob`.
        row_scale: (K, N) float32, a factor per table row; for inference only, without gradients.

    Returns:
        (B, H), in the dtype of `z`. Differentiable in z and tables, with dense gradients.

    Raises:
        ValueError: if the shapes do not fit or the score is unknown.
    """
    given, stored = z.shape, tables.shape
    if len(given) != 3:
        raise ValueError(f"z must be (B, K, t), got {tuple(given)}")
    if len(stored) != 3 or stored[0] != given[1] or stored[1] != 2 ** given[2]:
        raise ValueError(
            f"z {tuple(given)} needs tables ({given[1]}, {2 ** given[2]}, H), got {tuple(stored)}"
        )
    if score not in SCORES:
        raise ValueError(f"score {score!r}: choose one of {', '.join(SCORES)}")
    native = cuda if z.is_cuda else cpu
    # A look-up of one row takes no longer than asking every backend in turn.
    at_once = not backend.forced_backend() and not _native_unsupported(z, tables)
    name = "native" if at_once else _choose(z, tables)
    if name == "native":
        return native.lookup(z, tables, score=score, temperature=temperature, row_scale=row_scale)
    if name == "triton":
        from fairseq_evomoe.kernels.lookup import lookup_triton

        return lookup_triton.lookup(
            z, tables, score=score, temperature=temperature, row_scale=row_scale
        )
    with torch.autocast(z.device.type, enabled=False):
        if name == "torch" and row_scale is not None:
            return eager.scaled_lookup(z, tables, row_scale, score=score, temperature=temperature)
        if name == "torch":
            return eager.lookup(z, tables, score=score, temperature=temperature)
        scaled = tables if row_scale is None else tables.float() * row_scale[..., None]
        return reference.lookup(z, scaled, score=score, temperature=temperature)


def _choose(z: Tensor, tables: Tensor) -> str:
    return backend.choose_backend(
        native=lambda: _native_unsupported(z, tables),
        triton=lambda: _triton_unsupported(z, tables),
        torch=backend.supported,
        reference=backend.supported,
    )


def _native_unsupported(z: Tensor, tables: Tensor) -> str:
    if not z.is_cuda:
        return cpu.unsupported(z, tables)
    return cuda.unsupported(z, tables) or self_check.failure(*_check(cuda, z, tables))


def _triton_unsupported(z: Tensor, tables: Tensor) -> str:
    """Why the Triton kernel cannot serve; Triton is imported only if there is a device for it."""
    reason = backend.triton_unsupported(z.device.type)
    if reason:
        return reason
    from fairseq_evomoe.kernels.lookup import lookup_triton

    reason = lookup_triton.unsupported(z, tables)
    return reason or self_check.failure(*_check(lookup_triton, z, tables))


def _check(kernel: ModuleType, z: Tensor, tables: Tensor) -> tuple[str, Tensor, self_check.Case]:
    """The arguments of `self_check.failure` for a kernel and the dtypes of a call."""
    name, case = _case(kernel, tables.dtype)
    return name, z, case


@functools.cache
def _case(kernel: ModuleType, stored_as: torch.dtype) -> tuple[str, self_check.Case]:
    """A kernel's look-up of 7 rows in 3 tables of 5 bits beside torch's, and its name."""

    def case(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        z = self_check.draw(1, device, dtype, 7, 3, 5)
        stored = self_check.draw(2, device, torch.float32, 3, 32, 37).detach()
        scale = None
        if stored_as == torch.int8:
            stored, scale = quantise(stored)
        stored = stored.to(stored_as)
        exact, wide = z.detach().float(), stored.float()
        if scale is not None:
            wide = wide * scale[..., None]
        if kernel is cuda or scale is not None:
            with torch.no_grad():
                have = kernel.lookup(z, stored, score="abs_prob", row_scale=scale)
                return [have], [eager.lookup(exact, wide, score="abs_prob", temperature=1.0)]
        leaves = [z, stored.requires_grad_()]
        have = self_check.with_gradients(kernel.lookup(*leaves, score="abs_prob"), leaves)
        leaves = [exact.requires_grad_(), wide.requires_grad_()]
        y = eager.lookup(*leaves, score="abs_prob", temperature=1.0)
        return have, self_check.with_gradients(y, leaves)

    return f"look-up, {'CUDA' if kernel is cuda else 'Triton'}, {stored_as}", case
