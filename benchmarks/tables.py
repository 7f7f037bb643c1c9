"""Markdown tables from the rows in benchmarks/results/, as README and recipes have them.

python benchmarks/tables.py             one line a gate: means over seeds, half their range
python benchmarks/tables.py sweep       one line a variation of EvoMoE, against its defaults
python benchmarks/tables.py look-ups    one line a way of putting look-ups into a model
python benchmarks/tables.py --write     all of them into the pages
"""

import argparse
import contextlib
import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from gate_tasks import TASKS

RESULTS = Path(__file__).resolve().parent / "results"
TITLES = {"multi30k": "Translation", "lm": "Language model"}
SPEED_OF = {"dts": "evomoe", "dts_words": "evomoe_words", "switch_evo": "switch"}
"""Gates that end as another does."""
RESULT = {
    "multi30k": (("seeds", "valid NLL, bits", "test2016 BLEU"), "bleu", 2),
    "lm": (("seeds", "valid NLL, bits", "test NLL, bits"), "test_nll_bits", 3),
}
"""Task -> heads of the columns that `results` fills, what the test column shows, its digits."""
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
"""Look-ups stand before norms; so does the dense model beside them (in the language model, all)."""


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as f:
        return list(csv.DictReader(f))


def spread(values: list[float], digits: int) -> str:
    """mean, and half the range where there are several seeds."""
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
    """Rows of a task's own length and number of experts with no flags of their own, by gate."""
    usual = {k: str(TASKS[task][k]) for k in ("updates", "experts")}
    found = defaultdict(list)
    for row in rows:
        if row["task"] == task and not row["label"] and row.items() >= usual.items():
            found[row["gate"]].append(row)
    return found


def results(mine: list[dict[str, str]], task: str) -> list[str]:
    """Cells for seeds, validation, and the test of a task."""
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
    """The tables of a kind, one a task, translation first."""
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
    """Put a text between `<!-- marker -->` and `<!-- end of marker -->` of a page."""
    start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
    page = path.read_text(encoding="utf-8")
    head, _, rest = page.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no place for {marker}")
    path.write_text(head + start + text + end + tail, encoding="utf-8")


def places() -> list[tuple[Path, str, str]]:
    """Every page, marker in it, and the text that belongs there."""
    recipes = RESULTS.parent.parent / "recipes"
    return [
        (recipes / f"{page}.md", marker, tables(marker))
        for page, marker in (
            ("choosing_a_gate", "gates"),
            ("choosing_a_gate", "sweep"),
            ("look_up_layers", "look-ups"),
        )
    ]


def write_or_print(
    about: str, places: Callable[[], list[tuple[Path, str, str]]], draw: Callable[[], None]
) -> None:
    """The command of a script that makes texts for pages: print them, or put them there."""
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
