"""The table of the runs on text of mixed domains (`benchmarks.quality.campaign`).

python -m benchmarks.pages.mixed_domains            print it
python -m benchmarks.pages.mixed_domains --write    write it into docs/look_up_layers.md
"""

from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.pages.tables import read, table, write_or_print
from benchmarks.quality.campaign import KEY, METHODS, VALIDATIONS


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


def places() -> list[tuple[Path, str, str]]:
    """(page, marker, text) of the table."""
    return [(ROOT / "docs/look_up_layers.md", "mixed domains", mixed_domains())]


if __name__ == "__main__":
    write_or_print(__doc__, places, lambda: None)
