"""The dense-to-sparse (DTS) gate of EvoMoE. Letters: T tokens, E experts."""

import torch
from torch import Tensor

from fairseq_evomoe.modules.gates.base import Gate, top_k_mask
from fairseq_evomoe.modules.plan import Clock
from fairseq_evomoe.schedule import Stage


class DenseToSparseGate(Gate):
    """From every expert to the few that a token needs, by temperature (arXiv 2112.14397).

    p = softmax((z + g) / tau), g ~ Gumbel(0, 1) while training, 0 in evaluation. `--dts-noise
    annealed` shrinks g to 0 together with tau: whatever tau, the argmax of z + g is a draw from
    softmax(z), so full noise trains every expert on tokens that evaluation will not send it.

    - SPARSIFY: active = {e : p_e >= c} and always the argmax, at most `--dts-max-experts`;
      c = `--dts-threshold` / E.
    - HARD: active = the `--dts-top-k` largest p.

    Combine weights, `--dts-combine`: `renorm` p over the active set, divided by its sum; `raw` p;
    `softmax` softmax(z). In `renorm` the sum is held constant in the backward pass: a lone expert
    then weighs exactly 1 and its gate still gets the gradient of p, so nothing jumps and learning
    goes on when routing becomes top-1.

    `--dts-parity` is the rule of the official code: c = 0.001 absolute, `raw` or `softmax` weights,
    and in evaluation top-1 with softmax(z), whatever the stage.
    """

    needs_schedule = True

    def route(self, logits: Tensor, probs: Tensor, clock: Clock) -> tuple[Tensor, Tensor]:
        cfg = self.cfg
        if cfg.dts_parity and not self.training:
            active = top_k_mask(probs, 1)
            return probs * active, active

        noisy = logits
        if self.training and cfg.dts_noise != "none":
            # -log(Exponential(1)) is Gumbel(0, 1)
            noise = -torch.empty_like(logits).exponential_().log()
            noisy = logits + (noise if cfg.dts_noise == "gumbel" else clock.warmth * noise)
        p = torch.softmax(noisy / clock.temperature, -1)

        if clock.stage == Stage.HARD:
            active = top_k_mask(p, cfg.dts_top_k)
        else:
            active = (p >= cfg.threshold) | top_k_mask(p, 1)
            if cfg.dts_max_experts:
                active &= top_k_mask(p, cfg.dts_max_experts)

        if cfg.dts_combine == "softmax":
            return probs * active, active
        weights = p * active
        if cfg.dts_combine == "renorm":
            weights = weights / weights.sum(-1, keepdim=True).detach()
        return weights, active
