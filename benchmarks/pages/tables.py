"""Markdown tables for the pages in docs/, made from the rows in benchmarks/results/.

python -m benchmarks.pages.tables             one line per gate: means and half the seeds' range
python -m benchmarks.pages.tables sweep       one line per variation of EvoMoE, and its defaults
python -m benchmarks.pages.tables look-ups    one line per way of putting look-ups into a model
python -m benchmarks.pages.tables --write     write all of them into the pages
"""

import argparse
import contextlib
import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.quality.tasks import TASKS

TITLES = {"multi30k": "Translation", "lm": "Language model"}
SPEED_OF = {"dts": "evomoe", "dts_words": "evomoe_words", "switch_evo": "switch"}
"""Gate -> the gate whose measured speed is used for it: both are the same in their last stage."""
RESULT = {
    "multi30k": (("seeds", "valid NLL, bits", "test2016 BLEU"), "bleu", 2),
    "lm": (("seeds", "valid NLL, bits", "test NLL, bits"), "test_nll_bits", 3),
}
"""Task -> heads of the columns that `results` fills, key of the test column, its decimals."""
NAMES = {
    "dense": "dense FFN",
    "mixture": "dense mixture (all experts)",
    "switch": "Switch",
    "bias": "Switch, balance by bias",
    "switch_evo": "Switch after diversify",
    "gshard": "GShard (top-2)",
    "base": "BASE",
    "hash": "Hash",
    "stable": "StableMoE",
    "expert_choice": "expert choice (encoder)",
    "dts": "DTS, independent experts",
    "evomoe": "EvoMoE (diversify + DTS)",
    "switch_words": "Switch, token bias",
    "dts_words": "DTS, token bias",
    "evomoe_words": "EvoMoE, token bias",
}

LOOK_UPS = {
    "dense": "dense",
    "dense_pre": "dense",
    "memoryformer": "MemoryFormer (`prob`)",
    "memoryformer_abs": "MemoryFormer (`abs_prob`)",
    "memory_out": "MemoryFormer, dense output projection",
    "memory_ffn": "hybrid: look-ups for all FFNs",
    "memory_half": "hybrid: for the FFN of every second layer",
    "memory_experts": "memory experts, DTS gate, 6 bits",
}
"""Look-up models use pre-norm, and so does the dense model that they are compared with. In the
language-model task, all models use it."""


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as f:
        return list(csv.DictReader(f))


def spread(values: list[float], digits: int) -> str:
    """Format the mean, and half the range if there are several seeds."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


def numbers(rows: list[dict[str, str]], key: str) -> list[float]:
    return [float(r[key]) for r in rows if r[key] != ""]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(line(list(cells)) for cells in (head, ["---"] * len(head), *rows))


def by_gate(rows: list[dict[str, str]], task: str) -> dict[str, list[dict[str, str]]]:
    """Unlabelled rows with the task's default numbers of updates and experts, grouped by gate."""
    usual = {k: str(TASKS[task][k]) for k in ("updates", "experts")}
    found = defaultdict(list)
    for row in rows:
        if row["task"] == task and not row["label"] and row.items() >= usual.items():
            found[row["gate"]].append(row)
    return found


def results(mine: list[dict[str, str]], task: str) -> list[str]:
    """Cells for the number of seeds, the validation loss and the test result of a task."""
    _, key, digits = RESULT[task]
    valid = spread(numbers(mine, "valid_nll_bits"), 3)
    return [str(len(mine)), valid, spread(numbers(mine, key), digits)]


def pace(timed: dict[str, str]) -> str:
    return f"{timed['tokens_per_s']} ({float(timed['ratio_to_dense_p50']):.2f})"


def gates(rows: list[dict[str, str]], speed: list[dict[str, str]], task: str) -> None:
    per_second = {(r["task"], r["gate"]): r for r in speed}
    head = ["gate", *RESULT[task][0]]
    head += ["active experts", "load max/mean", "dead experts", "training, tokens/s (of dense)"]
    lines = []
    found = by_gate(rows, task)
    for gate, name in NAMES.items():
        mine = found.get(gate)
        if not mine:
            continue
        timed = per_second.get((task, SPEED_OF.get(gate, gate)))
        rate = pace(timed) if timed else "-"
        cells = [name, *results(mine, task)]
        cells += [spread(numbers(mine, "active_experts")[:1], 0)]
        cells += [spread(numbers(mine, "load_max_mean"), 2)]
        cells += [f"{statistics.mean(numbers(mine, 'dead_experts') or [0]):.1%}", rate]
        lines.append(cells)
    print(table(head, lines))


