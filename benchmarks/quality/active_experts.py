"""What does the number of active experts of a DTS gate depend on?

    python -m benchmarks.quality.gates --task lm --data DIR --gates evomoe_words --seeds 1 \\
        --label adaptive --keep -- --dts-hard-update 0
    python -m benchmarks.quality.active_experts --task lm --data DIR --label adaptive --seed 1

A model that keeps its threshold to the end (no hard stage) is run over its validation set. Each MoE
layer gives one row for all tokens, one row per class of word frequency, and one row per class of
place in the sentence (in the causal LM, place in the block of 128 pieces).
"""

import argparse
import sys
from pathlib import Path

from benchmarks import RESULTS, ROOT
from benchmarks.quality.tasks import TASKS, prepare
from benchmarks.speed.timing import append, machine
from fairseq_evomoe.tools import checkpoint
from fairseq_evomoe.tools.specialists import activity, watch

FIELDS = (
    "task gate label seed updates layer by class tokens active_experts threads device torch date"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gate", default="evomoe_words")
    parser.add_argument("--label", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "work/gates")
    parser.add_argument("--csv", type=Path, default=RESULTS / "active_experts.csv")
    args = parser.parse_args()
    folder = prepare(args.task, args.data, args.out)
    updates = args.updates or TASKS[args.task]["updates"]
    experts = args.experts or TASKS[args.task]["experts"]
    name = f"{args.task}-{args.gate}-{args.label or 'plain'}-{updates}-{experts}-seed{args.seed}"
    path = args.out / name / "checkpoint_last.pt"
    if not path.is_file():
        sys.exit(f"no such file: {path}; train the model with gates.py --keep (see --help)")
    model, _, task = checkpoint.build(path, str(folder / "bin"))
    task.load_dataset("valid")
    run = {
        "task": args.task,
        "gate": args.gate,
        "label": args.label,
        "seed": args.seed,
        "updates": updates,
    }
    rows = []
    for layer, seen in watch(model, task, subset="valid", max_tokens=4096).items():
        found = activity(seen)
        common = run | {"layer": layer} | machine()
        total = sum(n for _, n, _ in found.by_frequency)
        classes = [("all", "", total, found.mean)]
        classes += [("frequency", f"{n} words", t, mean) for n, t, mean in found.by_frequency]
        classes += [("place", f"{a}-{b}", t, mean) for a, b, t, mean in found.by_place]
        for by, kind, tokens, mean in classes:
            row = {"by": by, "class": kind, "tokens": tokens, "active_experts": round(mean, 3)}
            rows.append(common | row)
            print(layer, *row.values())
    append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
