"""The tables of the runs on text of mixed domains (`benchmarks.quality.campaign`).

python -m benchmarks.pages.mixed_domains            print them
python -m benchmarks.pages.mixed_domains --write    write them into docs
"""

import statistics
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.pages.tables import read, table, write_or_print
from benchmarks.quality.campaign import KEY, METHODS, STAGES, VALIDATIONS


def mixed_domains() -> str:
    """One line per run: validation bits after half of the updates and at the end."""
    curves: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for point in read(RESULTS / "quality_curves.csv"):
        curves.setdefault(tuple(point[k] for k in KEY), []).append(point)
    order = list(METHODS)
    lines = []
    for row in sorted(
        read(RESULTS / "quality.csv"),
        key=lambda r: (int(r["updates"]), order.index(r["method"]), float(r["rate"]), r["seed"]),
    ):
        half = curves[tuple(row[k] for k in KEY)][VALIDATIONS // 2 - 1]
        lines.append(
            [
                *(row[k] for k in ("updates", "method", "rate", "arithmetic", "seed")),
                f"{float(half['valid_bits']):.3f}",
                f"{float(row['valid_bits']):.3f}",
                f"{int(row['train_seconds']) / 60:.0f}",
                row["device"].replace("(R)", "").replace(" Processor", ""),
            ]
        )
    head = ["updates", "model", "peak rate", "arithmetic", "seed", "bits after half", "bits"]
    return table([*head, "minutes", "processor"], lines) + "\n"


def best_rates() -> str:
    """One line per method: the best of the rates that were tried, and its distance to dense."""
    updates = str(STAGES["rates"][0])
    found: dict[str, dict[str, list[float]]] = {}
    for row in read(RESULTS / "quality.csv"):
        if row["updates"] == updates:
            rates = found.setdefault(row["method"], {})
            rates.setdefault(row["rate"], []).append(float(row["valid_bits"]))
    best = {m: min(rates, key=lambda r: statistics.mean(rates[r])) for m, rates in found.items()}
    bits = {m: statistics.mean(found[m][rate]) for m, rate in best.items()}
    lines = [
        [
            *(method, str(len(found[method])), best[method]),
            str(len(found[method][best[method]])),
            *(f"{bits[method]:.3f}", f"{bits[method] - bits['dense']:+.3f}"),
        ]
        for method in sorted(bits, key=lambda m: bits[m])
    ]
    head = ["model", "rates tried", "best", "its seeds", "bits", "beside dense"]
    return table(head, lines) + "\n"


def places() -> list[tuple[Path, str, str]]:
    """(page, marker, text) of each table."""
    return [
        (ROOT / "docs/look_up_layers.md", "mixed domains", mixed_domains()),
        (ROOT / "docs/evidence.md", "best rates", best_rates()),
    ]


if __name__ == "__main__":
    write_or_print(__doc__, places, lambda: None)
