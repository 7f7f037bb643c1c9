"""The dense mixture: every token sees every expert."""

import torch
from torch import Tensor

from fairseq_evomoe.modules.gates.base import Gate
from fairseq_evomoe.modules.plan import Clock


class DenseGate(Gate):
    """w = softmax(z) over all experts (Jacobs et al. 1991); the upper bound in compute."""

    def route(self, logits: Tensor, probs: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        return probs, torch.ones_like(probs, dtype=torch.bool)
