"""A layer's place in training: its schedule, the number of updates, and whether it has split."""

import torch
from torch import Tensor

from fairseq_evomoe.modules.plan import Phase
from fairseq_evomoe.schedule import EvolutionSchedule, Stage


class Timeline:
    """The time of one MoE layer.

    Attributes:
        schedule: when the stages change, or None outside of our tasks.
        num_updates: number of finished updates.
        has_split: whether the base expert has split into all experts.
        saved: the phase of the checkpoint that was loaded, or None.
    """

    def __init__(self) -> None:
        self.schedule: EvolutionSchedule | None = None
        self.num_updates = 0
        self.has_split = True
        self.saved: Phase | None = None

    @property
    def unscheduled(self) -> bool:
        """Whether neither a task nor a checkpoint has said where training stands."""
        return self.schedule is None and self.saved is None

    @property
    def phase(self) -> Phase:
        """Stage and temperature of the next forward pass.

        The schedule decides. Without one, as in generation, the phase of the checkpoint holds.
        """
        if self.schedule is None:
            return self.saved or Phase(stage=Stage.SPARSIFY, temperature=1.0)
        if not self.has_split:
            return Phase(stage=Stage.DIVERSIFY, temperature=self.schedule.start, anneal_left=1.0)
        n = self.num_updates
        return Phase(
            # a restart that resets the number of updates must not undo a split that has happened
            stage=max(self.schedule.stage(n), Stage.SPARSIFY),
            temperature=self.schedule.temperature(n),
            anneal_left=self.schedule.anneal_left(n),
        )

    def state(self) -> Tensor:
        """[updates, stage, temperature, has_split, anneal_left], float64.

        It is saved as extra state, which `.half()` leaves as it is.
        """
        phase = self.phase
        values = [self.num_updates, phase.stage, phase.temperature, self.has_split]
        return torch.tensor([*values, phase.anneal_left], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Take over what `state` saved."""
        num_updates, stage, temperature, has_split, anneal_left = state.tolist()
        self.num_updates, self.has_split = int(num_updates), bool(has_split)
        self.saved = Phase(
            stage=Stage(int(stage)), temperature=temperature, anneal_left=anneal_left
        )
