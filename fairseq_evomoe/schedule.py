"""Time: which stage an update belongs to and how warm the gate is, as pure functions of `n`.

`n` counts finished updates. `spawn`: the base expert splits. `anneal`: updates that the temperature
takes to fall. `hard`: from here the final sparse rule holds.
"""

import math
from dataclasses import dataclass
from enum import IntEnum


class Stage(IntEnum):
    """The three stages of training (EvoMoE, arXiv 2112.14397)."""

    DIVERSIFY = 0
    """Only the base expert runs."""
    SPARSIFY = 1
    """All experts exist; the gate passes from dense to sparse."""
    HARD = 2
    """The last rule holds: top-k experts of the DTS gate, the frozen router of StableMoE."""


SHAPES = ("linear", "exponential", "cosine")


@dataclass(frozen=True)
class EvolutionSchedule:
    """When the stages change and how the temperature falls between them.

    Attributes:
        spawn: update at which the base expert splits; 0: all experts exist from the start.
        anneal: updates from `spawn` over which the temperature falls.
        hard: update from which the top-k rule holds; None: never.
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
        """`start` until the spawn, `end` after the annealing, in between by `shape`.

        With u in [0, 1] the share of the annealing that is over: linear start + u (end - start);
        exponential start (end / start)^u; cosine end + (start - end) (1 + cos(pi u)) / 2.
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

    def warmth(self, n: int) -> float:
        """How far the temperature is above its end, from 1 (`start`) to 0 (`end`)."""
        if self.start == self.end:
            return float(n < self.spawn + self.anneal)
        return (self.temperature(n) - self.end) / (self.start - self.end)


def resolve(
    *,
    spawn: int,
    anneal: int,
    hard: int,
    max_update: int,
    start: float = 1.0,
    end: float = 1.0,
    shape: str = "linear",
    hard_flag: str = "--dts-hard-update",
) -> EvolutionSchedule:
    """Check the schedule's flags and fill in those left to follow `--max-update`.

    Args:
        spawn: `--evo-spawn-update`; -1: a twentieth of max_update.
        anneal: `--dts-anneal-updates`; -1: a tenth of max_update.
        hard: `--dts-hard-update`, -1: when the annealing ends; or `--stable-freeze-update`, -1: a
            tenth of max_update after the split; 0: never.
        max_update: `--max-update`; 0: unknown.
        start, end, shape: `--dts-temperature-start`, `-end`, `-schedule`.
        hard_flag: which of the two flags `hard` is.

    Raises:
        ValueError: a flag is out of range; the message names it and the fix.
    """
    stable = hard_flag == "--stable-freeze-update"
    if max_update <= 0 and (spawn == -1 or anneal == -1 or (stable and hard == -1)):
        raise ValueError(
            "--evo-spawn-update, --dts-anneal-updates and --stable-freeze-update follow "
            "--max-update when they are -1, but --max-update is not set: set it, or give them a "
            "number of updates"
        )
    for flag, updates in (("--evo-spawn-update", spawn), ("--dts-anneal-updates", anneal)):
        if updates < -1:
            raise ValueError(f"{flag} {updates}: give a number of updates >= 0, or -1 (automatic)")
    for flag, warm in (("--dts-temperature-start", start), ("--dts-temperature-end", end)):
        if not warm > 0 or math.isinf(warm):
            raise ValueError(f"{flag} {warm}: a softmax temperature must be a number > 0")
    if end > start:
        raise ValueError(
            f"--dts-temperature-end {end} is above --dts-temperature-start {start}: the gate would "
            "become denser; swap them"
        )
    if shape not in SHAPES:
        raise ValueError(f"--dts-temperature-schedule {shape!r}: choose one of {', '.join(SHAPES)}")
    spawn = max_update // 20 if spawn == -1 else spawn
    anneal = max_update // 10 if anneal == -1 else anneal
    if 0 < max_update <= spawn:
        raise ValueError(
            f"--evo-spawn-update {spawn} lies beyond --max-update {max_update}: the experts would "
            "never split; lower it, or train a dense model"
        )
    if hard < -1 or 0 < hard < spawn:
        raise ValueError(
            f"{hard_flag} {hard} comes before the split at update {spawn}: give an update from "
            "there on, -1 (automatic) or 0 (never)"
        )
    automatic = spawn + (max_update // 10 if stable else anneal)
    resolved = {-1: automatic, 0: None}.get(hard, hard)
    return EvolutionSchedule(spawn, anneal, resolved, start, end, shape)
