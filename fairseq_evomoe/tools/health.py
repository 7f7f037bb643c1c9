"""Says in words whether a training is healthy, each time with the figure and its threshold.

Everything is read from the metrics in the log, so that it can be said while a run is under way.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from fairseq_evomoe.tools.run_log import Row, RunLog

Verdict = Literal["good", "look", "bad"]
STAGES = ("diversify", "sparsify", "hard")
DEAD, STARVING = 0.1, 0.25
"""Shares of an even load below which an expert counts as dead and as starving."""


@dataclass(frozen=True)
class Finding:
    """One answer.

    Attributes:
        question: what was looked at.
        verdict: "good", "look" (worth a look) or "bad".
        answer: in words, with the figure.
        threshold: in words, what would be good.
    """

    question: str
    verdict: Verdict
    answer: str
    threshold: str


def mean_of(rows: list[Row], key: str) -> float | None:
    """Mean of a metric over the rows that have it, or None."""
    values = [r[key] for r in rows if key in r and math.isfinite(r[key])]
    return statistics.fmean(values) if values else None


def grade(value: float, look: float, bad: float) -> Verdict:
    """The verdict of a figure that should be small."""
    return "bad" if value > bad else "look" if value > look else "good"


def _numbers(log: RunLog) -> Iterator[Finding]:
    broken = [r for r in log.train if not math.isfinite(r.get("loss", 0.0))]
    norms = [r for r in log.train if not math.isfinite(r.get("gnorm", 0.0))]
    where = (
        f", first at update {int((broken or norms)[0]['num_updates'])}" if broken or norms else ""
    )
    yield Finding(
        "Numbers",
        "bad" if broken else "look" if norms else "good",
        f"the loss was not a number in {len(broken)} of {len(log.train)} lines, the gradient norm "
        f"in {len(norms)}{where}",
        "none",
    )


def _reached(log: RunLog) -> Iterator[Finding]:
    last = log.train[-1]
    if "moe_stage" not in last:
        return
    stage, temperature = STAGES[int(last["moe_stage"])], last.get("moe_temperature", 0.0)
    experts = last.get("moe_active_experts", 1.0)
    yield Finding(
        "Stage",
        "good",
        f"{stage} at update {int(last['num_updates']):,}, temperature {temperature:.3g}, "
        f"{experts:.2f} experts per token",
        "hard at the end, unless the gate has no such stage",
    )


def _experts(log: RunLog) -> Iterator[Finding]:
    split = [r for r in log.train if r.get("moe_stage", 0) > 0]
    recent = split[-max(1, len(split) // 10) :] if split else []
    dead = starving = total = 0
    shift = 0.0
    for keys in log.layers.values():
        even = 1 / len(keys)
        shares = [mean_of(recent, key) or 0.0 for key in keys]
        dead += sum(s < DEAD * even for s in shares)
        starving += sum(DEAD * even <= s < STARVING * even for s in shares)
        total += len(keys)
        halves = [split[len(split) // 2 : 3 * len(split) // 4], split[3 * len(split) // 4 :]]
        if all(halves):
            moved = (abs((mean_of(halves[1], k) or 0) - (mean_of(halves[0], k) or 0)) for k in keys)
            shift = max(shift, sum(moved) / 2)
    if not recent or not total:
        return
    yield Finding(
        "Experts",
        "bad" if dead else "look" if starving else "good",
        f"{dead} of {total} get less than {DEAD:.0%} of an even load (dead), {starving} less than "
        f"{STARVING:.0%} (starving)",
        "none",
    )
    busiest = mean_of(recent, "moe_load_max_mean")
    if busiest is not None:
        yield Finding(
            "Balance",
            grade(busiest, 2, 4),
            f"the busiest expert has {busiest:.2f} times the mean load",
            "up to 2, and not above 4",
        )
    yield Finding(
        "Drift",
        grade(shift, 0.1, 0.3),
        f"between the last two quarters since the split {shift:.1%} of a layer's load moved to "
        "other experts",
        "up to 10 %, and not above 30 %",
    )


def _router(log: RunLog) -> Iterator[Finding]:
    counts = [len(keys) for keys in log.layers.values()]
    entropy = mean_of(log.train[-max(1, len(log.train) // 10) :], "moe_gate_entropy")
    if entropy is None or not counts or max(counts) < 2:
        return
    share = entropy / math.log(max(counts))
    said = "it hardly tells tokens apart" if share > 0.98 else "it is certain of nearly every token"
    yield Finding(
        "Router",
        "good" if 0.02 <= share <= 0.98 else "look",
        f"the gate's entropy is {share:.0%} of the largest possible"
        + ("" if 0.02 <= share <= 0.98 else f": {said}"),
        "2 to 98 %",
    )


def _rerouted(log: RunLog) -> Iterator[Finding]:
    shares = [r["moe_rerouted"] for r in log.valid if "moe_rerouted" in r]
    if not shares:
        return
    yield Finding(
        "Flapping",
        grade(shares[-1], 0.25, 0.5),
        f"{shares[-1]:.1%} of the validation tokens went to another first expert than at the "
        f"validation before (at first {shares[0]:.1%})",
        "falling, at the end up to 25 %, and not above 50 %",
    )


def _jumps(log: RunLog) -> Iterator[Finding]:
    rows = [r for r in log.train if "moe_stage" in r and math.isfinite(r.get("loss", math.nan))]
    for number, name in ((1, "Split"), (2, "Hard switch")):
        after = [r for r in rows if r["moe_stage"] >= number]
        before = [r for r in rows if r["moe_stage"] < number]
        if not after or len(before) < 3:
            continue
        usual = statistics.fmean(r["loss"] for r in before[-5:])
        worst = max(r["loss"] for r in after[:5])
        jump = worst / usual - 1
        start = before[-1]["num_updates"]
        back = next((r["num_updates"] for r in after if r["loss"] <= usual), None)
        took = f"recovered after {back - start:,.0f} updates" if back else "not yet recovered"
        yield Finding(
            name,
            grade(jump, 0.05, 0.2) if back else "look",
            f"at update {start:,.0f} the loss rose by {max(jump, 0):.1%} at most, {took}",
            "up to 5 %, and not above 20 %",
        )


def _over_fitting(log: RunLog) -> Iterator[Finding]:
    losses = [(r["num_updates"], r["loss"]) for r in log.valid if "loss" in r]
    if len(losses) < 3:
        return
    best = min(losses, key=lambda x: x[1])
    rise = losses[-1][1] / best[1] - 1
    yield Finding(
        "Over-fitting",
        grade(rise, 0.01, 0.05),
        f"the validation loss is {rise:.1%} above its best, which was at update {best[0]:,.0f}",
        "up to 1 %, and not above 5 %",
    )


def _time(log: RunLog) -> Iterator[Finding]:
    found = []
    for number, stage in enumerate(STAGES):
        rates = [r["ups"] for r in log.train if r.get("moe_stage") == number and r.get("ups")]
        if rates:
            found.append((stage, 1000 / statistics.median(rates)))
    if found:
        slowest, fastest = max(t for _, t in found), min(t for _, t in found)
        yield Finding(
            "Time per update",
            "good",
            ", ".join(f"{stage} {t:,.0f} ms" for stage, t in found),
            f"the slowest stage takes {slowest / fastest:.2f} times as long as the fastest",
        )


CHECKS: tuple[Callable[[RunLog], Iterator[Finding]], ...] = (
    *(_numbers, _reached, _experts, _router, _rerouted, _jumps, _over_fitting, _time),
)


def health(log: RunLog) -> list[Finding]:
    """Everything that the log of a run says about its health."""
    return [finding for check in CHECKS for finding in check(log)]


def summary(findings: list[Finding]) -> str:
    """One sentence about all of them."""
    bad = [f.question.lower() for f in findings if f.verdict == "bad"]
    look = [f.question.lower() for f in findings if f.verdict == "look"]
    if not bad and not look:
        return "Nothing stands out."
    parts = []
    if bad:
        parts.append(f"something is wrong with: {', '.join(bad)}")
    if look:
        parts.append(f"worth a look: {', '.join(look)}")
    said = "; ".join(parts)
    return said[0].upper() + said[1:] + "."
