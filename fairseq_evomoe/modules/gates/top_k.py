"""Top-k: a fixed number of experts per token."""

from torch import Tensor

from fairseq_evomoe.modules.gates.base import Gate, top_k_mask
from fairseq_evomoe.modules.plan import Clock


class TopKGate(Gate):
    """Active: the `--moe-top-k` largest p; weights softmax over those (arXiv 1701.06538, eq. 3-5).

    For k = 1 that softmax is the constant 1 and would teach the router nothing: the weight is p,
    as in Switch.
    """

    def route(self, logits: Tensor, probs: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        active = top_k_mask(probs, self.cfg.moe_top_k)
        weights = probs * active
        if self.cfg.moe_top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, active
