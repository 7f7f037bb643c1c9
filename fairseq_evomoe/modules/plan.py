"""The routing plan: who goes where with what weight. Letters: T tokens, E experts."""

from dataclasses import dataclass

from torch import Tensor

from fairseq_evomoe.schedule import Stage


@dataclass(frozen=True)
class Clock:
    """What a gate needs to know of time.

    Attributes:
        stage, temperature: as the schedule has them.
        warmth: how much of the annealing is still to come: 1 at its start, 0 from its end on.
    """

    stage: Stage
    temperature: float
    warmth: float = 0.0


@dataclass(frozen=True)
class RoutingPlan:
    """A gate's decision over T real tokens; made once, recomputed nowhere.

    Attributes:
        weights: combine weights, (T, E) float32, 0 where inactive; differentiable.
        active: the pairs to compute, (T, E) bool.
        probs: clean gate probabilities (no noise, temperature 1), (T, E) float32; rows sum to 1.
        logits: gate logits, (T, E) float32.
    """

    weights: Tensor
    active: Tensor
    probs: Tensor
    logits: Tensor
