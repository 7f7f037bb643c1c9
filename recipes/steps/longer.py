"""Let a training go on from a shorter one of the same model instead of from the start.

    python recipes/steps/longer.py --work W --runs "evomoe-small-{}-seed1" --updates 4000 flags
    python recipes/steps/longer.py --work W --runs "evomoe-small-{}-seed1" --updates 4000 copy

Among the folders W/evomoe-small-<updates>-seed1 it takes the longest training of fewer updates.
`flags` prints the flags that keep the evolution's schedule as it was there. `copy` copies its
checkpoints and its log to the folder of the new one, unless that has begun; fairseq-train goes on
from them.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import text_files

RECORD = "goes_on_from.json"


def schedule_flags(runs: str, updates: int) -> list[str]:
    """Flags for what follows the number of updates by default, as a run of `updates` has it."""
    model = runs.split("{}")[0]
    if "evomoe-" in model:
        flags = {"--evo-spawn-update": updates // 20, "--dts-anneal-updates": updates // 10}
    else:
        flags = {"--stable-freeze-update": updates // 10} if "stable-" in model else {}
    return [word for flag, value in flags.items() for word in (flag, str(value))]


def shorter(work: Path, runs: str, updates: int) -> int:
    """The largest number of updates below `updates` of which there is a checkpoint.

    Raises:
        SystemExit: there is none.
    """
    name = re.compile(re.escape(runs).replace(r"\{\}", r"(\d+)"))
    folders = sorted(work.iterdir()) if work.exists() else []
    found = [(int(match[1]), f) for f in folders if (match := name.fullmatch(f.name))]
    usable = [n for n, f in found if n < updates and (f / "checkpoint_last.pt").exists()]
    if not usable:
        sys.exit(
            f"--resume: {work} has no {runs.format('<fewer updates>')}/checkpoint_last.pt to go on "
            "from; leave --resume out, or give the folder with --out"
        )
    return max(usable)


def record(folder: Path) -> dict[str, list[str]]:
    """What is known of the training that the one in `folder` goes on from."""
    path = folder / RECORD
    return json.loads(text_files.whole(path)) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--runs", required=True, help="name of the runs, with {} for the updates")
    parser.add_argument("--updates", type=int, required=True, help="of the new training")
    parser.add_argument("what", choices=("flags", "copy"))
    args = parser.parse_args()
    new = args.work / args.runs.format(args.updates)
    known = record(new)
    if known or (new / "checkpoint_last.pt").exists():
        # it has begun: from another training, or, without a record, from the start
        flags, old = known.get("flags", []), None
    else:
        updates = shorter(args.work, args.runs, args.updates)
        old = args.work / args.runs.format(updates)
        flags = record(old).get("flags", schedule_flags(args.runs, updates))
    if args.what == "flags":
        print(*flags)
    elif old is not None:
        new.mkdir(parents=True, exist_ok=True)
        text_files.write(new / RECORD, json.dumps({"from": old.name, "flags": flags}) + "\n")
        # fairseq writes a best checkpoint only if it is better than the best so far
        for name in ("train.log", "checkpoint_best.pt", "checkpoint_last.pt"):
            if (old / name).exists():
                partial = new / f"{name}.partial"
                shutil.copyfile(old / name, partial)
                partial.replace(new / name)
        print(f"goes on from {old}")


if __name__ == "__main__":
    main()
