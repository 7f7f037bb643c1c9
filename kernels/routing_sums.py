"""What routing losses and metrics need of a gate, summed over the tokens.

Letters: T tokens, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_evomoe.kernels import backend


class RoutingSums(NamedTuple):
    """Sums over the tokens, float32.

    Attributes:
        load: pairs of each expert, (E,); without gradient.
        probs: probabilities of each expert, (E,).
        z: squares of logsumexp of the logits, scalar; their mean, the z-loss, keeps logits small
            (eq. 5 of arXiv 2202.08906).
        entropy: entropies of the probabilities in nats, scalar; their mean is 0 when every token is
            sure of its expert.
    """

    load: Tensor
    probs: Tensor
    z: Tensor
    entropy: Tensor

    def over(self, tokens: int) -> "RoutingSums":
        """Means over so many tokens, 0 of none; the load stays a number of pairs."""
        count = max(1, tokens)
        return RoutingSums(self.load, self.probs / count, self.z / count, self.entropy / count)


def unpacked(row: Tensor) -> RoutingSums:
    """The sums as kernels leave them, in one row of 2 E + 2 numbers."""
    experts = row.numel() // 2 - 1
    load, probs, z, entropy = row.split([experts, experts, 1, 1])
    return RoutingSums(load.detach(), probs, z.squeeze(0), entropy.squeeze(0))


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of each row of (T, E) probabilities; (T,).

    A probability of 0 adds nothing and has a finite slope: `torch.special.entr` has an infinite
    one, which turns a gradient of 0 into NaN.
    """
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)


def why_not(*given: Tensor) -> str:
    """What keeps Triton kernels over matrices (T, E) from serving a call; "" where nothing does."""
    why = backend.without_triton(given[0].device.type)
    if not why and any(t.dtype != torch.float32 for t in given):
        why = f"it has no {' with '.join(str(t.dtype) for t in given)}"
    if not why and given[0].size(1) > 4096:
        why = "it takes 4096 experts"
    return why


def routing_sums(logits: Tensor, probs: Tensor, wanted: Tensor) -> RoutingSums:
    """One pass over logits and probs (T, E) float and wanted (T, E) bool; differentiable."""
    # a backend that is forced upon other ops, and that this one lacks, is torch here
    if backend.forced in ("", "triton") and not why_not(logits, probs):
        from fairseq_evomoe.kernels.routing_sums_triton import fused_sums

        return unpacked(fused_sums(logits, probs, wanted))
    return RoutingSums(
        wanted.sum(0).float(),
        probs.sum(0),
        logits.logsumexp(-1).square().sum(),
        entropy(probs).sum(),
    )
