"""The tables of docs/evidence.md, made from the rows in benchmarks/results/.

python -m benchmarks.pages.evidence             print all tables
python -m benchmarks.pages.evidence --write     update the page and its plots
"""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT
from benchmarks.pages import plots
from benchmarks.pages.tables import (
    NAMES,
    SPEED_OF,
    by_gate,
    numbers,
    read,
    spread,
    table,
    write_or_print,
)
from benchmarks.quality.tasks import TASKS

Row = dict[str, str]
PAGE = ROOT / "docs/evidence.md"
GATES = plots.GATES
TITLES = {
    "multi30k": "Multi30k, English to German",
    "multi30k_de": "Multi30k, German to English",
    "lm": "Causal LM",
    "mlm": "Masked LM",
}
TESTS = {
    "multi30k": (("BLEU", "bleu", 2), ("chrF", "chrf", 2)),
    "multi30k_de": (("BLEU", "bleu", 2), ("chrF", "chrf", 2)),
    "lm": (("test NLL", "test_nll_bits", 3),),
    "mlm": (("test NLL", "test_nll_bits", 3), ("fine-tuned, %", "accuracy", 2)),
}
EXPERT_MMACS = 2 * 2 * 128 * 512 / 1e6
"""MMACs per token of one more active expert, summed over both MoE layers of the language models."""
ABLATIONS = {
    "the defaults": ("",),
    "spawn point": ("dts_words", "spawn100", "spawn250"),
    "diversify": ("copy", "noise", "mask", "drop0.2", "drop1"),
    "annealing": ("anneal10", "anneal150"),
    "temperature": ("cold",),
    "schedule": ("exponential",),
    "threshold": ("threshold0",),
    "noise": ("gumbel",),
    "balance weight": ("balance0", "balance0.1"),
    "number at the end": ("adaptive",),
}
"""What is varied -> labels of its rows, which are rows of the gate evomoe_words. `dts_words` is no
label, but stands for the rows of the gate of that name, which splits at update 0."""


def difference(mine: list[Row], other: list[Row], key: str, digits: int) -> str:
    """Format the mean, the lowest and the highest difference between runs of equal seed."""
    pairs = {r["seed"]: float(r[key]) for r in other if r[key]}
    each = [float(r[key]) - pairs[r["seed"]] for r in mine if r[key] and r["seed"] in pairs]
    if not each:
        return "-"
    if len(each) == 1:
        return f"{each[0]:+.{digits}f}"
    low, high = min(each), max(each)
    return f"{statistics.mean(each):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def quality(rows: list[Row]) -> str:
    """Results of all gates on all tasks, and their differences from Switch at the same seed."""
    parts = []
    for task, title in TITLES.items():
        found = by_gate(rows, task)
        tests = TESTS[task]
        head = ["gate", "seeds", "valid NLL", *(name for name, *_ in tests)]
        head += ["valid NLL - Switch's", f"{tests[-1][0]} - Switch's"]
        lines = []
        for gate in GATES:
            mine = found.get(gate, [])
            if not mine:
                continue
            cells = [NAMES[gate], str(len(mine)), spread(numbers(mine, "valid_nll_bits"), 3)]
            cells += [spread(numbers(mine, key), digits) for _, key, digits in tests]
            _, key, digits = tests[-1]
            cells += [difference(mine, found["switch"], "valid_nll_bits", 3)]
            cells += [difference(mine, found["switch"], key, digits)]
            lines.append(cells if gate != "switch" else [*cells[:-2], "", ""])
        parts.append(f"**{title}** ({TASKS[task]['updates']} updates)\n\n{table(head, lines)}\n")
    return "\n".join(parts)


def significance(rows: list[Row]) -> str:
    """Paired bootstrap of BLEU: for how many seeds a gate is better or worse than a baseline, and
    for how many of those significantly (p < 0.05)."""
    grouped = defaultdict(list)
    for row in rows:
        grouped[row["task"], row["gate"], row["against"]].append(row)
    lines = []
    for (task, gate, against), mine in grouped.items():
        better = [r for r in mine if float(r["bleu_difference"]) > 0]
        worse = [r for r in mine if float(r["bleu_difference"]) < 0]
        sure = lambda some: sum(float(r["p"]) < 0.05 for r in some)
        lines.append(
            [
                *(TITLES[task], NAMES[gate], NAMES[against], str(len(mine))),
                spread(numbers(mine, "bleu_difference"), 2),
                f"{len(better)}, {sure(better)}",
                f"{len(worse)}, {sure(worse)}",
            ]
        )
    head = ["task", "gate", "against", "seeds", "BLEU difference"]
    return table([*head, "better, with p < 0.05", "worse, with p < 0.05"], lines)


