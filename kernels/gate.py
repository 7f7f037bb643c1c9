"""Gates by score in one op: noise, temperature, threshold, cap, weights.

Letters: T tokens, E experts. p = softmax((z + b + g) / tau) chooses, softmax(z) or p weighs; g is
Gumbel(0, 1) noise times its strength, b a bias of selection. The argmax is always active.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.routing_sums import RoutingSums, unpacked, why_not

COMBINE = ("renorm", "straight", "raw", "softmax")


@dataclass(frozen=True)
class Rule:
    """How the gate chooses and weighs.

    Attributes:
        temperature: tau, above 0.
        noise: strength of the Gumbel noise; None: none. At 0 it is drawn all the same, so that the
            random stream is the same whether it has faded or not.
        threshold: an expert is active from this probability on.
        cap: at most so many experts; 0: no cap.
        exactly: that many experts, whatever the threshold; 0: by threshold.
        combine: weights over the active experts: `softmax` softmax(z), `raw` p without b, `renorm`
            that divided by its sum, `straight` the same with the sum constant in backward.
    """

    temperature: float
    noise: float | None = None
    threshold: float = 0.0
    cap: int = 0
    exactly: int = 0
    combine: str = "softmax"


class Gated(NamedTuple):
    """A choice of experts and its weights.

    Attributes:
        weights: (T, E) float32, 0 where inactive; differentiable.
        active: (T, E) bool.
        probs: softmax(z), (T, E) float32; differentiable.
        sums: what losses need, where the pass over the tokens gave it; None: ask `routing_sums`.
    """

    weights: Tensor
    active: Tensor
    probs: Tensor
    sums: RoutingSums | None


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, (T, E) bool; among equals the lower index wins."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def choose(p: Tensor, rule: Rule) -> Tensor:
    """The active experts by probabilities p (T, E); (T, E) bool."""
    if rule.exactly:
        return top_k_mask(p, rule.exactly)
    active = (p >= rule.threshold) | top_k_mask(p, 1)
    return active & top_k_mask(p, rule.cap) if rule.cap else active


def combine(probs: Tensor, p: Tensor, active: Tensor, kind: str) -> Tensor:
    """Weights over the active experts, (T, E); probs = softmax(z), p: noisy and tempered."""
    weights = (probs if kind == "softmax" else p) * active
    if kind in ("renorm", "straight"):
        total = weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
        weights = weights / (total.detach() if kind == "straight" else total)
    return weights


def _by_triton(logits: Tensor, rule: Rule, bias: Tensor | None, sums: bool) -> Gated | None:
    """In one pass, where Triton serves; None: by torch."""
    name = backend.choose(
        triton=lambda: why_not(logits), torch=backend.always, reference=backend.always
    )
    if name != "triton":
        return None
    from fairseq_evomoe.kernels.gate_triton import fused_gate

    # drawn on the host: it follows torch.manual_seed, and no device waits
    seed = torch.zeros((), dtype=torch.int64)
    if rule.noise is not None:
        seed = torch.randint(2**31 - 1, (), dtype=torch.int64)
    weights, active, probs, row = fused_gate(logits, rule, bias, seed, sums=sums)
    return Gated(weights, active, probs, unpacked(row) if sums else None)


def dense_to_sparse(
    logits: Tensor, rule: Rule, bias: Tensor | None = None, *, sums: bool = False
) -> Gated:
    """Choose and weigh experts.

    Args:
        logits: z, (T, E) float32.
        bias: b, (E,) float32, not differentiated; None: 0.
        sums: the caller will want the sums of the plan; where they cost another pass, it makes it.
    """
    if fused := _by_triton(logits, rule, bias, sums):
        return fused
    probs = logits.softmax(-1)
    noise: Tensor | float = 0.0
    if rule.noise is not None:
        # -log(Exponential(1)) is Gumbel(0, 1)
        noise = -torch.empty_like(logits).exponential_().log() * rule.noise
    p = torch.softmax((logits + noise) / rule.temperature, -1)
    by = p if bias is None else torch.softmax((logits + bias + noise) / rule.temperature, -1)
    active = choose(by, rule)
    return Gated(combine(probs, p, active, rule.combine), active, probs, None)


def top_k(
    logits: Tensor, k: int, bias: Tensor | None = None, *, renorm: bool = False, sums: bool = False
) -> Gated:
    """The k experts of the largest z + b, weighed by softmax(z); `renorm`: divided by their sum.

    Arguments as for `dense_to_sparse`.
    """
    kind = "renorm" if renorm else "softmax"
    if fused := _by_triton(logits, Rule(1.0, exactly=k, combine=kind), bias, sums):
        return fused
    probs = logits.softmax(-1)
    active = top_k_mask(logits if bias is None else logits + bias, k)
    return Gated(combine(probs, probs, active, kind), active, probs, None)
