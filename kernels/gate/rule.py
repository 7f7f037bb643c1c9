"""The rule of a gate by score in plain torch: how experts are chosen and weighed.

Letters: T tokens, E experts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_evomoe.kernels.gate.sums import RoutingSums

COMBINE = ("renorm", "straight", "raw", "softmax")
"""Kinds of combine weights; the Triton kernel knows them by their position here."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How the gate chooses and weighs.

    Attributes:
        temperature: tau, above 0.
        noise: strength of the Gumbel noise. None means no noise. At 0 it is drawn all the same, so
            that the random stream is the same whether the noise has faded or not.
        threshold: an expert is active from this probability on.
        max_active: at most this many experts per token; None means no limit.
        exactly: exactly this many experts per token, whatever the threshold; None means that the
            threshold decides.
        combine: weights over the active experts: `softmax` is softmax(z), `raw` is p without b,
            `renorm` is p divided by its sum, and `straight` is the same with the sum held constant
            in the backward pass.
    """

    temperature: float = 1.0
    noise: float | None = None
    threshold: float = 0.0
    max_active: int | None = None
    exactly: int | None = None
    combine: str = "softmax"


class GateOutput(NamedTuple):
    """A choice of experts and its weights.

    Attributes:
        weights: combine weights, (T, E) float32, 0 where inactive; differentiable.
        active: (T, E) bool.
        probs: softmax(z), (T, E) float32; differentiable.
        sums: the sums that losses need, if this pass computed them; otherwise None.
    """

    weights: Tensor
    active: Tensor
    probs: Tensor
    sums: RoutingSums | None


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, (T, E) bool; among equals the lower index wins."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def choose_experts(p: Tensor, rule: Rule) -> Tensor:
    """The active experts by probabilities p, (T, E) -> (T, E) bool; the argmax is always active."""
    if rule.exactly is not None:
        return top_k_mask(p, rule.exactly)
    active = (p >= rule.threshold) | top_k_mask(p, 1)
    return active if rule.max_active is None else active & top_k_mask(p, rule.max_active)


def combine_weights(probs: Tensor, p: Tensor, active: Tensor, kind: str) -> Tensor:
    """Weights over the active experts, (T, E), 0 elsewhere.

    Args:
        probs: softmax(z), (T, E).
        p: the noisy, tempered probabilities, (T, E).
        active: (T, E) bool.
        kind: one of `COMBINE`.
    """
    weights = (probs if kind == "softmax" else p) * active
    if kind in ("renorm", "straight"):
        total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        weights = weights / (total.detach() if kind == "straight" else total)
    return weights
