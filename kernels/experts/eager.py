"""Feed-forward networks over expert-sorted rows by library calls, forward and backward.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.

One algorithm serves both stages of routing. In the sparse case rows are gathered once into expert
order, each expert works on a contiguous slice, and the weighted outputs are added back. In the
dense case (`pairs.token` is None) every expert reads the rows where they lie, and nothing is
permuted. Combine weights multiply rows of width D, never of width F, and the weighted rows serve
both the weight gradients and the input gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.kernels.experts.values import ExpertWeights, Pairs
from fairseq_evomoe.kernels.transformer.matmul import by_onednn

Activation = Callable[[Tensor], Tensor]


def grouped_ffn(
    x: Tensor,
    experts: ExpertWeights,
    pairs: Pairs,
    *,
    activation: Activation,
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the pairs (t, e) of weight * (W2_e drop(act(W1_e x_t + b1_e)) + b2_e).

    Args:
        x: token states, (T, D).
        experts: weights of one dtype.
        pairs: in expert order.
        activation: elementwise function of a tensor.
        dropout: probability of zeroing a hidden unit; 0 outside training.

    Returns:
        (T, D), dtype of `x`. Differentiable in x, the experts' weights and the combine weights.

    Raises:
        ValueError: the pairs do not add up.
    """
    check_pairs(x, experts, pairs)
    compiled = x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and by_onednn())
    if compiled and x.device.type == "cpu":
        pairs = filled_up(pairs)
    weight, token, counts = pairs
    return _GroupedFFN.apply(
        x, *experts, weight.to(x.dtype), token, tuple(counts), activation, dropout
    )


def check_pairs(x: Tensor, experts: ExpertWeights, pairs: Pairs) -> None:
    """Refuse pairs that do not add up.

    Raises:
        ValueError: counts, tokens and weights are of different numbers of pairs.
    """
    weight, token, counts = pairs
    expected = x.size(0) * experts.w1.size(0) if token is None else token.numel()
    if sum(counts) != expected or weight.numel() != expected:
        raise ValueError(
            f"{expected} pairs, but counts sum to {sum(counts)} and there are {weight.numel()} "
            "weights"
        )


def filled_up(pairs: Pairs, multiple: int = 32) -> Pairs:
    """Fill the rows of each expert up to a multiple, with pairs of token 0 of weight 0.

    oneDNN, which multiplies bfloat16 on CPUs, and float32 if `matmul` says so, compiles code for
    each number of rows that it meets. An expert's number of rows is another one in every step, so
    most products would wait for it.
    """
    weight, token, counts = pairs
    if token is None:
        return pairs
    tokens, weights, start = [], [], 0
    for n in counts:
        more = -n % multiple
        tokens += [token[start : start + n], token.new_zeros(more)]
        weights += [weight[start : start + n], weight.new_zeros(more)]
        start += n
    return Pairs(torch.cat(weights), torch.cat(tokens), [n + -n % multiple for n in counts])


def slices(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, slice of its rows) for every expert that has rows."""
    start = 0
    for e, n in enumerate(counts):
        if n:
            yield e, slice(start, start + n)
        start += n


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        weight: Tensor,
        token: Tensor | None,
        counts: tuple[int, ...],
        activation: Activation,
        dropout: float,
    ) -> Tensor:
        dense = token is None
        rows = x if token is None else x.index_select(0, token)
        pairs = sum(counts)
        h = x.new_empty(pairs, w1.size(1))
        for e, s in slices(counts):
            torch.addmm(b1[e], rows if dense else rows[s], w1[e].t(), out=h[s])

        pre = kept = None
        if activation is torch.nn.functional.relu:
            h.relu_()
        else:
            pre, h = h, activation(h)
        if dropout > 0:
            kept = torch.rand_like(h) >= dropout
            # Not in place, since an activation may return its own input.
            h = h * kept
            h *= 1 / (1 - dropout)

        out = x.new_empty(pairs, x.size(1))
        for e, s in slices(counts):
            torch.addmm(b2[e], h[s], w2[e].t(), out=out[s])
        y = torch.zeros_like(x)
        if token is None:
            for _, s in slices(counts):
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
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, b2, weight, token, h, pre, kept, out = ctx.saved_tensors
        dense, counts = token is None, ctx.counts
        dy = dy.contiguous()
        rows = x if dense else x.index_select(0, token)
        dout = dy.repeat(len(counts), 1) if dense else dy.index_select(0, token)
        dweight = (dout * out).sum(-1) if out is not None else None
        dout *= weight[:, None]

        dh = torch.empty_like(h)
        # No product is written for an expert without rows, so its gradient must start as 0.
        blank = torch.zeros_like if 0 in counts else torch.empty_like
        dw2, db2 = blank(w2), torch.zeros_like(b2)
        for e, s in slices(counts):
            torch.mm(dout[s], w2[e], out=dh[s])
            torch.mm(dout[s].t(), h[s], out=dw2[e])
            torch.sum(dout[s], 0, out=db2[e])
        dh = _activation_backward(dh, h, pre, kept, ctx.activation, ctx.dropout)

        dw1 = blank(w1)
        db1 = w1.new_zeros(w1.shape[:2])
        needs_dx = ctx.needs_input_grad[0]
        dx: Any = torch.zeros_like(x) if needs_dx else None
        drows: Any = None if dense or not needs_dx else torch.empty_like(rows)
        for e, s in slices(counts):
            torch.mm(dh[s].t(), rows if dense else rows[s], out=dw1[e])
            torch.sum(dh[s], 0, out=db1[e])
            if needs_dx and dense:
                dx.addmm_(dh[s], w1[e])
            elif needs_dx:
                torch.mm(dh[s], w1[e], out=drows[s])
        if drows is not None:
            dx.index_add_(0, token, drows)
        return dx, dw1, db1, dw2, db2, dweight, None, None, None, None


def _activation_backward(
    dh: Tensor,
    h: Tensor,
    pre: Tensor | None,
    kept: Tensor | None,
    activation: Activation,
    dropout: float,
) -> Tensor:
    """Gradient of the pre-activation, (A, F), from that of the dropped-out activation."""
    if pre is None:
        # A ReLU unit passes gradient iff it is positive after dropout, so `h` alone decides.
        dh = torch.ops.aten.threshold_backward(dh, h, 0)
        return dh if dropout == 0 else dh.mul_(1 / (1 - dropout))
    if kept is not None:
        dh = dh * kept
        dh *= 1 / (1 - dropout)
    with torch.enable_grad():
        leaf = pre.detach().requires_grad_()
        return torch.autograd.grad(activation(leaf), leaf, dh)[0]
