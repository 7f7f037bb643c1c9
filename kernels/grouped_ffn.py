"""Feed-forward networks over expert-sorted rows, forward and backward.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.

One algorithm serves both stages of routing. Sparse: rows are gathered once into expert order, each
expert works on a contiguous slice, and the weighted outputs are added back. Dense (`token=None`):
every expert reads the rows where they lie, nothing is permuted. Gate weights multiply rows of
width D, never of width F, and the weighted rows serve both weight and input gradients.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.kernels import backend, grouped_ffn_gpu, reference, routing
from fairseq_evomoe.kernels.compiled_ffn import compiled_moe_ffn, name_of

DENSE_FROM = 0.97
"""Density A / (T E) from which all pairs in place beat gathered rows (measured on a CPU)."""


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device in the dtype of autocast, where that is on."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def moe_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    weights: Tensor,
    active: Tensor,
    at_most: int | None = None,
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the active pairs (t, e) of weight * FFN_e(x_t), from a plan's matrices.

    Nearly dense plans run in place over all pairs (inactive ones weigh 0), and sparse ones gather
    rows by expert, at a cost that follows the number of active pairs: on GPUs by Triton kernels,
    with the matrix products that suit the device (`grouped_ffn_gpu`). There memory and elementwise
    work follow `at_most`.

    Args:
        x, w1, b1, w2, b2, activation, dropout: as for `grouped_ffn`.
        weights: combine weights, (T, E), 0 where inactive.
        active: (T, E) bool.
        at_most: no token has more active experts than that; None: count them.

    Returns:
        (T, D), dtype of `x`, or of autocast.
    """
    x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
    if torch.compiler.is_compiling():
        seed = torch.zeros((), dtype=torch.int64)
        if dropout > 0:
            seed = torch.randint(2**62, (), dtype=torch.int64)
        told = name_of(activation), dropout
        return compiled_moe_ffn(x, w1, b1, w2, b2, weights, active, seed, *told)
    name = backend.choose(
        triton=lambda: grouped_ffn_gpu.why_not(x, w1, activation, dropout),
        torch=backend.always,
        reference=backend.always,
    )
    tokens, experts = active.shape
    nearly_all = DENSE_FROM * tokens * experts
    rest: Any = dict(activation=activation, dropout=dropout)
    if name == "triton":
        pairs = int(active.sum()) if at_most is None else at_most * tokens
        with torch.autocast(x.device.type, enabled=False):
            if pairs < nearly_all:
                return grouped_ffn_gpu.sparse_ffn(
                    x, w1, b1, w2, b2, weight=weights, active=active, pairs=pairs, **rest
                )
            every = dict(token=None, counts=[tokens] * experts)
            return _torch_grouped_ffn(
                x, w1, b1, w2, b2, weight=weights.t().reshape(-1), **every, **rest
            )
    token: Tensor | None
    token, counts = routing.sort_pairs(active)
    if sum(counts) >= nearly_all:
        weight, token, counts = weights.t().reshape(-1), None, [tokens] * experts
    else:
        weight = weights.t().masked_select(active.t())
    return grouped_ffn(x, w1, b1, w2, b2, weight=weight, token=token, counts=counts, **rest)