class Speeds:
    """Training speed and MACs of a gate with a given number of active experts."""

    def __init__(self, speed: list[Row]) -> None:
        self.rows = {(r["task"], r["gate"]): r for r in speed}

    def seconds(self, task: str, gate: str, active: float) -> float:
        """Training time per token over that of the dense model.

        For `dts` and `evomoe` gates it is interpolated linearly in the number of active experts,
        between the measured times with one and with all experts.
        """
        known = lambda name: 1 / float(self.rows[task, name]["ratio_to_dense_p50"])
        one, every = known(SPEED_OF.get(gate, gate)), known("mixture")
        if not gate.startswith(("dts", "evomoe")):
            return one
        return one + (every - one) * (active - 1) / (TASKS[task]["experts"] - 1)

    def mmacs(self, task: str, gate: str, active: float) -> float:
        one = float(self.rows[task, "dense"]["mmacs_per_token"])
        return one + (active - 1) * EXPERT_MMACS


def reach_of(points: list[Row], target: float) -> list[tuple[int, float]] | None:
    """Split a run, up to where it first reaches a loss, into stretches between validations.

    Between two validations the loss is interpolated linearly.

    Returns:
        (updates, active experts) of each stretch, or None if the run never reaches the loss.
    """
    stretches: list[tuple[int, float]] = []
    at, loss = 0, None
    for point in points:
        now, value, active = (
            int(point["at"]),
            float(point["valid_nll_bits"]),
            point["active_experts"],
        )
        width, reached = now - at, value <= target
        if reached and loss is not None and loss > target:
            width = round(width * (loss - target) / (loss - value))
        stretches.append((width, float(active or 1)))
        if reached:
            return stretches
        at, loss = now, value
    return None


def reach(
    curves: list[Row], speed: list[Row], task: str, updates: str, goal: str = "switch"
) -> str:
    """What each gate needs to reach the final loss of the gate `goal`, at the same seed."""
    runs: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in curves:
        usual = row["experts"] == str(TASKS[task]["experts"]) and not row["label"]
        if row["task"] == task and row["updates"] == updates and usual:
            runs[row["gate"], row["seed"]].append(row)
    cost, timed = Speeds(speed), task if task == "lm" else "lm"
    seeds = sorted({s for g, s in runs if g == goal})
    lines = []
    for gate in GATES:
        found = [s for s in seeds if (gate, s) in runs]
        if not found:
            continue
        each: dict[str, list[float]] = defaultdict(list)
        for s in found:
            final = runs[goal, s][-1]
            mine = reach_of(runs[gate, s], float(final["valid_nll_bits"]))
            if mine is None:
                continue
            for name, per_update in (
                ("updates", lambda g, a: 1.0),
                ("MACs", lambda g, a: cost.mmacs(timed, g, a)),
                ("seconds", lambda g, a: cost.seconds(timed, g, a)),
            ):
                theirs = int(updates) * per_update(goal, 1.0)
                each[name].append(theirs / sum(n * per_update(gate, a) for n, a in mine))
            each["after"].append(sum(n for n, _ in mine))
        reached = len(each["after"])
        cells = [NAMES[gate], f"{reached} of {len(found)}", spread(each["after"], 0)]
        lines.append(cells + [spread(each[k], 2) for k in ("updates", "MACs", "seconds")])
    head = ["gate", "seeds that reach it", "after updates"]
    head += [f"{k}: {NAMES[goal]}'s over its own" for k in ("updates = tokens", "MACs", "seconds")]
    return table(head, lines)


def ablations(rows: list[Row], task: str = "lm") -> str:
    """Variations of EvoMoE in one respect each, compared with the defaults at the same seed."""
    updates, experts = str(TASKS[task]["updates"]), str(TASKS[task]["experts"])
    by_label = defaultdict(list)
    for row in rows:
        dts = row["gate"] == "dts_words" and not row["label"]
        if (row["task"], row["updates"], row["experts"]) != (task, updates, experts):
            continue
        if row["gate"] == "evomoe_words" or dts:
            by_label["dts_words" if dts else row["label"]].append(row)
    unknown = set(by_label) - {x for labels in ABLATIONS.values() for x in labels}
    if unknown:
        raise ValueError(f"add these labels and what they vary to ABLATIONS: {', '.join(unknown)}")
    lines = []
    for what, labels in ABLATIONS.items():
        for label in labels:
            mine = by_label.get(label, [])
            if not mine:
                continue
            flags = "--evo-spawn-update 0" if label == "dts_words" else mine[0]["flags"]
            cells = [what, f"`{flags}`", str(len(mine)), spread(numbers(mine, "valid_nll_bits"), 3)]
            cells += [difference(mine, by_label[""], "valid_nll_bits", 3)]
            cells += [spread(numbers(mine, "active_experts"), 2)]
            lines.append([*cells, spread(numbers(mine, "load_max_mean"), 2)])
    head = ["what", "flags", "seeds", "valid NLL", "difference to the defaults"]
    return table([*head, "active experts at the end", "load max/mean"], lines)


