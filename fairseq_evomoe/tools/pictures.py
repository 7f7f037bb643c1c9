"""The figures of a report as SVG. They need no colour, as lines differ in dash and marker."""

import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fairseq_evomoe.tools.run_log import RunLog

# below this level matplotlib logs every font that it considers
logging.getLogger("matplotlib").setLevel(logging.WARNING)

STYLES = tuple(zip(("-", "--", "-.", ":"), ("o", "s", "^", "D"), strict=True))
MOST_POINTS = 150
"""Number of points of a line that say their values under the pointer."""

SVG = "http://www.w3.org/2000/svg"
LINK = "{http://www.w3.org/1999/xlink}href"
GROUP = re.compile(r"(line|points|valid)-of-(run-\d+)-\d+")


@dataclass
class Drawing:
    """A figure whose runs can be switched off and whose points say their values.

    Attributes:
        figure: of matplotlib.
        titles: id of a group of points -> what each of them says.
    """

    figure: Figure
    titles: dict[str, list[str]] = field(default_factory=dict)

    def plot(
        self, axis: Axes, run: int, kind: str, x: list[float], y: list[float], **style: Any
    ) -> None:
        """Plot a run's values as a "line", as "points" that show under the pointer, or as marks of
        its validations ("valid")."""
        group = f"{kind}-of-run-{run}-{len(self.titles)}"
        self.titles[group] = []
        name = style.get("label")
        if kind != "line":
            style = {**style, "linestyle": "none"}
            self.titles[group] = [
                f"{name}: {axis.get_xlabel()} {a:,.6g}, {b:,.4g}" for a, b in zip(x, y, strict=True)
            ]
            style.pop("label", None)
        axis.plot(x, y, gid=group, **style)


def _styles(logs: Sequence[RunLog]) -> Iterator[tuple[int, RunLog, dict[str, Any], str]]:
    colours = plt.get_cmap("viridis")
    for i, (log, (dash, mark)) in enumerate(zip(logs, cycle(STYLES), strict=False)):
        colour = colours(0.85 * i / max(1, len(logs) - 1))
        yield i, log, {"linestyle": dash, "color": colour, "label": log.name}, mark


def _lines(drawing: Drawing, axis: Axes, logs: Sequence[RunLog], x: str, y: str) -> None:
    """Plot a column of each log over another one."""
    for i, log, style, mark in _styles(logs):
        values = log.series(x, y)
        drawing.plot(axis, i, "line", *values, linewidth=1, **style)
        step = max(1, len(values[0]) // MOST_POINTS)
        few = [column[::step] for column in values]
        drawing.plot(axis, i, "points", *few, marker=mark, markersize=6, **style)


def losses(logs: Sequence[RunLog]) -> Drawing:
    """Plot the task loss over updates, target tokens and seconds.

    Lines show training, markers show validation.
    """
    columns = (("num_updates", "updates"), ("tokens", "target tokens"), ("wall", "seconds"))
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True, layout="constrained")
    drawing = Drawing(figure)
    for axis, (key, name) in zip(axes, columns, strict=True):
        axis.set_xlabel(name)
        axis.grid(alpha=0.3)
        _lines(drawing, axis, logs, key, "loss")
        for i, log, style, mark in _styles(logs):
            if log.valid:
                values = log.series(key, "loss", rows="valid")
                drawing.plot(axis, i, "valid", *values, marker=mark, markersize=5, **style)
    axes[0].set_ylabel("task loss (bits per token)\nlines: training, markers: validation")
    axes[0].legend()
    return drawing


def evolution(logs: Sequence[RunLog]) -> Drawing:
    """Plot temperature, active experts, entropy of the gate and load balance over updates."""
    rows = (
        ("moe_temperature", "temperature"),
        ("moe_active_experts", "active experts per token"),
        ("moe_gate_entropy", "gate entropy (nats)"),
        ("moe_load_max_mean", "busiest expert / mean"),
        ("moe_dead_experts", "share of dead experts"),
    )
    figure, axes = plt.subplots(1, len(rows), figsize=(15, 3.2), layout="constrained")
    drawing = Drawing(figure)
    for axis, (key, name) in zip(axes, rows, strict=True):
        axis.set(xlabel="updates", title=name)
        axis.grid(alpha=0.3)
        _lines(drawing, axis, logs, "num_updates", key)
        axis.set_ylim(0, None)
    axes[0].legend()
    return drawing


def load(log: RunLog) -> Drawing:
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
    return Drawing(figure)


def likeness(found: dict[str, Tensor]) -> Drawing:
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
    return Drawing(figure)


def svg(drawing: Drawing, name: str, *, png: Path | None = None) -> str:
    """Return the drawing as an SVG element, save it as PNG if `png` is given, and close it.

    Args:
        drawing: the figure.
        name: of the figure on its page; it makes the element's ids unique there.
        png: file to write.
    """
    if png is not None:
        drawing.figure.savefig(png, dpi=110)
    text = io.StringIO()
    # text stays text, which is smaller and can be read aloud
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        drawing.figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(drawing.figure)
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(text.getvalue())
    for described in root.findall(f"{{{SVG}}}metadata"):
        root.remove(described)
    prefix = re.sub(r"\W+", "-", name)
    for element in root.iter():
        own = element.get("id", "")
        if found := GROUP.fullmatch(own):
            element.set("class", f"{found[1]} of-{found[2]}")
            marks = list(element.iter(f"{{{SVG}}}use"))
            for mark, title in zip(marks, drawing.titles[own], strict=False):
                ElementTree.SubElement(mark, f"{{{SVG}}}title").text = title
        if own:
            element.set("id", f"{prefix}-{own}")
        # HTML knows SVG's attributes without a namespace
        link = element.attrib.pop(LINK, None)
        if link is not None:
            element.set("href", f"#{prefix}-{link[1:]}" if link.startswith("#") else link)
        for key, value in element.items():
            if "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{prefix}-"))
    return ElementTree.tostring(root, encoding="unicode")
