"""The look-up on GPUs, in Triton.

Letters: B rows, K tables, t bits per table, N = 2^t rows per table, H output width.

In the forward pass a program owns one row and a tile of columns. It hashes one slice after another
in registers, adds the weighted table rows in float32 and saves codes and scores for the backward
pass. If there are few rows, the tables are split among programs, whose sums are added in a fixed
order. In the backward pass one program per row and table computes dz. For the table gradient the
hits are sorted by table row, so that one program sums each table row in batch order and writes it
once. There are no atomics, so results do not change from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_evomoe.kernels.lookup.score import SCORES

TABLES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
INPUTS = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(z: Tensor, tables: Tensor) -> str:
    """Reason why this kernel cannot serve a call on a CUDA device, or "" if it can."""
    if z.dtype not in INPUTS or tables.dtype not in TABLES:
        return f"it has no {z.dtype} with tables of {tables.dtype}"
    return ""


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _hash(z_ptr, at, bits, slope, SCORE: tl.constexpr, T: tl.constexpr):
    """Hash and score the slice at z_ptr + at.

    Returns the code, the score, the slice (T,), its mask (T,), the sum of its absolute values and
    its `prob` score. T is the number of bits rounded up to a power of two.
    """
    i = tl.arange(0, T)
    inside = i < bits
    z = tl.load(z_ptr + at + i, mask=inside, other=0).to(tl.float32)
    code = tl.sum(tl.where((z >= 0) & inside, 1 << i, 0), 0)
    size = tl.abs(z)
    total = tl.sum(size, 0)
    # log sigmoid in a form that never overflows; padding contributes log 1 = 0
    logs = tl.where(inside, -tl.log(1 + tl.exp(-slope * size)), 0)
    plain = tl.exp(tl.sum(logs, 0))
    if SCORE == 0:
        p = plain
    elif SCORE == 1:
        p = total * plain
    else:
        p = total / bits
    return code, p, z, inside, total, plain


@triton.jit
def _forward(
    z_ptr, t_ptr, scale_ptr, y_ptr, code_ptr, p_ptr,
    rows, count, height, width, bits, slope, per_split,
    SCORE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
    SCALED: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    # Output of one row in one tile of W columns, over the tables of one split.
    #
    # Grid: (B, ceil(H / W), splits). Pointers: z (B, K, t); t (K, N, H); scale (K, N) float32, read
    # if SCALED; y (splits, B, H), in z's dtype for one split and otherwise float32; code (B, K)
    # int32 and p (B, K) float32, written if SAVE.
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    h = tl.program_id(1) * W + tl.arange(0, W)
    inside = h < width
    y = tl.zeros([W], tl.float32)
    first = split * per_split
    for k in range(first, tl.minimum(first + per_split, count)):
        code, p, _, _, _, _ = _hash(z_ptr, (b * count + k) * bits, bits, slope, SCORE, T)
        row = k * height + code.to(tl.int64)
        weight = p
        if SCALED:
            weight = p * tl.load(scale_ptr + row)
        y += weight * tl.load(t_ptr + row * width + h, mask=inside, other=0).to(tl.float32)
        if SAVE:
            # all tiles of columns have the same values, so only the first one writes them
            own = tl.program_id(1) == 0
            tl.store(code_ptr + b * count + k, code, mask=own)
            tl.store(p_ptr + b * count + k, p, mask=own)
    at = (split.to(tl.int64) * rows + b) * width + h
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_z(
    z_ptr, t_ptr, dy_ptr, dz_ptr,
    count, height, width, bits, slope,
    SCORE: tl.constexpr, T: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    # Gradient of the slice of one row for one table.
    #
    # Grid: (B, K). Pointers: z and dz (B, K, t); t (K, N, H); dy (B, H).
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1)
    at = (b * count + k) * bits
    code, p, z, inside, total, plain = _hash(z_ptr, at, bits, slope, SCORE, T)
    row = k * height + code.to(tl.int64)
    parts = tl.zeros([W], tl.float32)
    for start in range(0, width, W):
        h = start + tl.arange(0, W)
        m = h < width
        dy = tl.load(dy_ptr + b * width + h, mask=m, other=0).to(tl.float32)
        parts += dy * tl.load(t_ptr + row * width + h, mask=m, other=0).to(tl.float32)
    dp = tl.sum(parts, 0)
    away = slope * _sigmoid(-slope * tl.abs(z))
    if SCORE == 0:
        d = dp * p * away
    elif SCORE == 1:
        d = dp * plain * (1 + total * away)
    else:
        d = tl.where(inside, dp / bits, 0)
    d = tl.where(z >= 0, d, -d)
    tl.store(dz_ptr + at + tl.arange(0, T), d.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_tables(
    order_ptr, start_ptr, p_ptr, dy_ptr, dt_ptr,
    count, width, W: tl.constexpr,
):  # fmt: skip
    # Gradient of one table row in one tile of W columns, which is the sum of p dy over its hits.
    #
    # Grid: (K N, ceil(H / W)). Pointers: order (B K,) int64, the hits b K + k sorted by table row;
    # start (K N + 1,) int64, the place in `order` where the hits of each table row begin;
    # p (B, K) float32; dy (B, H); dt (K, N, H).
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * W + tl.arange(0, W)
    inside = h < width
    total = tl.zeros([W], tl.float32)
    for i in range(tl.load(start_ptr + row), tl.load(start_ptr + row + 1)):
        hit = tl.load(order_ptr + i)
        b = hit // count
        dy = tl.load(dy_ptr + b * width + h, mask=inside, other=0).to(tl.float32)
        total += tl.load(p_ptr + hit) * dy
    tl.store(dt_ptr + row * width + h, total.to(dt_ptr.dtype.element_ty), mask=inside)


def _tile(width: int) -> int:
    return min(512, max(16, triton.next_power_of_2(width)))


def splits(rows: int, tiles: int, count: int, processors: int) -> int:
    """Number of parts into which the tables are split, so that few rows still fill a device."""
    wanted = -(-2 * processors // max(1, rows * tiles))
    return max(1, min(wanted, count // 4 or 1, 32))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward(
    z: Tensor,
    tables: Tensor,
    row_scale: Tensor | None,
    score: str,
    temperature: float,
    *,
    save: bool,
    parts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (B, H) in z's dtype, code (B, K) int32 and p (B, K) float32.

    Without `save`, code and p are empty.

    Args:
        z: (B, K, t). tables: (K, N, H), both contiguous. row_scale: (K, N) float32.
        parts: number of parts into which the tables are split; None chooses one for the device.
    """
    rows, count, bits = z.shape
    height, width = tables.shape[1:]
    tile = _tile(width)
    tiles = triton.cdiv(width, tile)
    if parts is None:
        parts = splits(rows, tiles, count, _processors(z.device))
    kept = (rows, count) if save else (0, count)
    code = torch.empty(kept, dtype=torch.int32, device=z.device)
    p = torch.empty(kept, dtype=torch.float32, device=z.device)
    dtype = z.dtype if parts == 1 else torch.float32
    y = torch.empty(parts, rows, width, dtype=dtype, device=z.device)
    if rows:
        _forward[(rows, tiles, parts)](
            z, tables, tables if row_scale is None else row_scale, y, code, p,
            rows, count, height, width, bits, 2 / temperature, -(-count // parts),
            SCORE=SCORES.index(score), T=triton.next_power_of_2(bits), W=tile,
            SCALED=row_scale is not None, SAVE=save,
        )  # fmt: skip
    return (y[0] if parts == 1 else y.sum(0).to(z.dtype)), code, p


def backward(
    dy: Tensor,
    z: Tensor,
    tables: Tensor,
    code: Tensor,
    p: Tensor,
    score: str,
    temperature: float,
    *,
    need_z: bool,
    need_t: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dz (B, K, t) in z's dtype and dT (K, N, H) in the tables' dtype; None if not needed."""
    rows, count, bits = z.shape
    height, width = tables.shape[1:]
    tile = _tile(width)
    dz = dt = None
    if need_z:
        dz = torch.empty_like(z)
        if rows:
            _backward_z[(rows, count)](
                z, tables, dy, dz, count, height, width, bits, 2 / temperature,
                SCORE=SCORES.index(score), T=triton.next_power_of_2(bits), W=tile,
            )  # fmt: skip
    if need_t:
        dt = torch.empty_like(tables)
        row = code + torch.arange(count, device=z.device, dtype=torch.int32) * height
        # a stable sort keeps the hits of a row in batch order, which fixes the order of its sum
        in_order, order = row.flatten().sort(stable=True)
        every = torch.arange(count * height + 1, device=z.device, dtype=torch.int32)
        start = torch.searchsorted(in_order, every)
        _backward_tables[(count * height, triton.cdiv(width, tile))](
            order, start, p, dy, dt, count, width, W=tile
        )
    return dz, dt


@torch.library.custom_op("evomoe::lookup_triton", mutates_args=())
def _op(z: Tensor, tables: Tensor, score: str, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    return forward(z, tables, None, score, temperature, save=True)


@_op.register_fake
def _(z: Tensor, tables: Tensor, score: str, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, count, _ = z.shape
    code = z.new_empty(rows, count, dtype=torch.int32)
    return z.new_empty(rows, tables.size(2)), code, z.new_empty(rows, count, dtype=torch.float32)


@torch.library.custom_op("evomoe::lookup_triton_backward", mutates_args=())
def _op_backward(
    dy: Tensor,
    z: Tensor,
    tables: Tensor,
    code: Tensor,
    p: Tensor,
    score: str,
    temperature: float,
    need_z: bool,
    need_t: bool,
) -> tuple[Tensor, Tensor]:
    dz, dt = backward(dy, z, tables, code, p, score, temperature, need_z=need_z, need_t=need_t)
    # an op must return tensors, so empty ones stand for gradients that are not needed
    return z.new_empty(0) if dz is None else dz, z.new_empty(0) if dt is None else dt


@_op_backward.register_fake
def _(
    dy: Tensor, z: Tensor, tables: Tensor, code: Tensor, p: Tensor, score: str,
    temperature: float, need_z: bool, need_t: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dz = torch.empty_like(z) if need_z else z.new_empty(0)
    return dz, torch.empty_like(tables) if need_t else z.new_empty(0)


@torch.library.custom_op("evomoe::lookup_triton_infer", mutates_args=())
def _op_infer(
    z: Tensor, tables: Tensor, row_scale: Tensor | None, score: str, temperature: float
) -> Tensor:
    return forward(z, tables, row_scale, score, temperature, save=False)[0]


@_op_infer.register_fake
def _(
    z: Tensor, tables: Tensor, row_scale: Tensor | None, score: str, temperature: float
) -> Tensor:
    return z.new_empty(z.size(0), tables.size(2))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, tables, ctx.score, ctx.temperature = inputs
    _, code, p = output
    ctx.mark_non_differentiable(code, p)
    ctx.save_for_backward(z, tables, code, p)


def _gradients(ctx: Any, dy: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    z, tables, code, p = ctx.saved_tensors
    need_z, need_t = ctx.needs_input_grad[:2]
    dz, dt = torch.ops.evomoe.lookup_triton_backward(
        dy.contiguous(), z, tables, code, p, ctx.score, ctx.temperature, need_z, need_t
    )
    return dz if need_z else None, dt if need_t else None, None, None


_op.register_autograd(_gradients, setup_context=_keep)


def lookup(
    z: Tensor,
    tables: Tensor,
    *,
    score: str,
    temperature: float = 1.0,
    row_scale: Tensor | None = None,
) -> Tensor:
    """See `lookup.lookup`."""
    z, tables = z.contiguous(), tables.contiguous()
    grad = torch.is_grad_enabled() and (z.requires_grad or tables.requires_grad)
    if grad and row_scale is None:
        return torch.ops.evomoe.lookup_triton(z, tables, score, temperature)[0]
    # Tables with one scale per row are for inference: their look-up is a constant to autograd.
    z, tables = z.detach(), tables.detach()
    scale = None if row_scale is None else row_scale.float().contiguous()
    if torch.compiler.is_compiling():
        return torch.ops.evomoe.lookup_triton_infer(z, tables, scale, score, temperature)
    return forward(z, tables, scale, score, temperature, save=False)[0]