def number_of_experts(rows: list[Row], task: str = "lm") -> str:
    """Loss and load of Switch, DTS and EvoMoE with 2 to 64 experts, all with seed 1."""
    gates = plots.BY_EXPERTS
    found = {
        (r["gate"], int(r["experts"])): r
        for r in rows
        if r["task"] == task and r["seed"] == "1" and not r["label"]
        if r["updates"] == str(TASKS[task]["updates"]) and r["gate"] in gates
    }
    lines = []
    for experts in sorted({e for _, e in found}):
        have = [found.get((g, experts)) for g in gates]
        cells = [f"{float(r['valid_nll_bits']):.3f}" if r else "-" for r in have]
        cells += [f"{float(r['load_max_mean']):.2f}" if r else "-" for r in have]
        lines.append([str(experts), *cells])
    names = [NAMES[g] for g in gates]
    return table(["experts", *names, *(f"load max/mean: {n}" for n in names)], lines)


def active_experts(rows: list[Row]) -> str:
    """Mean number of active experts per token in models that keep their threshold to the end, by
    word frequency and by place in the sentence."""
    layers = sorted({(r["task"], r["layer"]) for r in rows})
    classes: dict[tuple[str, str], dict[tuple[str, str], Row]] = defaultdict(dict)
    order: dict[str, int] = defaultdict(int)
    for row in rows:
        at = row["class"]
        if at in classes and (row["task"], row["layer"]) in classes[row["by"], at]:
            raise ValueError("active_experts.csv has rows of two models of one task; remove one")
        if row["by"] == "frequency":
            order[row["task"] + row["layer"]] += 1
            at = f"{order[row['task'] + row['layer']]}"
        classes[row["by"], at][row["task"], row["layer"]] = row
    lines = []
    for (by, at), cells in classes.items():
        name = {"all": "all tokens", "frequency": f"frequency class {at}"}.get(by, f"place {at}")
        values = [cells.get(x) for x in layers]
        lines.append([name, *(f"{float(r['active_experts']):.2f}" if r else "" for r in values)])
    return table(["tokens", *(f"{t}, {n}" for t, n in layers)], lines)


def hours(rows: list[Row], speed: list[Row], curves: list[Row]) -> str:
    """Core-hours of training, estimated from the measured speeds."""
    per_second = {(r["task"], r["gate"]): float(r["tokens_per_s"]) for r in speed}
    tokens: dict[str, float] = {}
    for row in curves:
        tokens[row["task"]] = int(row["tokens"]) / int(row["at"])
    lines, total = [], 0.0
    for task, title in TITLES.items():
        mine = [r for r in rows if r["task"] == task]
        timed = "multi30k" if task.startswith("multi30k") else "lm"
        known = lambda g, t=timed: per_second.get((t, g)) or per_second[t, "evomoe"]
        size = tokens.get(task) or tokens.get(timed) or 2048
        seconds = sum(int(r["updates"]) * size / known(r["gate"]) for r in mine)
        total += seconds
        updates = sum(int(r["updates"]) for r in mine)
        lines.append([title, str(len(mine)), f"{updates:,}", f"{seconds / 3600:.1f}"])
    lines.append(["all", str(len(rows)), "", f"{total / 3600:.1f}"])
    return table(["task", "runs", "updates", "core-hours of training"], lines)


def memory(rows: list[Row], task: str = "lm") -> str:
    """Results of variations of the look-ups, and of dense models of other widths."""
    wanted = ("dense", "memoryformer", "memoryformer_abs", "memory_ffn", "memory_half")
    wanted += ("memory_out", "memory_experts")
    by_kind = defaultdict(list)
    for row in rows:
        usual = row["updates"] == str(TASKS[task]["updates"])
        if row["task"] == task and usual and row["gate"] in wanted:
            by_kind[row["gate"], row["flags"]].append(row)
    lines = []
    for (gate, flags), mine in sorted(by_kind.items(), key=lambda x: (wanted.index(x[0][0]), x[0])):
        cells = [gate, f"`{flags}`" if flags else "", str(len(mine))]
        cells += [spread(numbers(mine, "valid_nll_bits"), 3)]
        lines.append([*cells, spread(numbers(mine, "test_nll_bits"), 3)])
    return table(["model", "flags", "seeds", "valid NLL", "test NLL"], lines)


def made() -> dict[str, str]:
    """Marker in the page -> text that belongs there."""
    load: Any = lambda name: read(RESULTS / f"{name}.csv") if has(name) else []
    has = lambda name: (RESULTS / f"{name}.csv").exists()
    rows, curves, speed = load("gates"), load("curves"), load("gate_speed")
    return {
        "quality": quality(rows),
        "significance": significance(load("significance")),
        "reach lm": reach(curves, speed, "lm", "800"),
        "reach lm words": reach(curves, speed, "lm", "800", "switch_words"),
        "reach mlm": reach(curves, speed, "mlm", str(TASKS["mlm"]["updates"])),
        "ablations": ablations(rows),
        "experts": number_of_experts(rows),
        "active experts": active_experts(load("active_experts")),
        "memory": memory(rows),
        "compute": hours(rows, speed, curves),
    }


def places() -> list[tuple[Path, str, str]]:
    """(page, marker, text) of every table in docs/evidence.md."""
    return [(PAGE, name, text.rstrip() + "\n") for name, text in made().items()]


if __name__ == "__main__":
    write_or_print(__doc__, places, lambda: plots.draw(PAGE.parent / "evidence", TITLES))
