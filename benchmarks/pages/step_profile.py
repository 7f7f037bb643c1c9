"""The table of docs/speed.md that says where the time of an update goes."""

from benchmarks.pages.plots import Row
from benchmarks.pages.tables import table

CASES = {
    "stock": "fairseq's own",
    "dense": "dense",
    "switch": "Switch",
    "dts": "DTS",
    "base": "BASE",
    "expert_choice": "expert choice",
    "n-grams": "n-grams",
    "memoryformer": "MemoryFormer",
}
TASKS = {"lm": "Language model", "translation": "Translation model"}


def step_profile(rows: list[Row]) -> str:
    """Milliseconds of each part of an update, in a table for each task and machine.

    Of a case that was measured in several runs, the last one is shown.
    """
    found: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        threads = f"{row['threads']} thread" + "s" * (row["threads"] != "1")
        where = (row["task"], row["device"], threads, row["arithmetic"], f"torch {row['torch']}")
        found.setdefault(where, {})[row["part"], row["case"]] = row
    out = []
    for (task, *where), cells in found.items():
        cases = [c for c in CASES if any(case == c for _, case in cells)]
        parts = dict.fromkeys(part for part, _ in cells)
        ms = {key: float(row["ms"]) for key, row in cells.items()}
        lines = [
            [part, *(f"{ms[part, c]:.0f}" if ms.get((part, c)) else "" for c in cases)]
            for part in parts
            if any(ms.get((part, c)) for c in cases)
        ]
        whole = [f"{sum(ms.get((part, c), 0) for part in parts):.0f}" for c in cases]
        head = ["milliseconds", *(CASES[c] for c in cases)]
        title = f"**{TASKS[task]}** ({', '.join(where)})"
        out.append(f"{title}\n\n" + table(head, [*lines, ["the whole update", *whole]]) + "\n")
    return "\n".join(out)
