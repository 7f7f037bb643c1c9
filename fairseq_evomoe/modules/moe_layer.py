"""The MoE layer that replaces a Transformer's feed-forward network.

Letters: L positions, B sentences, T real tokens, D model width, E experts.
"""

import zlib
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_evomoe.modules.accounting import account_base, account_plan
from fairseq_evomoe.modules.experts import Bank
from fairseq_evomoe.modules.gates.base import Gate
from fairseq_evomoe.modules.loading import explain_mismatch, keep_local_experts
from fairseq_evomoe.modules.plan import Phase, TokenBatch, put_back, real_rows
from fairseq_evomoe.modules.split import Split, SplitRule
from fairseq_evomoe.modules.timeline import Timeline
from fairseq_evomoe.modules.torchscript import NotScriptable
from fairseq_evomoe.schedule import EvolutionSchedule, Stage


class EvoMoELayer(NotScriptable):
    """Gate and experts through the stages of EvoMoE (arXiv 2112.14397).

    1. In the stage DIVERSIFY the base expert runs alone on every position. The layer then equals a
       dense layer bitwise.
    2. Afterwards padding is left out and the gate plans the T real tokens in float32.
    3. The experts compute the plan's active pairs and combine them. No pair is dropped.
    4. Inside `records.recording` the pass is recorded, with its routing losses.

    Stage and temperature follow the layer's `timeline`. They are saved with the weights, because
    generation has neither a schedule nor a number of updates.

    Args:
        gate: says which experts see a token.
        experts: what they compute; expert 0 is the base expert.
        name: unique within the model, for example "encoder.1"; part of every seed.
    """

    def __init__(self, gate: Gate, experts: Bank, *, name: str) -> None:
        super().__init__()
        self.gate, self.experts, self.name = gate, experts, name
        self.cfg = gate.cfg
        self.timeline = Timeline()

    @property
    def phase(self) -> Phase:
        """Stage and temperature of the next forward pass."""
        return self.timeline.phase

    def forward(self, x: Tensor, tokens: TokenBatch | None = None) -> Tensor:
        """Map x (L, B, D) to (L, B, D); after the diversify stage, rows of padding are 0.

        Args:
            tokens: the tokens behind the states; None means that all of them are real.
        """
        self.refuse_tracing()
        self._check_scheduled()
        phase = self.timeline.phase
        about: dict[str, Any] = {"gate": self.gate, "phase": phase, "name": self.name}
        if phase.stage == Stage.DIVERSIFY:
            return account_base(self.experts.run_base(x), tokens, **about)
        states, rows = real_rows(x, tokens)
        plan = self.gate(states, phase, tokens)
        y = self.experts(states, plan.routing).to(x.dtype)
        y = account_plan(y, plan, **about)
        return put_back(y, x, rows)

    def _check_scheduled(self) -> None:
        timed = self.gate.changes_over_time or self.cfg.moe_balance_bias
        if not (self.training and timed and self.timeline.unscheduled):
            return
        what = f"--moe-gate {self.cfg.moe_gate}"
        if not self.gate.changes_over_time:
            what = f"--moe-balance-bias {self.cfg.moe_balance_bias}"
        raise ValueError(
            f"{what} changes over time and this task sets no schedule: train with --task "
            "translation_evomoe, language_modeling_evomoe or masked_lm_evomoe, or start from a "
            "checkpoint that was"
        )

    def set_schedule(self, schedule: EvolutionSchedule) -> None:
        """Follow a schedule; the experts have split only if the schedule splits at update 0."""
        self.timeline.schedule = schedule
        self.set_split(schedule.spawn == 0)
        self.experts.start(from_base=not self.timeline.has_split)

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq's hook, called with the number of finished updates. Calls come in any order."""
        self.timeline.num_updates = num_updates

    def set_split(self, has_split: bool) -> None:
        """Say whether the base expert has split."""
        self.timeline.has_split = has_split
        self.experts.set_split(has_split)

    def split(self, rule: SplitRule, *, seed: int) -> Split:
        """How the base expert splits here; `Split.apply` carries it out."""
        return Split(rule, self.experts, seed=layer_seed(self.name, seed))

    def reset_normal_(self, std: float) -> None:
        """Draw BERT's initial weights for the experts, as fairseq does for its linear layers."""
        seed = layer_seed(self.name, torch.initial_seed()) + 1
        self.experts.reset_normal_(std, torch.Generator().manual_seed(seed))

    def get_extra_state(self) -> Tensor:
        """See `Timeline.state`."""
        return self.timeline.state()

    def set_extra_state(self, state: Tensor) -> None:
        """Stand where a checkpoint says."""
        self.timeline.load(state)
        self.set_split(self.timeline.has_split)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # torch's hook; the last argument is its list of errors
        errors = explain_mismatch(
            state_dict, prefix, name=self.name, gate=self.gate, experts=self.experts
        )
        args[-1].extend(errors)
        if not errors:
            keep_local_experts(state_dict, prefix, self.experts)
        super()._load_from_state_dict(state_dict, prefix, *args)


def layer_seed(name: str, seed: int) -> int:
    """The seed of a layer in a run, the same on every worker."""
    return (seed * 1000003 + zlib.crc32(name.encode())) % 2**62


def moe_layers(model: nn.Module) -> list[tuple[str, EvoMoELayer]]:
    """The MoE layers of a model, wrapped for data parallel or not, with their module names."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, EvoMoELayer)]
