"""What routing losses and metrics need of a gate, summed over the tokens.

Letters: T tokens, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_evomoe.kernels import backend, self_check


class RoutingSums(NamedTuple):
    """Sums over the tokens, float32.

    Attributes:
        load: number of pairs of each expert, (E,); not differentiable.
        probs: probability of each expert, (E,).
        z: squared logsumexp of the logits, scalar. Its mean is the z-loss, which keeps logits small
            (eq. 5 of arXiv 2202.08906).
        entropy: entropy of the probabilities in nats, scalar. Its mean is 0 when every token is
            sure of its expert.
    """

    load: Tensor
    probs: Tensor
    z: Tensor
    entropy: Tensor

    def means(self, tokens: int) -> "RoutingSums":
        """Means over so many tokens, 0 for no token; the load stays a number of pairs."""
        count = max(1, tokens)
        return RoutingSums(self.load, self.probs / count, self.z / count, self.entropy / count)


def unpack_sums(row: Tensor) -> RoutingSums:
    """The sums from the row of 2 E + 2 numbers that the kernels write."""
    experts = row.numel() // 2 - 1
    load, probs, z, entropy = row.split([experts, experts, 1, 1])
    return RoutingSums(load.detach(), probs, z.squeeze(0), entropy.squeeze(0))


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of each row of probabilities, (T, E) -> (T,).

    A probability of 0 adds nothing and has a finite slope: `torch.special.entr` has an infinite
    slope there, which turns a gradient of 0 into NaN.
    """
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)


def unsupported(*matrices: Tensor) -> str:
    """Why the Triton kernels over matrices (T, E) cannot serve a call; "" if they can."""
    reason = backend.triton_unsupported(matrices[0].device.type)
    if not reason and any(t.dtype != torch.float32 for t in matrices):
        reason = f"it has no {' with '.join(str(t.dtype) for t in matrices)}"
    if not reason and matrices[0].size(1) > 4096:
        reason = "it takes 4096 experts"
    return reason


def routing_sums(logits: Tensor, probs: Tensor, chosen: Tensor) -> RoutingSums:
    """The sums of a routing, differentiable in logits and probs.

    Args:
        logits: (T, E) float.
        probs: (T, E) float.
        chosen: the pairs to count, (T, E) bool.
    """
    name = backend.choose_backend(
        triton=lambda: (
            unsupported(logits, probs) or self_check.failure("routing sums", logits, _check)
        ),
        torch=backend.supported,
    )
    if name == "triton":
        from fairseq_evomoe.kernels.gate.sums_triton import fused_sums

        return unpack_sums(fused_sums(logits, probs, chosen))
    return RoutingSums(
        chosen.sum(0).float(),
        probs.sum(0),
        logits.logsumexp(-1).square().sum(),
        entropy(probs).sum(),
    )


def _check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The fused sums over 37 tokens and 5 experts beside torch's."""
    from fairseq_evomoe.kernels.gate.sums_triton import fused_sums

    z = self_check.draw(1, device, dtype, 37, 5)
    chosen = z.detach() > 0.5
    have = self_check.with_gradients(fused_sums(z, z.softmax(-1), chosen), [z])
    with backend.use("torch"):
        sums = routing_sums(z, z.softmax(-1), chosen)
    row = torch.cat([x.reshape(-1) for x in sums])
    return have, self_check.with_gradients(row, [z])
