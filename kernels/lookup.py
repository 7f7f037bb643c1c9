"""Hashed table look-up: signs choose a row in each table, their confidence weighs it.

Letters: B rows, K tables, t bits a table (tau), N = 2^t rows a table, H output width.

MemoryFormer (arXiv 2411.12992), section 2.3. Hash, score, sum and table gradient are float32 (or
float64) whatever the dtypes of input and tables. The official code packs codes in the input's
dtype, where bfloat16 gets every second code wrong from 10 bits on: here they are integers.
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend, lookup_cpu, lookup_cuda, reference
from fairseq_evomoe.kernels.reference import SCORES


def lookup(
    z: Tensor,
    tables: Tensor,
    *,
    score: str,
    temperature: float = 1.0,
    row_scale: Tensor | None = None,
) -> Tensor:
    """y_b = sum_k p(z_bk) T_k[code(z_bk)], eq. 11 of arXiv 2411.12992.

    code = sum_i [z_i >= 0] 2^i, first value lowest (eq. 4). With S = sum_i |z_i| `score` is `prob`:
    p = prod_i sigmoid(2 |z_i| / temperature) (eq. 10); `abs_prob`: S p, as in the official code;
    `l1`: S / t. The code has no gradient; dp/dz_i goes by sign(z_i), with sign(0) = +1 (eq. 12).

    Args:
        z: (B, K, t), any float dtype.
        tables: (K, N, H), any float dtype; int8 with a `row_scale`.
        score: one of `SCORES`.
        temperature: of `prob` and `abs_prob`.
        row_scale: (K, N) float32, multiplies each row; for inference, without gradients.

    Returns:
        (B, H), dtype of `z`. Differentiable in z and tables; their gradients are dense.

    Raises:
        ValueError: shapes that do not fit, or an unknown score.
    """
    given, stored = z.shape, tables.shape
    if len(given) != 3:
        raise ValueError(f"z is (B, K, t), not {tuple(given)}")
    if len(stored) != 3 or stored[0] != given[1] or stored[1] != 2 ** given[2]:
        raise ValueError(
            f"z {tuple(given)} needs tables ({given[1]}, {2 ** given[2]}, H), got {tuple(stored)}"
        )
    if score not in SCORES:
        raise ValueError(f"score {score!r}: choose one of {', '.join(SCORES)}")
    native = lookup_cuda if z.is_cuda else lookup_cpu
    # one row takes no longer than asking every backend in turn
    at_once = not backend.forced and not native.why_not(z, tables)
    name = "native" if at_once else _choose(native, z, tables)
    if name == "native":
        return native.lookup(z, tables, score=score, temperature=temperature, row_scale=row_scale)
    if name == "triton":
        from fairseq_evomoe.kernels import lookup_triton

        return lookup_triton.lookup(
            z, tables, score=score, temperature=temperature, row_scale=row_scale
        )
    with torch.autocast(z.device.type, enabled=False):
        if name == "torch" and row_scale is not None:
            return _scaled_lookup(z, tables, row_scale, score, temperature)
        if name == "torch":
            return _Lookup.apply(z, tables, score, temperature)
        whole = tables if row_scale is None else tables.float() * row_scale[..., None]
        return reference.lookup(z, whole, score=score, temperature=temperature)


def _choose(native: ModuleType, z: Tensor, tables: Tensor) -> str:
    return backend.choose(
        native=lambda: native.why_not(z, tables),
        triton=lambda: _without_triton(z, tables),
        torch=backend.always,
        reference=backend.always,
    )


def _without_triton(z: Tensor, tables: Tensor) -> str:
    """Why the Triton kernel cannot serve; imported only where there is a device for it."""
    why = backend.without_triton(z.device.type)
    if why:
        return why
    from fairseq_evomoe.kernels import lookup_triton

    return lookup_triton.why_not(z, tables)


@torch.no_grad()
def _scaled_lookup(z, tables, row_scale, score, temperature):
    exact = z.float()
    rows = codes(exact) + torch.arange(z.size(1), device=z.device) * tables.size(1)
    p = weigh(exact, score, temperature) * row_scale.reshape(-1)[rows]
    return _bags(rows, tables.reshape(-1, tables.size(-1)), p).to(z.dtype)


def quantise(tables: Tensor) -> tuple[Tensor, Tensor]:
    """Tables as int8 with a scale a row: (K, N, H) -> (K, N, H) int8, (K, N) float32.

    The largest value of a row becomes 127 or -127; the error is at most half a step of the scale.
    """
    wide = tables.float()
    scale = wide.abs().amax(-1) / 127
    steps = wide / scale.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return steps.round().to(torch.int8), scale


def codes(z: Tensor) -> Tensor:
    """Row of each table, sum_i [z_i >= 0] 2^i: (B, K, t) -> (B, K) int64."""
    places = 2 ** torch.arange(z.size(-1), device=z.device)
    return ((z >= 0) * places).sum(-1)


def patterns(bits: int, device: torch.device | None = None) -> Tensor:
    """The bits of every row's number, as `codes` packs them: (2^t, t) int64, lowest first."""
    rows = torch.arange(2**bits, device=device)
    return (rows[:, None] >> torch.arange(bits, device=device)) & 1


