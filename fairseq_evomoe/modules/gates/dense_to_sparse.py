"""The dense-to-sparse (DTS) gate of EvoMoE. Letters: T tokens, E experts."""

from torch import Tensor

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate import COMBINE, Rule, dense_to_sparse, top_k_mask
from fairseq_evomoe.modules import losses
from fairseq_evomoe.modules.gates.base import ScoreGate
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import Stage


class DenseToSparseGate(ScoreGate):
    """From every expert to the few that a token needs, by temperature (arXiv 2112.14397).

    p = softmax((z + g) / tau), g ~ Gumbel(0, 1) while training, 0 in evaluation. `--dts-noise
    annealed` shrinks g to 0 together with tau: whatever tau, the argmax of z + g is a draw from
    softmax(z), so full noise trains every expert on tokens that evaluation will not send it.

    - SPARSIFY: active = {e : p_e >= c} and always the argmax, at most `--dts-max-experts`;
      c = `--dts-threshold` / E.
    - HARD: active = the `--dts-top-k` largest p.

    Combine weights over the active set, `--dts-combine`: `softmax` softmax(z), free of noise and
    temperature; `raw` p; `renorm` p divided by its sum, so that a lone expert weighs 1 and its
    router learns from the balance loss alone; `straight` the same with the sum held constant in
    the backward pass, so that a lone expert's router gets the gradient of p. With
    `--moe-balance-bias` b, experts are chosen by softmax((z + b + g) / tau) and weighed without b.
    With `--moe-gate-token-bias` a bias of the token id joins z in the measure in which the gate has
    cooled: dense at the split, and word by word apart at the end.

    `--dts-parity` is the rule of the official code: c = 0.001 absolute, `raw` or `softmax` weights,
    in evaluation top-1 with softmax(z) whatever the stage, and the balance loss over those weights
    and absolute counts.
    """

    evolves = True
    changes_over_time = True

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        experts = f"choose 1 to --moe-expert-count {cfg.moe_expert_count}"
        cfg.need(
            0 <= cfg.threshold < 1, "--dts-threshold", "must be >= 0 and below a probability of 1"
        )
        cfg.need(
            0 <= cfg.dts_max_experts <= cfg.moe_expert_count,
            "--dts-max-experts",
            f"{experts}, or 0 for no cap",
        )
        cfg.need(1 <= cfg.dts_top_k <= cfg.moe_expert_count, "--dts-top-k", experts)
        cfg.need(cfg.dts_combine in COMBINE, "--dts-combine", f"choose one of {', '.join(COMBINE)}")
        cfg.need(
            cfg.dts_noise in ("gumbel", "annealed", "none"),
            "--dts-noise",
            "choose gumbel, annealed or none",
        )
        if cfg.dts_parity:
            cls._check_parity(cfg)

    @staticmethod
    def _check_parity(cfg: MoEConfig) -> None:
        cfg.need(
            cfg.dts_combine in ("raw", "softmax"),
            "--dts-combine",
            "--dts-parity never renormalises; choose softmax (the official default) or raw "
            "(the official --use-gumbel-gates)",
        )
        cfg.need(
            cfg.dts_top_k == 1 and cfg.dts_max_experts == 0,
            "--dts-top-k",
            "--dts-parity ends in top-1, uncapped: leave --dts-top-k 1, --dts-max-experts 0",
        )
        cfg.need(
            cfg.dts_noise == "gumbel",
            "--dts-noise",
            "--dts-parity keeps full noise; give --dts-noise gumbel",
        )
        for flag in ("--moe-balance-bias", "--moe-gate-token-bias", "--moe-balance-all-ranks"):
            cfg.need(
                not cfg.given(flag),
                flag,
                "the official code knows none; leave it or --dts-parity out",
            )

    def token_share(self, clock: Clock) -> float:
        """It comes in as the gate cools, so that the gate starts dense all the same."""
        return 1 - clock.warmth

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        cfg = self.cfg
        if cfg.dts_parity and not self.training:
            probs = logits.softmax(-1)
            active = top_k_mask(probs, 1)
            return RoutingPlan(probs * active, active, probs, logits, at_most=1)

        hard = clock.stage == Stage.HARD
        strength = {"none": None, "annealed": clock.warmth, "gumbel": 1.0}[cfg.dts_noise]
        rule = Rule(
            clock.temperature,
            noise=strength if self.training else None,
            threshold=cfg.threshold,
            cap=cfg.dts_max_experts,
            exactly=cfg.dts_top_k if hard else 0,
            combine=cfg.dts_combine,
        )
        weights, active, probs, sums = dense_to_sparse(
            logits, rule, self.bias, sums=self.wants_sums
        )
        limit = cfg.dts_top_k if hard else cfg.dts_max_experts or None
        return RoutingPlan(weights, active, probs, logits, at_most=limit, summed=sums)

    def balance(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        if self.cfg.dts_parity:
            return losses.official_balance_loss(plan.weights, plan.active)
        return super().balance(plan, load)
