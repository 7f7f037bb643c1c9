"""The dense-to-sparse (DTS) gate of EvoMoE. Letters: T tokens, E experts."""

from typing import Any

from torch import Tensor

from fairseq_evomoe.config import EvolutionConfig, MoEConfig
from fairseq_evomoe.kernels.gate.gate import dense_to_sparse
from fairseq_evomoe.kernels.gate.rule import Rule, top_k_mask
from fairseq_evomoe.modules import losses
from fairseq_evomoe.modules.gates.base import ScoreGate, register_gate
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.options import Combine, Noise
from fairseq_evomoe.schedule import EvolutionSchedule, Stage, resolve_schedule


@register_gate("dts")
class DenseToSparseGate(ScoreGate):
    """From all experts to the few that a token needs, by temperature (arXiv 2112.14397).

    p = softmax((z + g) / tau), with g ~ Gumbel(0, 1) during training and g = 0 in evaluation. With
    `--dts-noise annealed`, g shrinks to 0 together with tau. At any tau the argmax of z + g is a
    draw from softmax(z), so noise at full strength trains every expert on tokens that evaluation
    will not send to it.

    - SPARSIFY: the active experts are {e : p_e >= c} with c = `--dts-threshold` / E, and always
      the argmax, but at most `--dts-max-experts` of them.
    - HARD: the active experts are those of the `--dts-top-k` largest p.

    `--dts-combine` selects the weights over the active experts. `softmax` takes softmax(z), which
    is free of noise and temperature. `raw` takes p. `renorm` takes p divided by its sum, so that a
    lone expert has weight 1 and its router learns from the balance loss alone. `straight` is the
    same, but with the sum held constant in the backward pass, so that a lone expert's router gets
    the gradient of p.

    With `--moe-balance-bias` b, experts are chosen by softmax((z + b + g) / tau) and weighted
    without b. With `--moe-gate-token-bias`, a bias of the token id is added to z, scaled by how far
    the gate has cooled: at the split the gate is dense, at the end it tells words apart.

    `--dts-parity` is the rule of the official code. There c = 0.001 is absolute, the weights are
    `raw` or `softmax`, evaluation is top-1 with weight softmax(z) in every stage, and the balance
    loss is computed from those weights and from absolute counts.
    """

    evolves = True
    changes_over_time = True

    flags = (
        *ScoreGate.flags,
        "--dts-threshold",
        "--dts-max-experts",
        "--dts-combine",
        "--dts-noise",
        "--dts-top-k",
        "--dts-parity",
    )

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        super().check(cfg)
        experts = f"choose 1 to --moe-expert-count {cfg.moe_expert_count}"
        cfg.need(
            0 <= cfg.threshold < 1, "--dts-threshold", "must be >= 0 and below a probability of 1"
        )
        cfg.need(
            cfg.dts_max_experts is None or 1 <= cfg.dts_max_experts <= cfg.moe_expert_count,
            "--dts-max-experts",
            f"{experts}, or leave the flag out for no limit",
        )
        cfg.need(1 <= cfg.dts_top_k <= cfg.moe_expert_count, "--dts-top-k", experts)
        cfg.need_choice("--dts-combine", Combine)
        if cfg.dts_noise is not None:
            cfg.need_choice("--dts-noise", Noise)
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
            cfg.dts_top_k == 1, "--dts-top-k", "--dts-parity ends in top-1: leave the flag out"
        )
        cfg.need(
            cfg.dts_max_experts is None,
            "--dts-max-experts",
            "--dts-parity has no limit: leave the flag out",
        )
        cfg.need(
            cfg.noise == "gumbel",
            "--dts-noise",
            "--dts-parity keeps full noise: leave the flag out, or give gumbel",
        )
        for flag in ("--moe-balance-bias", "--moe-gate-token-bias", "--moe-balance-all-ranks"):
            cfg.need(
                not cfg.given(flag),
                flag,
                "the official code has no such option; leave out this flag or --dts-parity",
            )

    @classmethod
    def schedule(cls, flags: EvolutionConfig) -> EvolutionSchedule:
        return resolve_schedule(
            spawn=cls.spawn_update(flags),
            anneal=flags.dts_anneal_updates,
            hard=flags.dts_hard_update,
            start=flags.dts_temperature_start,
            end=flags.dts_temperature_end,
            shape=str(flags.dts_temperature_schedule),
            max_update=flags.max_update,
        )

    @classmethod
    def min_experts(cls, cfg: MoEConfig) -> int:
        return cfg.dts_top_k

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return cfg.dts_top_k if stage == Stage.HARD else cfg.moe_expert_count

    @classmethod
    def flags_after_pruning(cls, cfg: MoEConfig, experts: int) -> dict[str, Any]:
        changes = super().flags_after_pruning(cfg, experts)
        if not cfg.dts_parity:
            # the threshold is relative to 1/E: hold its absolute value
            changes["dts_threshold"] = cfg.threshold * experts
        if cfg.dts_max_experts is not None:
            changes["dts_max_experts"] = min(cfg.dts_max_experts, experts)
        return changes

    def token_bias_factor(self, phase: Phase) -> float:
        """Fraction of the token bias that applies. It grows as the gate cools from dense."""
        return 1 - phase.anneal_left

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        cfg = self.cfg
        if cfg.dts_parity and not self.training:
            probs = logits.softmax(-1)
            active = top_k_mask(probs, 1)
            return RoutingPlan(
                weights=probs * active, active=active, probs=probs, logits=logits, max_active=1
            )

        hard = phase.stage == Stage.HARD
        strength = {"none": None, "annealed": phase.anneal_left, "gumbel": 1.0}[cfg.noise]
        rule = Rule(
            temperature=phase.temperature,
            noise=strength if self.training else None,
            threshold=cfg.threshold,
            max_active=cfg.dts_max_experts,
            exactly=cfg.dts_top_k if hard else None,
            combine=str(cfg.dts_combine),
        )
        weights, active, probs, sums = dense_to_sparse(
            logits, rule, self.bias, sums=self.needs_sums
        )
        return RoutingPlan(
            weights=weights,
            active=active,
            probs=probs,
            logits=logits,
            max_active=cfg.dts_top_k if hard else cfg.dts_max_experts,
            gate_sums=sums,
        )

    def balance_loss(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        if self.cfg.dts_parity:
            return losses.official_balance_loss(plan.weights, plan.active)
        return super().balance_loss(plan, load)
