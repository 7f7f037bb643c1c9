"""The loss over a large vocabulary from the last hidden states, in pieces of a few rows.

The logits of all tokens never exist at once, and the gradient is made in the same pass, so that
memory and time of the logits' softmax, which exceed those of the layers of a small model, shrink to
those of the matrix products.

Letters: T tokens, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels.transformer import cpu

PIECE = {"cpu": 2**20, "cuda": 2**25}
"""Device -> number of logits in a piece. On a CPU it fits into the cache of a core."""
FEWEST_ROWS = 64
"""Smaller pieces would make the matrix products slow."""


def output_loss(
    states: Tensor, weight: Tensor, target: Tensor, *, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Label-smoothed cross entropy, and the plain one, summed over tokens.

    With l = states W^T and q = log softmax(l), nll = -sum_t q[t, target_t], and the loss is
    (1 - e - e / (V - 1)) nll - e / (V - 1) sum_tv q[t, v], as in fairseq's criterion of the same
    name (label smoothing of arXiv 1512.00567 with e = `smoothing`).

    Args:
        states: (T, D), any float dtype. Under autocast the products run in its dtype.
        weight: W, (V, D).
        target: (T,) int64.
        smoothing: e, from 0 to 1.

    Returns:
        The loss, which carries the gradients of `states` and `weight`, and nll, which carries none;
        both are float32 scalars (float64 for float64 states).
    """
    device = states.device.type
    product = states.dtype
    if torch.is_autocast_enabled(device):
        product = torch.get_autocast_dtype(device)
    loss, nll = _OutputLoss.apply(states, weight, target, smoothing, product)
    return loss, nll


def softmax_loss(
    logits: Tensor, target: Tensor, sure: float, rest: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of -log p[target] and of -sum_w log p[w], where p = softmax(logits).

    The logits (T, V) become p - rest - sure onehot(target), in place, which is the gradient of sure
    times the first sum plus rest times the second if sure + rest V = 1. Without `gradient` they are
    undefined afterwards.

    Returns:
        Two float64 scalars; the second is 0 without `rest`.

    Raises:
        IndexError: a target is beyond the vocabulary.
    """
    if cpu.serves(logits, logits.dtype):
        sums = cpu.softmax_loss(logits, target, sure=sure, rest=rest, gradient=gradient)
        return sums[0], sums[1]
    word, vocabulary = target[:, None], logits.size(1)
    at_target = logits.gather(1, word)
    largest = logits.amax(1, keepdim=True)
    smooth = -logits.sum(dtype=torch.float64) if rest else logits.new_zeros((), dtype=torch.float64)
    # the logits become the softmax, then the gradient, in place
    odds = logits.sub_(largest).exp_()
    mass = odds.sum(1, keepdim=True)
    norm = mass.log().add_(largest)
    nll = (norm - at_target).sum(dtype=torch.float64)
    if rest:
        smooth += vocabulary * norm.sum(dtype=torch.float64)
    if gradient:
        odds.div_(mass).scatter_add_(1, word, torch.full_like(at_target, -sure))
        if rest:
            odds.sub_(rest)
    return nll, smooth


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, target: Tensor, smoothing: float, product: Any
    ) -> tuple[Tensor, Tensor]:
        needs_states, needs_weight = ctx.needs_input_grad[:2]
        total, vocabulary = states.size(0), weight.size(0)
        exact = torch.float64 if states.dtype == torch.float64 else torch.float32
        rest = smoothing / (vocabulary - 1) if vocabulary > 1 else 0.0
        sure = 1.0 - smoothing - rest
        piece = PIECE.get(states.device.type, PIECE["cuda"])
        # products are fastest for multiples of a tile
        rows = max(FEWEST_ROWS, piece // vocabulary // 32 * 32)
        with torch.autocast(states.device.type, enabled=False):
            table = weight.to(product)
            d_states = torch.empty_like(states) if needs_states else None
            d_weight = None
            if needs_weight:
                d_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device)
            nll = torch.zeros((), dtype=torch.float64, device=states.device)
            smooth = nll.clone()
            for start in range(0, total, rows):
                x = states[start : start + rows].to(product)
                word = target[start : start + rows]
                logits = F.linear(x, table).to(exact)
                found = softmax_loss(logits, word, sure, rest, needs_states or needs_weight)
                nll += found[0]
                smooth += found[1]
                if not (needs_states or needs_weight):
                    continue
                gradient = logits.to(product)
                if d_states is not None:
                    d_states[start : start + rows] = gradient @ table
                if d_weight is not None:
                    if product == exact:
                        d_weight.addmm_(gradient.t(), x)
                    else:
                        d_weight += gradient.t() @ x
        ctx.save_for_backward(d_states, d_weight)
        ctx.dtype = weight.dtype
        loss = (sure * nll + rest * smooth).to(exact)
        nll = nll.to(exact)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_states, d_weight = ctx.saved_tensors
        if d_states is not None:
            d_states = d_states * d_loss.to(d_states.dtype)
        if d_weight is not None:
            d_weight = (d_weight * d_loss).to(ctx.dtype)
        return d_states, d_weight, None, None, None
