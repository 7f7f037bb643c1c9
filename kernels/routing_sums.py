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
        z: squares of logsumexp of the logits, scalar.
        entropy: entropies of the probabilities in nats, scalar.
    """

    load: Tensor
    probs: Tensor
    z: Tensor
    entropy: Tensor


def why_not(logits: Tensor, probs: Tensor) -> str:
    """What keeps the Triton kernel from serving a call; "" where nothing does."""
    why = backend.without_triton(logits.device.type)
    if not why and not logits.dtype == probs.dtype == torch.float32:
        why = f"it has no {logits.dtype} with {probs.dtype}"
    if not why and logits.size(1) > 2048:
        why = "it takes 2048 experts"
    return why


def routing_sums(logits: Tensor, probs: Tensor, wanted: Tensor) -> RoutingSums:
    """One pass over logits and probs (T, E) float and wanted (T, E) bool; differentiable."""
    name = backend.choose(
        triton=lambda: why_not(logits, probs), torch=backend.always, reference=backend.always
    )
    if name == "triton":
        from fairseq_evomoe.kernels.routing_sums_triton import fused_sums

        return fused_sums(logits, probs, wanted)
    return RoutingSums(
        wanted.sum(0).float(),
        probs.sum(0),
        logits.logsumexp(-1).square().sum(),
        torch.special.entr(probs).sum(),
    )
