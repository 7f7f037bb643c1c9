"""The plots of docs/evidence.md, drawn from the rows in benchmarks/results/.

They can be read without colour, because series differ in their dashes and marks.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib

from benchmarks import RESULTS
from benchmarks.pages.tables import NAMES, by_gate, read
from benchmarks.quality.tasks import TASKS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]
Series = dict[str, list[tuple[float, list[float]]]]
GATES = ("dense", "switch", "gshard", "base", "hash", "stable", "dts", "evomoe")
GATES += ("switch_words", "dts_words", "evomoe_words")
BY_EXPERTS = ("switch", "switch_words", "dts_words", "evomoe_words")
MARKS = "os^Dvx*P"
DASHES = ("-", "--", "-.", ":")
PAPER = {
    "tau": {4: 19.01, 8: 18.82, 10: 18.67},
    "delta": {0: 19.89, 1: 19.26, 2: 18.82, 3: 18.54},
}
"""Validation perplexity of MemoryFormer-tiny by tau and delta (arXiv 2411.12992, ablations)."""


def draw_series(axis: Axes, series: Series) -> None:
    """Draw lines through the means, with error bars from the lowest to the highest seed."""
    styles = cycle(zip(cycle(DASHES), MARKS, strict=False))
    colours = plt.get_cmap("viridis")
    for i, ((name, points), (dash, mark)) in enumerate(zip(series.items(), styles, strict=False)):
        x = [at for at, _ in points]
        y = [statistics.mean(values) for _, values in points]
        low = [m - min(v) for m, (_, v) in zip(y, points, strict=True)]
        high = [max(v) - m for m, (_, v) in zip(y, points, strict=True)]
        colour = colours(0.85 * i / max(1, len(series) - 1))
        axis.errorbar(
            *(x, y, [low, high]),
            linestyle=dash, marker=mark, markersize=4, linewidth=1, capsize=2,
            color=colour, label=name,
        )  # fmt: skip
    axis.grid(alpha=0.3)


def differences(found: dict[str, list[Row]], key: str = "valid_nll_bits") -> dict[str, list[float]]:
    """Gate -> its differences from Switch, one per seed."""
    base = {r["seed"]: float(r[key]) for r in found.get("switch", []) if r[key]}
    return {
        gate: [float(r[key]) - base[r["seed"]] for r in found[gate] if r[key] and r["seed"] in base]
        for gate in GATES
        if gate in found
    }


def quality(rows: list[Row], titles: dict[str, str]) -> plt.Figure:
    """Plot each gate's loss minus Switch's on every task, with one mark per seed."""
    figure, axes = plt.subplots(
        1, len(titles), figsize=(3.2 * len(titles), 3.4), sharey=True, layout="constrained"
    )
    have = {r["gate"] for r in rows}
    shown = [g for g in GATES if g in have]
    for axis, (task, title) in zip(axes, titles.items(), strict=True):
        found = differences(by_gate(rows, task))
        for y, gate in enumerate(reversed(shown)):
            values = found.get(gate, [])
            axis.plot(values, [y] * len(values), "o", color="0.35", fillstyle="none")
            if values:
                axis.plot([statistics.mean(values)], [y], "|", color="black", markersize=16)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("bits per piece, relative to Switch")
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(shown)), [NAMES[g] for g in reversed(shown)])
    return figure


def curves(rows: list[Row], runs: Sequence[tuple[str, str, str]]) -> plt.Figure:
    """Plot the validation loss over updates. `runs` lists (task, updates, title)."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4), layout="constrained")
    for axis, (task, updates, title) in zip(axes, runs, strict=True):
        found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            usual = row["experts"] == str(TASKS[task]["experts"]) and not row["label"]
            late = int(row["at"]) >= int(updates) // 3
            if row["task"] == task and row["updates"] == updates and usual and late:
                found[row["gate"]][int(row["at"])].append(float(row["valid_nll_bits"]))
        shown = [(g, sorted(found[g].items())) for g in GATES if g in found]
        draw_series(axis, {f"{NAMES[g]} ({len(p[-1][1])})": p for g, p in shown})
        axis.set(
            title=f"{title} (number of seeds)",
            xlabel="updates (the first third of the run is left out)",
            ylabel="validation NLL, bits per piece",
        )
        if found:
            axis.legend(fontsize=8)
    return figure


def number_of_experts(rows: list[Row]) -> plt.Figure:
    """Plot the loss over the number of experts, with seed 1."""
    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    series: Series = {}
    for gate in BY_EXPERTS:
        points = defaultdict(list)
        for row in rows:
            usual = row["updates"] == str(TASKS["lm"]["updates"]) and not row["label"]
            if row["task"] == "lm" and row["gate"] == gate and usual and row["seed"] == "1":
                points[float(row["experts"])].append(float(row["valid_nll_bits"]))
        series[NAMES[gate]] = sorted(points.items())
    draw_series(axis, series)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="experts", ylabel="validation NLL, bits per piece")
    axis.legend(fontsize=8)
    return figure


def memory(rows: list[Row]) -> plt.Figure:
    """Plot the effect of tau and delta, here and in the paper, relative to the defaults 8 and 2."""
    from math import log2

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, (name, flag, gates, usual) in zip(
        axes,
        (
            ("tau", "--memory-bits", ("memoryformer", "memory_ffn"), 8),
            ("delta", "--memory-delta", ("memory_ffn",), 2),
        ),
        strict=True,
    ):
        series: Series = {}
        for gate in gates:
            mine: dict[float, list[float]] = defaultdict(list)
            for row in rows:
                here = row["task"] == "lm" and row["gate"] == gate and row["seed"] == "1"
                here &= row["updates"] == str(TASKS["lm"]["updates"])
                words = row["flags"].split()
                if here and (not words or (words[0] == flag and len(words) == 2)):
                    mine[float(words[1]) if words else usual].append(float(row["valid_nll_bits"]))
            if len(mine) > 1 and usual in mine:
                base = mine[usual][0]
                series[f"{gate}, here"] = sorted(
                    (k, [v - base for v in vs]) for k, vs in mine.items()
                )
        paper = PAPER[name]
        series["the paper"] = [(k, [log2(v / paper[usual])]) for k, v in paper.items()]
        draw_series(axis, series)
        axis.set(xlabel=f"{name}, bits", ylabel=f"bits per piece, relative to {name} = {usual}")
        axis.legend(fontsize=8)
    return figure


def save(folder: Path, figures: Callable[[], dict[str, plt.Figure]]) -> None:
    """Draw figures and save them as SVG files in `folder`. The same rows give the same bytes."""
    folder.mkdir(exist_ok=True)
    with plt.rc_context({"svg.hashsalt": folder.name, "font.size": 9}):
        for name, figure in figures().items():
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


def draw(folder: Path, titles: dict[str, str]) -> None:
    """Draw all plots of docs/evidence.md into `folder`."""
    rows, points = read(RESULTS / "gates.csv"), read(RESULTS / "curves.csv")
    long = [("lm", "800", "Causal LM"), ("mlm", str(TASKS["mlm"]["updates"]), "Masked LM")]
    save(
        folder,
        lambda: {
            "quality": quality(rows, titles),
            "curves": curves(points, long),
            "experts": number_of_experts(rows),
            "memory": memory(rows),
        },
    )
