"""The figures of a report as SVG. They need no colour, as lines differ in dash and marker."""

import io
import logging
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from fairseq_evomoe.tools.run_log import RunLog

# below this level matplotlib logs every font that it considers
logging.getLogger("matplotlib").setLevel(logging.WARNING)

STYLES = tuple(zip(("-", "--", "-.", ":"), ("o", "s", "^", "D"), strict=True))


def _styles(logs: Sequence[RunLog]) -> Iterator[tuple[RunLog, dict[str, Any], str]]:
    colours = plt.get_cmap("viridis")
    for i, (log, (dash, mark)) in enumerate(zip(logs, cycle(STYLES), strict=False)):
        colour = colours(0.85 * i / max(1, len(logs) - 1))
        yield log, {"linestyle": dash, "color": colour, "label": log.name}, mark


def losses(logs: Sequence[RunLog]) -> Figure:
    """Plot the task loss over updates, target tokens and seconds.

    Lines show training, markers show validation.
    """
    columns = (("num_updates", "updates"), ("tokens", "target tokens"), ("wall", "seconds"))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    for axis, (key, name) in zip(axes, columns, strict=True):
        for log, style, mark in _styles(logs):
            axis.plot(*log.series(key, "loss"), linewidth=1, **style)
            if log.valid:
                axis.plot(
                    *log.series(key, "loss", rows="valid"),
                    linestyle="none",
                    marker=mark,
                    markersize=5,
                    color=style["color"],
                )
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("task loss (bits per token)\nlines: training, markers: validation")
    axes[0].legend()
    return figure


def evolution(logs: Sequence[RunLog]) -> Figure:
    """Plot temperature, active experts, entropy of the gate and load balance over updates."""
    rows = (
        ("moe_temperature", "temperature"),
        ("moe_active_experts", "active experts per token"),
        ("moe_gate_entropy", "gate entropy (nats)"),
        ("moe_load_max_mean", "busiest expert / mean"),
        ("moe_dead_experts", "share of dead experts"),
    )
    figure, axes = plt.subplots(1, len(rows), figsize=(15, 3.2), layout="constrained")
    for axis, (key, name) in zip(axes, rows, strict=True):
        for log, style, _ in _styles(logs):
            axis.plot(*log.series("num_updates", key), linewidth=1, **style)
        axis.set(xlabel="updates", title=name, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def load(log: RunLog) -> Figure:
    """Plot each expert's share of its layer's load over updates. Darker means more load."""
    layers = log.layers
    figure, axes = plt.subplots(
        len(layers), 1, figsize=(12, 0.9 + 1.3 * len(layers)), squeeze=False, layout="constrained"
    )
    for axis, (layer, keys) in zip(axes[:, 0], layers.items(), strict=True):
        # before the split the log lists only the base expert, which has the whole load
        share = [
            [r.get(k, 1.0 if k.endswith("/e0") else 0.0) for r in log.train if "moe_stage" in r]
            for k in keys
        ]
        updates = [r["num_updates"] for r in log.train if "moe_stage" in r]
        image = axis.imshow(
            share,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            cmap="Greys",
            vmin=0,
            vmax=min(1.0, 3 / len(keys)),
            extent=(updates[0], updates[-1], -0.5, len(keys) - 0.5),
        )
        axis.set_ylabel(f"{layer}\nexpert")
        figure.colorbar(image, ax=axis, label="share", extend="max")
    axes[-1, 0].set_xlabel("updates")
    return figure


def likeness(found: dict[str, Tensor]) -> Figure:
    """Plot the cosine of each pair of experts; with up to 16 experts, print its value as well."""
    figure, axes = plt.subplots(
        1, len(found), figsize=(3.4 * len(found), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (layer, cosines) in zip(axes[0], found.items(), strict=True):
        axis.imshow(cosines, cmap="Greys", vmin=0, vmax=1.6)
        axis.set(title=layer, xticks=range(len(cosines)), yticks=range(len(cosines)))
        if len(cosines) <= 16:
            for (i, j), value in zip(
                ((i, j) for i in range(len(cosines)) for j in range(len(cosines))),
                cosines.flatten().tolist(),
                strict=True,
            ):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    return figure


def svg(figure: Figure, *, png: Path | None = None) -> str:
    """Return the figure as an SVG element, save it as PNG if `png` is given, and close it."""
    if png is not None:
        figure.savefig(png, dpi=110)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]
