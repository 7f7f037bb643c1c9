"""The training schedule: stage and gate temperature of an update, as pure functions of `n`.

`n` is the number of finished updates. The base expert splits at update `spawn`. The temperature
falls over the `anneal` updates after it. From update `hard` on, the final sparse rule applies.
"""

import math
from dataclasses import dataclass
from enum import IntEnum


class Stage(IntEnum):
    """The three stages of training (EvoMoE, arXiv 2112.14397)."""

    DIVERSIFY = 0
    """Only the base expert runs."""
    SPARSIFY = 1
    """All experts exist, and the gate changes from dense to sparse."""
    HARD = 2
    """The final rule applies: top-k experts with the DTS gate, the frozen router with StableMoE."""


SHAPES = ("linear", "exponential", "cosine")


@dataclass(frozen=True, kw_only=True)
class EvolutionSchedule:
    """When the stages change and how the temperature falls between them.

    Attributes:
        spawn: update at which the base expert splits; 0 means that all experts exist from the
            start.
        anneal: number of updates after `spawn` over which the temperature falls.
        hard: update from which the final rule applies; None means never.
        start, end: temperature before and after annealing.
        shape: one of `SHAPES`.
    """

    spawn: int = 0
    anneal: int = 0
    hard: int | None = None
    start: float = 1.0
    end: float = 1.0
    shape: str = "linear"

    def stage(self, n: int) -> Stage:
        if n < self.spawn:
            return Stage.DIVERSIFY
        if self.hard is not None and n >= self.hard:
            return Stage.HARD
        return Stage.SPARSIFY

    def temperature(self, n: int) -> float:
        """Return `start` until the split, `end` after annealing, and a value by `shape` in between.

        Let u in [0, 1] be the fraction of the annealing that is over. Then linear is
        start + u (end - start), exponential is start (end / start)^u, and cosine is
        end + (start - end) (1 + cos(pi u)) / 2.
        """
        if n <= self.spawn:
            return self.start
        if n >= self.spawn + self.anneal:
            return self.end
        u = (n - self.spawn) / self.anneal
        if self.shape == "linear":
            return self.start + u * (self.end - self.start)
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** u
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * u)) / 2

    def anneal_left(self, n: int) -> float:
        """Return how far the temperature is above its end, from 1 (`start`) to 0 (`end`).

        If `start` and `end` are equal, it is 1 until annealing is over and 0 from then on.
        """
        if self.start == self.end:
            return float(n < self.spawn + self.anneal)
        return (self.temperature(n) - self.end) / (self.start - self.end)


def resolve_schedule(
    *,
    spawn: int | None,
    anneal: int | None,
    hard: int | None,
    max_update: int,
    start: float = 1.0,
    end: float = 1.0,
    shape: str = "linear",
    has_hard_stage: bool = True,
    hard_flag: str = "--dts-hard-update",
    hard_follows_anneal: bool = True,
) -> EvolutionSchedule:
    """Check the schedule's flags and compute those that follow `--max-update` by default.

    Args:
        spawn: value of `--evo-spawn-update`; None means a twentieth of max_update.
        anneal: value of `--dts-anneal-updates`; None means a tenth of max_update.
        hard: update of the hard stage, the value of `hard_flag`. None means the end of annealing
            if it follows that, otherwise a tenth of max_update after the split.
        max_update: value of `--max-update`; 0 means unknown.
        start, end, shape: values of `--dts-temperature-start`, `-end` and `-schedule`.
        has_hard_stage: whether the gate has one.
        hard_flag: the flag that `hard` comes from.
        hard_follows_anneal: see `hard`.

    Raises:
        ValueError: a flag is out of range; the message names it and the fix.
    """
    follows = spawn is None or anneal is None or (hard is None and not hard_follows_anneal)
    if max_update <= 0 and follows:
        raise ValueError(
            "--evo-spawn-update, --dts-anneal-updates and --stable-freeze-update follow "
            "--max-update by default, but --max-update is not set: set it, or give them a number "
            "of updates"
        )
    spawn = max_update // 20 if spawn is None else spawn
    anneal = max_update // 10 if anneal is None else anneal
    for flag, updates in (("--evo-spawn-update", spawn), ("--dts-anneal-updates", anneal)):
        if updates < 0:
            raise ValueError(
                f"{flag} {updates}: give a number of updates >= 0, or leave the flag out"
            )
    for flag, value in (("--dts-temperature-start", start), ("--dts-temperature-end", end)):
        if not value > 0 or math.isinf(value):
            raise ValueError(f"{flag} {value}: a softmax temperature must be a number > 0")
    if end > start:
        raise ValueError(
            f"--dts-temperature-end {end} is above --dts-temperature-start {start}: the gate would "
            "become denser; swap them"
        )
    if shape not in SHAPES:
        raise ValueError(f"--dts-temperature-schedule {shape!r}: choose one of {', '.join(SHAPES)}")
    if 0 < max_update <= spawn:
        raise ValueError(
            f"--evo-spawn-update {spawn} lies beyond --max-update {max_update}: the experts would "
            "never split; lower it, or train a dense model"
        )
    if not has_hard_stage:
        hard = None
    elif hard is None:
        hard = spawn + (anneal if hard_follows_anneal else max_update // 10)
    elif hard < spawn:
        raise ValueError(
            f"{hard_flag} {hard} comes before the split at update {spawn}: give an update from "
            "there on, or leave the flag out"
        )
    return EvolutionSchedule(
        spawn=spawn, anneal=anneal, hard=hard, start=start, end=end, shape=shape
    )
