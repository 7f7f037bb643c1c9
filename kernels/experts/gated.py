"""Gated feed-forward networks (SwiGLU and its kin) over expert-sorted rows, on CPUs.

These are the experts of Mixtral, Qwen and OLMoE: W_down (act(W_gate x) * (W_up x)), where W_gate
and W_up are stored as one matrix. The algorithm is that of `eager`: rows are gathered once, each
expert works on a contiguous slice, and the weighted outputs are added back. Letters: T tokens, D
model width, F hidden width, E experts, A active (token, expert) pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_evomoe.kernels.experts.eager import slices
from fairseq_evomoe.kernels.experts.values import Pairs

Activation = Callable[[Tensor], Tensor]


class GatedWeights(NamedTuple):
    """The stacked weights of E gated networks.

    Attributes:
        gate_up: W_gate above W_up, (E, 2 F, D).
        gate_up_bias: (E, 2 F), or None.
        down: (E, D, F).
        down_bias: (E, D), or None.
    """

    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def gated_ffn(x: Tensor, experts: GatedWeights, pairs: Pairs, *, activation: Activation) -> Tensor:
    """y_t = sum over the pairs (t, e) of weight * FFN_e(x_t).

    Args:
        x: token states, (T, D), in the dtype of the weights.
        experts: the weights.
        pairs: in expert order, with tokens.
        activation: elementwise, for example `torch.nn.functional.silu`.

    Returns:
        (T, D). Differentiable in x, the experts' weights and the combine weights.
    """
    weight, token, counts = pairs
    leaves = (x, *experts, weight)
    keeps = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves)
    return _GatedFFN.apply(x, *experts, weight.to(x.dtype), token, tuple(counts), activation, keeps)


BLOCK = 192
"""Steps other than products run on at least so many rows at a time, if there are that many."""


def _blocks(counts: Sequence[int]) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """The rows of neighbouring experts, and each of these experts with its rows among them."""
    block: list[tuple[int, slice]] = []
    start = 0
    for e, s in slices(counts):
        block.append((e, slice(s.start - start, s.stop - start)))
        if s.stop - start >= BLOCK:
            yield slice(start, s.stop), block
            block, start = [], s.stop
    if block:
        yield slice(start, start + block[-1][1].stop), block


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, matrix.t(), out=out)
    else:
        torch.addmm(bias, rows, matrix.t(), out=out)


def _of(stacked: Tensor | None, expert: int) -> Tensor | None:
    return None if stacked is None else stacked[expert]


class _GatedFFN(torch.autograd.Function):
    """All steps of a block run one after another, while its rows are in the cache."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        weight: Tensor,
        token: Tensor,
        counts: tuple[int, ...],
        activation: Activation,
        keeps: bool,
    ) -> Tensor:
        y, hidden = torch.zeros_like(x), down.size(2)
        kept: list[Tensor] = []
        for block, experts in _blocks(counts):
            rows = x.index_select(0, token[block])
            both, out = x.new_empty(len(rows), 2 * hidden), torch.empty_like(rows)
            for e, s in experts:
                _product(rows[s], gate_up[e], _of(gate_up_bias, e), both[s])
            h = activation(both[:, :hidden])
            h = h * both[:, hidden:] if keeps else h.mul_(both[:, hidden:])
            for e, s in experts:
                _product(h[s], down[e], _of(down_bias, e), out[s])
            y.index_add_(0, token[block], out * weight[block, None])
            if keeps:
                kept += [both, out]
        if keeps:
            ctx.save_for_backward(x, gate_up, down, weight, token, *kept)
            ctx.counts, ctx.activation = counts, activation
            ctx.biases = gate_up_bias is not None, down_bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weight, token, *kept = ctx.saved_tensors
        hidden, needs = down.size(2), ctx.needs_input_grad
        dgate_up = _blank(gate_up, ctx.counts) if needs[1] else None
        ddown = _blank(down, ctx.counts) if needs[3] else None
        dgate_up_bias, ddown_bias = (
            w.new_zeros(w.shape[:2]) if there else None
            for w, there in zip((gate_up, down), ctx.biases, strict=True)
        )
        dx, dweight = torch.zeros_like(x), torch.empty_like(weight)
        for i, (block, experts) in enumerate(_blocks(ctx.counts)):
            both, out = kept[2 * i : 2 * i + 2]
            rows, dout = x.index_select(0, token[block]), dy.index_select(0, token[block])
            torch.sum(dout * out, -1, out=dweight[block])
            dout *= weight[block, None]
            dh = dout.new_empty(len(dout), hidden)
            for e, s in experts:
                torch.mm(dout[s], down[e], out=dh[s])
            dboth, h = _gate_backward(dh, both, hidden, ctx.activation)
            drows = torch.empty_like(rows)
            for e, s in experts:
                _weight_gradients(dout[s], h[s], ddown, ddown_bias, e)
                _weight_gradients(dboth[s], rows[s], dgate_up, dgate_up_bias, e)
                if needs[0]:
                    torch.mm(dboth[s], gate_up[e], out=drows[s])
            if needs[0]:
                dx.index_add_(0, token[block], drows)
        return dx, dgate_up, dgate_up_bias, ddown, ddown_bias, dweight, None, None, None, None


def _blank(stacked: Tensor, counts: Sequence[int]) -> Tensor:
    """Room for a gradient, with zeros for experts without rows, for which nothing is written."""
    made = torch.empty_like(stacked)
    for e, n in enumerate(counts):
        if n == 0:
            made[e].zero_()
    return made


def _weight_gradients(
    grad: Tensor, rows: Tensor, weight: Tensor | None, bias: Tensor | None, expert: int
) -> None:
    """Write the gradients of an expert's matrix and bias, as far as they are wanted."""
    if weight is not None:
        torch.mm(grad.t(), rows, out=weight[expert])
    if bias is not None:
        torch.sum(grad, 0, out=bias[expert])


def _gate_backward(
    dh: Tensor, both: Tensor, hidden: int, activation: Activation
) -> tuple[Tensor, Tensor]:
    """Gradient of W_gate x and W_up x, (A, 2 F), from that of their combination h; and h."""
    gate, up = both[:, :hidden], both[:, hidden:]
    dboth = torch.empty_like(both)
    with torch.enable_grad():
        leaf = gate.detach().requires_grad_()
        active = activation(leaf)
        (dgate,) = torch.autograd.grad(active, leaf, dh * up)
    active = active.detach()
    dboth[:, :hidden] = dgate
    torch.mul(dh, active, out=dboth[:, hidden:])
    return dboth, active * up
