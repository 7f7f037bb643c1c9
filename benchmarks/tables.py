"""Markdown tables from benchmarks/results/gates.csv and gate_speed.csv, as README and recipes have.

python benchmarks/tables.py            one line a gate: means over seeds, and their spread
python benchmarks/tables.py --sweep    one line a variation of EvoMoE, against its defaults
"""

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
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
}


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


def gates(rows: list[dict[str, str]], speed: list[dict[str, str]], task: str) -> None:
    per_second = {(r["task"], r["gate"]): r for r in speed}
    scored = task == "multi30k"
    head = ["gate", "seeds", "valid NLL, bits", "test2016 BLEU" if scored else "test NLL, bits"]
    head += ["active experts", "load max/mean", "dead experts", "training, tokens/s (of dense)"]
    print(line(head) + "\n" + line(["---"] * len(head)))
    found = defaultdict(list)
    for row in rows:
        if row["task"] == task and not row["label"]:
            found[row["gate"]].append(row)
    for gate, name in NAMES.items():
        mine = found.get(gate)
        if not mine:
            continue
        # what starts from one expert or from many ends alike
        timed = per_second.get((task, {"dts": "evomoe", "switch_evo": "switch"}.get(gate, gate)))
        rate = "-"
        if timed:
            rate = f"{timed['tokens_per_s']} ({float(timed['ratio_to_dense_p50']):.2f})"
        result = (
            spread(numbers(mine, "bleu"), 2)
            if scored
            else spread(numbers(mine, "test_nll_bits"), 3)
        )
        cells = [name, str(len(mine)), spread(numbers(mine, "valid_nll_bits"), 3), result]
        cells += [spread(numbers(mine, "active_experts")[:1], 0)]
        cells += [spread(numbers(mine, "load_max_mean"), 2)]
        cells += [f"{statistics.mean(numbers(mine, 'dead_experts') or [0]):.1%}", rate]
        print(line(cells))


def sweep(rows: list[dict[str, str]], task: str) -> None:
    by_label = defaultdict(list)
    for row in rows:
        if row["task"] == task and row["gate"] in ("evomoe", "dts"):
            by_label[row["gate"], row["label"], row["flags"], row["updates"]].append(row)
    head = ["gate", "flags", "updates", "seeds", "valid NLL, bits", "BLEU", "load max/mean", "dead"]
    print(line(head) + "\n" + line(["---"] * len(head)))
    for (gate, _, flags, updates), mine in by_label.items():
        cells = [gate, f"`{flags}`" if flags else "defaults", updates, str(len(mine))]
        cells += [spread(numbers(mine, "valid_nll_bits"), 3), spread(numbers(mine, "bleu"), 2)]
        cells += [spread(numbers(mine, "load_max_mean"), 2)]
        cells += [f"{statistics.mean(numbers(mine, 'dead_experts') or [0]):.1%}"]
        print(line(cells))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--csv", type=Path, default=RESULTS / "gates.csv")
    args = parser.parse_args()
    rows = read(args.csv)
    path = RESULTS / "gate_speed.csv"
    speed = read(path) if path.exists() else []
    for task in dict.fromkeys(r["task"] for r in rows):
        print(f"\n{task}\n")
        if args.sweep:
            sweep(rows, task)
        else:
            gates(rows, speed, task)


if __name__ == "__main__":
    main()