def grouped_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    weight: Tensor,
    token: Tensor | None,
    counts: Sequence[int],
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the pairs (t, e) of weight * (W2_e drop(act(W1_e x_t + b1_e)) + b2_e).

    Args:
        x: token states, (T, D).
        w1: (E, F, D). b1: (E, F). w2: (E, D, F). b2: (E, D): `nn.Linear`'s layout, stacked.
        weight: combine weight of each pair, (A,), in expert-sorted order.
        token: token of each pair, (A,) int64, expert-sorted; None when every expert takes every
            token in order (A = T * E).
        counts: pairs of each expert, E ints that sum to A.
        activation: elementwise function of a tensor.
        dropout: probability of zeroing a hidden unit; 0 outside training.

    Returns:
        (T, D), dtype of `x`. Differentiable in x, all weights and `weight`.

    Raises:
        ValueError: the pairs do not add up.
    """
    pairs = x.size(0) * w1.size(0) if token is None else token.numel()
    if sum(counts) != pairs or weight.numel() != pairs:
        raise ValueError(
            f"{pairs} pairs, but counts sum to {sum(counts)} and there are {weight.numel()} weights"
        )
    name = backend.choose(torch=backend.always, reference=backend.always)
    op: Callable[..., Tensor] = _torch_grouped_ffn if name == "torch" else reference.grouped_ffn
    kwargs = dict(weight=weight, token=token, counts=counts, activation=activation, dropout=dropout)
    x, w1, b1, w2, b2 = _autocast(x, w1, b1, w2, b2)
    with torch.autocast(x.device.type, enabled=False):
        return op(x, w1, b1, w2, b2, **kwargs)


def _torch_grouped_ffn(x, w1, b1, w2, b2, *, weight, token, counts, activation, dropout):
    return _GroupedFFN.apply(
        x, w1, b1, w2, b2, weight.to(x.dtype), token, tuple(counts), activation, dropout
    )


def _slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for the experts that have any."""
    start = 0
    for e, n in enumerate(counts):
        if n:
            yield e, slice(start, start + n)
        start += n


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w1, b1, w2, b2, weight, token, counts, activation, dropout):
        dense = token is None
        rows = x if dense else x.index_select(0, token)
        pairs = sum(counts)
        h = x.new_empty(pairs, w1.size(1))
        for e, s in _slices(counts):
            torch.addmm(b1[e], rows if dense else rows[s], w1[e].t(), out=h[s])

        pre = kept = None
        if activation is torch.nn.functional.relu:
            h.relu_()
        else:
            pre, h = h, activation(h)
        if dropout > 0:
            kept = torch.rand_like(h) >= dropout
            # not in place: an activation may return its own input
            h = h * kept
            h *= 1 / (1 - dropout)

        out = x.new_empty(pairs, x.size(1))
        for e, s in _slices(counts):
            torch.addmm(b2[e], h[s], w2[e].t(), out=out[s])
        y = torch.zeros_like(x)
        if dense:
            for _, s in _slices(counts):
                y.addcmul_(out[s], weight[s, None])
        else:
            y.index_add_(0, token, out * weight[:, None])

        needs_out = ctx.needs_input_grad[5]
        ctx.save_for_backward(
            x, w1, w2, b2, weight, token, h, pre, kept, out if needs_out else None
        )
        ctx.counts, ctx.activation, ctx.dropout = counts, activation, dropout
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w1, w2, b2, weight, token, h, pre, kept, out = ctx.saved_tensors
        dense, counts = token is None, ctx.counts
        dy = dy.contiguous()
        rows = x if dense else x.index_select(0, token)
        dout = dy.repeat(len(counts), 1) if dense else dy.index_select(0, token)
        dweight = (dout * out).sum(-1) if out is not None else None
        dout *= weight[:, None]

        dh = torch.empty_like(h)
        # an expert without rows gets no product written, so its gradient must start as 0
        blank = torch.zeros_like if 0 in counts else torch.empty_like
        dw2, db2 = blank(w2), torch.zeros_like(b2)
        for e, s in _slices(counts):
            torch.mm(dout[s], w2[e], out=dh[s])
            torch.mm(dout[s].t(), h[s], out=dw2[e])
            torch.sum(dout[s], 0, out=db2[e])
        dh = _activation_backward(dh, h, pre, kept, ctx.activation, ctx.dropout)

        dw1 = blank(w1)
        db1 = w1.new_zeros(w1.shape[:2])
        needs_dx = ctx.needs_input_grad[0]
        dx = torch.zeros_like(x) if needs_dx else None
        drows = None if dense or not needs_dx else torch.empty_like(rows)
        for e, s in _slices(counts):
            torch.mm(dh[s].t(), rows if dense else rows[s], out=dw1[e])
            torch.sum(dh[s], 0, out=db1[e])
            if needs_dx and dense:
                dx.addmm_(dh[s], w1[e])
            elif needs_dx:
                torch.mm(dh[s], w1[e], out=drows[s])
        if drows is not None:
            dx.index_add_(0, token, drows)
        return dx, dw1, db1, dw2, db2, dweight, None, None, None, None


def _activation_backward(dh, h, pre, kept, activation, dropout):
    """Gradient of the pre-activation, (A, F), from that of the dropped-out activation."""
    if pre is None:
        # relu: a unit passes gradient iff it is positive after dropout, so `h` alone decides
        dh = torch.ops.aten.threshold_backward(dh, h, 0)
        return dh if dropout == 0 else dh.mul_(1 / (1 - dropout))
    if kept is not None:
        dh = dh * kept
        dh *= 1 / (1 - dropout)
    with torch.enable_grad():
        leaf = pre.detach().requires_grad_()
        return torch.autograd.grad(activation(leaf), leaf, dh)[0]
