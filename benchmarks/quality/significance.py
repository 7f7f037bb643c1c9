"""Paired bootstrap of the translations that gates.py wrote: is a difference due to chance?

    python -m benchmarks.quality.significance --task multi30k --data DIR --against dense switch

For each gate, each baseline and each seed that both were trained with, this reports the difference
in BLEU and its p-value (Koehn 2004; 1000 resamples, sacreBLEU). A translation whose BLEU differs
from that of its row in gates.csv comes from another run and is refused.
"""

import argparse
import csv
import logging
import sys
from pathlib import Path

import text_files
from sacrebleu.metrics import BLEU
from score import RESAMPLES, compare

from benchmarks import RESULTS, ROOT
from benchmarks.pages.tables import NAMES
from benchmarks.quality.tasks import TASKS, lines_of
from benchmarks.speed.timing import append, machine

FIELDS = "task gate against seed updates bleu_difference p resamples device torch date".split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    translations = [t for t in TASKS if t.startswith("multi30k")]
    parser.add_argument("--task", choices=translations, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--against", nargs="+", default=["dense", "switch"])
    parser.add_argument("--out", type=Path, default=ROOT / "work/gates")
    parser.add_argument("--csv", type=Path, default=RESULTS / "significance.csv")
    args = parser.parse_args()
    # sacrebleu logs every resampling
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    reference = lines_of(args.data / f"test2016.{TASKS[args.task]['flags'][3]}")
    usual = {k: str(TASKS[args.task][k]) for k in ("updates", "experts")}
    seen: dict[str, dict[str, list[str]]] = {}
    with (args.csv.parent / "gates.csv").open() as f:
        mine = [r for r in csv.DictReader(f) if r["task"] == args.task and not r["label"]]
    rows = [r for r in mine if r["gate"] in NAMES]
    for row in rows:
        name = f"{args.task}-{row['gate']}-plain-{row['updates']}-{row['experts']}"
        path = args.out / f"{name}-seed{row['seed']}" / "test.hyp"
        if not (row["bleu"] and row.items() >= usual.items()):
            continue
        if not path.is_file():
            print("left out because its translation is missing:", path)
            continue
        found = text_files.read(path)
        if abs(BLEU().corpus_score(found, [reference]).score - float(row["bleu"])) > 0.006:
            sys.exit(f"{path} does not score {row['bleu']}: it is from another run; train again")
        seen.setdefault(row["gate"], {})[row["seed"]] = found
    out = []
    for baseline in args.against:
        for gate, by_seed in seen.items():
            for seed in sorted(set(by_seed) & set(seen.get(baseline, {}))):
                if gate == baseline or (gate in args.against and baseline != args.against[0]):
                    continue
                bleu = compare(by_seed[seed], seen[baseline][seed], reference)["BLEU"]
                row = {"task": args.task, "gate": gate, "against": baseline, "seed": seed}
                row |= {"bleu_difference": round(bleu["this"] - bleu["baseline"], 2)}
                row |= {"p": round(bleu["p"], 4), "updates": usual["updates"]}
                out.append(row | {"resamples": RESAMPLES} | machine())
                print(row, flush=True)
    new = [{k: r[k] for k in FIELDS} for r in out]
    name = lambda r: tuple(str(r[k]) for k in ("task", "gate", "against", "seed", "updates"))
    done = {name(r) for r in new}
    old = []
    if args.csv.exists():
        with args.csv.open() as f:
            old = [r for r in csv.DictReader(f) if name(r) not in done]
        args.csv.unlink()
    append(args.csv, FIELDS, old + new)


if __name__ == "__main__":
    main()
