"""The look-up of few rows on GPUs for decoding, in CUDA C++ (csrc/lookup_cuda.cu).

Letters: B rows, K tables, t bits per table, N = 2^t rows per table, H output width.

A call makes one launch, or two if the tables are split among blocks, and it spares the work that
Triton does on the host before each launch. Nothing waits for the host, so a CUDA graph can capture
the call. It is for inference only.
"""

import ctypes
import functools
import logging
from pathlib import Path

import torch
from torch import Tensor

from fairseq_evomoe.kernels import native
from fairseq_evomoe.kernels.backend import constant_when_compiled
from fairseq_evomoe.kernels.lookup.score import SCORES

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"

FEW = 16
"""Largest number of rows that this kernel serves.

If there are more rows, several of them read the same table row, so that Triton's tiles pay off.
"""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
WARPS = 8


def unsupported(z: Tensor, tables: Tensor) -> str:
    """Reason why this kernel cannot serve a call, or "" if it can."""
    if z.device.type != "cuda":
        return f"it runs on CUDA devices, not on {z.device.type}"
    if torch.is_grad_enabled() and (z.requires_grad or tables.requires_grad):
        return "it has no gradients"
    return unsupported_sizes(z, tables) or unavailable()


def unsupported_sizes(z: Tensor, tables: Tensor) -> str:
    """Reason why this kernel does not support the shapes or dtypes, or "" if it does."""
    if z.dtype not in (torch.float32, torch.bfloat16) or tables.dtype not in TYPES:
        return f"it has no {z.dtype} with tables of {tables.dtype}"
    if z.size(0) > FEW:
        return f"it takes at most {FEW} rows, not {z.size(0)}"
    if z.size(2) > 31:
        return f"it takes at most 31 bits, not {z.size(2)}"
    return ""


@constant_when_compiled
def unavailable() -> str:
    """Reason why the library is unavailable, or "" if it is loaded."""
    return _load()[1]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """Return the library and "", or None and the reason why it cannot be used.

    All CUDA devices of this machine must be able to run it.
    """
    try:
        library = declare(ctypes.CDLL(str(native.build(SOURCES, "lookup_cuda"))))
    except (OSError, RuntimeError) as e:
        reason = str(e)
    else:
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        oldest = min(capabilities, default=(0, 0))
        error = library.evomoe_cuda_ready()
        reason = f"CUDA error {error}: is the driver older than nvcc?" if error else ""
        if oldest < (8, 0):
            reason = f"it is built for compute capability 8.0 and later, not {oldest}"
    if reason:
        logger.info("lookup_cuda is unavailable, Triton serves instead: %s", reason)
        return None, reason
    return library, ""


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declare the function's arguments: 5 pointers, 8 ints, the slope, the device, the stream."""
    pointer, whole = ctypes.c_void_p, ctypes.c_int
    library.evomoe_lookup_few_rows.argtypes = [
        *([pointer] * 5 + [whole] * 8),
        *(ctypes.c_float, whole, pointer),
    ]
    return library


def shares(rows: int, strips: int, count: int, processors: int) -> int:
    """Number of parts into which the tables are split.

    It is large enough for two blocks per multiprocessor, unless warps would then have no table.
    """
    wanted = -(-2 * processors // max(1, rows * strips))
    return max(1, min(wanted, count // WARPS))


def call(
    library: ctypes.CDLL,
    z: Tensor,
    tables: Tensor,
    row_scale: Tensor | None,
    score: str,
    temperature: float,
    *,
    parts: int,
    device: int,
    stream: int,
) -> Tensor:
    """Return y (B, H) in z's dtype; z (B, K, t), tables (K, N, H) and row_scale (K, N) contiguous.

    Raises:
        RuntimeError: if CUDA refused the launch.
    """
    rows, count, bits = z.shape
    width = tables.size(2)
    y = z.new_empty(rows, width)
    sums = z.new_empty(parts if parts > 1 else 0, rows, width, dtype=torch.float32)
    error = library.evomoe_lookup_few_rows(
        z.data_ptr(), tables.data_ptr(), None if row_scale is None else row_scale.data_ptr(),
        y.data_ptr(), sums.data_ptr(), TYPES[z.dtype], TYPES[tables.dtype],
        rows, count, bits, width, parts, SCORES.index(score), 2 / temperature, device, stream,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"lookup_cuda: CUDA error {error} at launch")
    return y


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _forward(
    z: Tensor, tables: Tensor, row_scale: Tensor | None, score: str, temperature: float
) -> Tensor:
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    if tables.data_ptr() % 16:
        # the kernel reads aligned pieces of 16 bytes, and this view begins inside one
        tables = tables.clone()
    device = z.device.index
    strips = -(-tables.size(2) * tables.element_size() // 512)
    return call(
        library, z, tables, row_scale, score, temperature,
        parts=shares(z.size(0), strips, z.size(1), _processors(device)),
        device=device, stream=torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip


@torch.library.custom_op("evomoe::lookup_cuda", mutates_args=())
def _op(
    z: Tensor, tables: Tensor, row_scale: Tensor | None, score: str, temperature: float
) -> Tensor:
    return _forward(z, tables, row_scale, score, temperature)


@_op.register_fake
def _(
    z: Tensor, tables: Tensor, row_scale: Tensor | None, score: str, temperature: float
) -> Tensor:
    return z.new_empty(z.size(0), tables.size(2))


def lookup(
    z: Tensor,
    tables: Tensor,
    *,
    score: str,
    temperature: float = 1.0,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See `lookup.lookup`."""
    # calling a custom op costs host time, which an eager call can save
    function = torch.ops.evomoe.lookup_cuda if torch.compiler.is_compiling() else _forward
    scale = None if row_scale is None else row_scale.float().contiguous()
    return function(z.contiguous(), tables.contiguous(), scale, score, temperature)