def weigh(z: Tensor, score: str, temperature: float) -> Tensor:
    """The score of each hashed slice, (B, K, t) float32 or float64 -> (B, K)."""
    size = z.abs()
    if score == "l1":
        return size.mean(-1)
    # in the log domain: a product of many factors would lose its small ones
    p = (-F.softplus(-2 / temperature * size)).sum(-1).exp()
    return p if score == "prob" else size.sum(-1) * p


def weigh_backward(z: Tensor, p: Tensor, dp: Tensor, score: str, temperature: float) -> Tensor:
    """dz (B, K, t) from dp (B, K): sign(z_i) dp/d|z_i|, in closed form."""
    sign = torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
    if score == "l1":
        return sign * (dp / z.size(-1))[..., None]
    slope = 2 / temperature * torch.sigmoid(-2 / temperature * z.abs())
    if score == "prob":
        return sign * slope * (dp * p)[..., None]
    total = z.abs().sum(-1, keepdim=True)
    plain = (-F.softplus(-2 / temperature * z.abs())).sum(-1).exp()
    return sign * (1 + total * slope) * (dp * plain)[..., None]


def _moments(temperature: float, power: int) -> list[float]:
    """E[|z|^m sigmoid(2 |z| / temperature)^power] for m = 0, 1, 2 and standard normal z."""
    x = torch.linspace(0, 12, 24001, dtype=torch.float64)
    density = torch.exp(-x * x / 2) * math.sqrt(2 / math.pi)
    base = density * torch.sigmoid(2 * x / temperature).pow(power)
    return [float(torch.trapezoid(base * x**m, x)) for m in range(3)]


def score_moment(score: str, bits: int, temperature: float) -> float:
    """Root mean square of the score for standard normal z, by one-dimensional quadrature.

    With A_m = E[|z|^m sigmoid(2 |z| / temperature)^2] and independent z_i, E[p^2] = A_0^t and
    E[(S p)^2] = t A_2 A_0^(t-1) + t (t-1) A_1^2 A_0^(t-2).
    """
    if score == "l1":
        return math.sqrt(bits + bits * (bits - 1) * 2 / math.pi) / bits
    a0, a1, a2 = _moments(temperature, 2)
    if score == "prob":
        return math.sqrt(a0**bits)
    pairs = bits * (bits - 1) * a1 * a1 * a0 ** (bits - 2) if bits > 1 else 0.0
    return math.sqrt(bits * a2 * a0 ** (bits - 1) + pairs)


