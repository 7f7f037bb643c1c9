"""Keep a record of what the results in a work folder were made from, and refuse to mix.

    python recipes/steps/made_from.py --work W --part data --results W/text W/bin \\
        --files train.en=DIR/train.en --values vocab=1000 --versions sentencepiece

Each part of a recipe (its data, each model, each model's translations) calls this before it does
anything. W/made_from.json then has the values, the sha256 of the files, and the versions of the
packages. If the part has been made from something else, the script prints what differs and exits
with 2; with --remake it deletes the part's --results instead, so that they are made again. Other
versions of packages are reported and do not stop the recipe.
"""

import argparse
import hashlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import text_files

RECORD = "made_from.json"
Row = dict[str, Any]


def fingerprint(path: Path, known: Row | None) -> Row:
    """Return the size, time of change and sha256 of a file; `known` is an earlier result.

    The file is read only if its size or its time of change is not that of `known`.
    """
    if not path.is_file():
        return {"sha256": "no such file"}
    status = path.stat()
    state = {"bytes": status.st_size, "changed": status.st_mtime_ns, "path": str(path.absolute())}
    if known and known.items() >= state.items():
        return known
    with path.open("rb") as f:
        return {**state, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def differences(old: Row, new: Row) -> list[str]:
    """Describe in a line each what two records of a part disagree on, apart from versions."""
    found = []
    for name in dict.fromkeys((*old["values"], *new["values"])):
        before, now = (row["values"].get(name, "not given") for row in (old, new))
        if before != now:
            found.append(f"{name}: {before or 'none'} -> {now or 'none'}")
    for name in dict.fromkeys((*old["files"], *new["files"])):
        before, now = (row["files"].get(name, {}).get("sha256", "none") for row in (old, new))
        if before != now:
            found.append(f"{name}: other contents (sha256 {before[:12]} -> {now[:12]})")
    return found


def pairs_of(words: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def flags_of(words: list[str]) -> dict[str, str]:
    """Parse flags of a command to {flag: its values}; of a flag given twice, the last counts."""
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = f"{found.get(name, '')} {word}".strip()
    return {flag: value or "on" for flag, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", required=True)
    parser.add_argument("--values", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--files", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--versions", nargs="*", default=[], metavar="PACKAGE")
    parser.add_argument("--results", nargs="*", type=Path, default=[], help="what depends on it")
    parser.add_argument("--remake", action="store_true")
    parser.add_argument(
        "--flags", nargs=argparse.REMAINDER, default=[], help="flags of a command; comes last"
    )
    args = parser.parse_args()
    path = args.work / RECORD
    record = json.loads(text_files.whole(path)) if path.exists() else {}
    old = record.get(args.part)
    known = old["files"] if old else {}
    files = pairs_of(args.files)
    new: Row = {
        "values": {**pairs_of(args.values), **flags_of(args.flags)},
        "files": {n: fingerprint(Path(p), known.get(n)) for n, p in sorted(files.items())},
        "versions": {p: version(p) for p in args.versions},
    }
    there = [p for p in args.results if p.exists()]
    if old is None:
        changed = ["nothing is known of how its results were made"] if there else []
    else:
        changed = differences(old, new)
        for package, now in new["versions"].items():
            before = old["versions"].get(package, now)
            if before != now:
                print(f"{args.part}: made with {package} {before}; this is {now}", file=sys.stderr)
    if changed and there and not args.remake:
        sys.exit(
            f"{args.work} was made from something else ({args.part}):\n"
            + "".join(f"  {line}\n" for line in changed)
            + "Choose another folder with --out, or give --remake, which deletes there:\n"
            + "".join(f"  {p}\n" for p in there)
        )
    if changed:
        for result in there:
            print(f"--remake: deletes {result}")
            if result.is_dir():
                shutil.rmtree(result)
            else:
                result.unlink()
    if changed or old is None or new["files"] != old["files"]:
        versions = new["versions"] if changed or old is None else old["versions"]
        record[args.part] = {**new, "versions": versions}
        text_files.write(path, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            sys.exit(2)
        raise
