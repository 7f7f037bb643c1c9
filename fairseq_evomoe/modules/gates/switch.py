"""Switch: one expert per token."""

from torch import Tensor

from fairseq_evomoe.modules.gates.base import Gate, top_k_mask
from fairseq_evomoe.modules.plan import Clock


class SwitchGate(Gate):
    """Active: argmax p; weight p itself, so that the router learns (arXiv 2101.03961, eq. 2).

    Dropless: no token overflows, so there is no capacity factor.
    """

    def route(self, logits: Tensor, probs: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        active = top_k_mask(probs, 1)
        return probs * active, active