def linear_gain(score: str, bits: int, temperature: float) -> float:
    """a for which T[c] = a W s_c makes p(z) T[code(z)] the best look-up for W z, z standard normal.

    s_c are the signs of code c. By least squares a = E[p |z_i|] / E[p^2]; with B_m as A_m of
    `score_moment` but the first power of the sigmoid, E[p |z_i|] = B_1 B_0^(t-1) and
    E[S p |z_i|] = B_2 B_0^(t-1) + (t-1) B_1^2 B_0^(t-2).
    """
    square = score_moment(score, bits, temperature) ** 2
    if score == "l1":
        return (1 + (bits - 1) * 2 / math.pi) / bits / square
    b0, b1, b2 = _moments(temperature, 1)
    if score == "prob":
        return b1 * b0 ** (bits - 1) / square
    pairs = (bits - 1) * b1 * b1 * b0 ** (bits - 2) if bits > 1 else 0.0
    return (b2 * b0 ** (bits - 1) + pairs) / square


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, tables, score, temperature):
        exact = z.double() if z.dtype == torch.float64 else z.float()
        rows = codes(exact)
        rows = rows + torch.arange(z.size(1), device=z.device) * tables.size(1)
        p = weigh(exact, score, temperature)
        flat = tables.reshape(-1, tables.size(-1))
        y = _bags(rows, flat, p)
        ctx.save_for_backward(z, tables, rows, p)
        ctx.score, ctx.temperature = score, temperature
        return y.to(z.dtype)

    @staticmethod
    def backward(ctx, dy):
        z, tables, rows, p = ctx.saved_tensors
        flat = tables.reshape(-1, tables.size(-1))
        dy = dy.to(p.dtype).contiguous()
        dz = dtables = None
        if ctx.needs_input_grad[1]:
            dtables = _bags_backward(rows, p, dy, len(flat)).view(tables.shape).to(tables.dtype)
        if ctx.needs_input_grad[0]:
            dp = _row_products(rows, flat, dy)
            exact = z.to(p.dtype)
            dz = weigh_backward(exact, p, dp, ctx.score, ctx.temperature).to(z.dtype)
        return dz, dtables, None, None


_CHUNK = 2**22
"""Gathered numbers at a time where rows must be widened: bounds the memory beside the result."""


def _chunks(rows: Tensor, width: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, rows.size(1) * width))
    return [slice(a, a + step) for a in range(0, rows.size(0), step)]


def _bags(rows: Tensor, flat: Tensor, p: Tensor) -> Tensor:
    """sum_k p_bk flat[rows_bk]: (B, H) in p's dtype."""
    if flat.dtype == p.dtype:
        return F.embedding_bag(rows, flat, mode="sum", per_sample_weights=p)
    y = p.new_empty(rows.size(0), flat.size(1))
    for part in _chunks(rows, flat.size(1)):
        gathered = flat[rows[part]].to(p.dtype)
        y[part] = torch.bmm(p[part, None, :], gathered).squeeze(1)
    return y


def _bags_backward(rows: Tensor, p: Tensor, dy: Tensor, height: int) -> Tensor:
    """The table gradient, dense (K N, H): row r gets the sum of p_bk dy_b over all hits."""
    bags, per_bag = rows.shape
    offsets = torch.arange(bags, device=rows.device)
    of_bag = offsets.repeat_interleave(per_bag)
    size = torch.full((bags,), per_bag, device=rows.device)
    most = torch.empty(0, dtype=torch.int64, device=rows.device)
    return torch.ops.aten._embedding_bag_dense_backward(
        dy, rows.reshape(-1), of_bag, size, most, height, False, 0, p.reshape(-1)
    )


def _row_products(rows: Tensor, flat: Tensor, dy: Tensor) -> Tensor:
    """<dy_b, flat[rows_bk]>: (B, K)."""
    products = dy.new_empty(rows.shape)
    for part in _chunks(rows, flat.size(1)):
        gathered = flat[rows[part]].to(dy.dtype)
        products[part] = torch.bmm(gathered, dy[part, :, None]).squeeze(-1)
    return products