def look_ups(rows: list[dict[str, str]], speed: list[dict[str, str]], task: str) -> None:
    timed = {(r["task"], r["gate"]): r for r in speed}
    head = ["model", *RESULT[task][0]]
    head += ["parameters, M", "MMAC/token", "training, tokens/s (of dense)"]
    lines = []
    found = by_gate(rows, task)
    for gate, name in LOOK_UPS.items():
        mine = found.get(gate)
        if not mine or (task, gate) == ("multi30k", "dense"):
            continue
        cells = [name, *results(mine, task)]
        cost = timed.get((task, gate))
        if cost:
            cells += [f"{int(cost['parameters']) / 1e6:.1f}", cost["mmacs_per_token"]]
            cells += [pace(cost)]
        lines.append(cells)
    print(table(head, lines))


def sweep(rows: list[dict[str, str]], task: str) -> None:
    by_label = defaultdict(list)
    for row in rows:
        usual = row["experts"] == str(TASKS[task]["experts"])
        if row["task"] == task and usual and row["gate"] in ("evomoe", "dts"):
            by_label[row["gate"], row["label"], row["flags"], row["updates"]].append(row)
    head = ["gate", "flags", "updates", "seeds", "valid NLL, bits", "BLEU", "load max/mean", "dead"]
    lines = []
    for (gate, _, flags, updates), mine in by_label.items():
        cells = [gate, f"`{flags}`" if flags else "defaults", updates, str(len(mine))]
        cells += [spread(numbers(mine, "valid_nll_bits"), 3), spread(numbers(mine, "bleu"), 2)]
        cells += [spread(numbers(mine, "load_max_mean"), 2)]
        cells += [f"{statistics.mean(numbers(mine, 'dead_experts') or [0]):.1%}"]
        lines.append(cells)
    print(table(head, lines))


def tables(kind: str) -> str:
    """The tables of one kind, one per task, translation first."""
    rows = read(RESULTS / "gates.csv")
    speed = read(RESULTS / "gate_speed.csv")
    out = []
    for task, title in TITLES.items():
        made = io.StringIO()
        with contextlib.redirect_stdout(made):
            if kind == "sweep":
                sweep(rows, task)
            else:
                (look_ups if kind == "look-ups" else gates)(rows, speed, task)
        out.append(f"**{title}**\n\n" + made.getvalue())
    return "\n".join(out)


def fill(path: Path, marker: str, text: str) -> None:
    """Replace the text between `<!-- marker -->` and `<!-- end of marker -->` in a page."""
    start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    page = path.read_text(encoding="utf-8")
    head, _, rest = page.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} lacks the two comments that enclose {marker}")
    path.write_text(head + start + text + end + tail, encoding="utf-8")


def places() -> list[tuple[Path, str, str]]:
    """(page, marker, text) of every table that this script makes."""
    docs = ROOT / "docs"
    return [
        (docs / f"{page}.md", marker, tables(marker))
        for page, marker in (
            ("choosing_a_gate", "gates"),
            ("choosing_a_gate", "sweep"),
            ("look_up_layers", "look-ups"),
        )
    ]


def write_or_print(
    about: str, places: Callable[[], list[tuple[Path, str, str]]], draw: Callable[[], None]
) -> None:
    """Run the command line of a script that makes texts for pages: print or write the texts."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="bring the pages up to date")
    args = parser.parse_args()
    for path, marker, text in places():
        if args.write:
            fill(path, marker, text)
        else:
            print(f"## {marker}\n\n{text}")
    if args.write:
        draw()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", nargs="?", choices=("gates", "sweep", "look-ups"), default="gates")
    parser.add_argument("--write", action="store_true", help="bring all pages up to date")
    args = parser.parse_args()
    if not args.write:
        print(tables(args.kind))
        return
    for path, marker, text in places():
        fill(path, marker, text)


if __name__ == "__main__":
    main()
