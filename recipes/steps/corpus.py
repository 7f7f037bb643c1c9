"""Reads and checks `corpus.toml` of a recipe, which says what its corpus consists of.

    eval "$(python recipes/steps/corpus.py recipes/wmt14_en_de/corpus.toml)"

sets the variables that a shell recipe needs of it. --tests and --vocab replace what the file says.
"""

import argparse
import shlex
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import text_files
from tqdm import tqdm


@dataclass(frozen=True)
class Part:
    """Parallel text.

    Attributes:
        source, target: files or archive members of each side.
        name: name of the split.
        lines: number of lines, or 0 if it is not known.
    """

    source: list[str]
    target: list[str]
    name: str = "train"
    lines: int = 0


@dataclass(frozen=True)
class Corpus:
    """A recipe's corpus; see recipes/wmt14_en_de/corpus.toml."""

    source: str
    target: str
    vocab: int
    train: list[Part]
    test: list[Part]
    valid: Part | None = None
    files: dict[str, str] = field(default_factory=dict)
    byte_fallback: bool = False
    max_ratio: float = 3.0
    max_length: int = 250
    filter_languages: bool = False
    hold_out_every: int = 0

    def split(self) -> dict[str, list[Part]]:
        """Map the name of each split, which is also that of its files, to its parts."""
        splits = {"train": self.train}
        if self.valid is not None:
            splits["valid"] = [self.valid]
        return splits | {part.name: [part] for part in self.test}


def files(path: Path) -> dict[str, str]:
    """Return the names and URLs of the files that a corpus is downloaded from."""
    try:
        return tomllib.loads(text_files.whole(path))["files"]
    except (KeyError, tomllib.TOMLDecodeError) as error:
        sys.exit(f"{path}: {error}")


def _part(entry: dict[str, Any]) -> Part:
    listed = lambda value: [value] if isinstance(value, str) else list(value)
    source = listed(entry["source"])
    return Part(
        source,
        listed(entry.get("target", source)),
        entry.get("name", "train"),
        entry.get("lines", 0),
    )


def read(path: Path, *, tests: str = "", vocab: int | None = None) -> Corpus:
    """Read the corpus that a file describes.

    Args:
        path: the file.
        tests: names of other test sets, separated by commas; each is two plain files NAME.LANG.
        vocab: another number of pieces.

    Raises:
        SystemExit: the file cannot be read, or an entry is missing or unknown.
    """
    try:
        table = tomllib.loads(text_files.whole(path))
        table["train"] = [_part(p) for p in table["train"]]
        table["test"] = [_part(p) for p in table["test"]]
        if "valid" in table:
            table["valid"] = _part(table["valid"])
        if tests:
            sides = table["source"], table["target"]
            table["test"] = [Part(*([f"{n}.{x}"] for x in sides), n) for n in tests.split(",")]
        if vocab is not None:
            table["vocab"] = vocab
        corpus = Corpus(**table)
    except (KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        sys.exit(f"{path}: {error}")
    if (corpus.valid is None) == (corpus.hold_out_every == 0):
        sys.exit(f"{path}: give either [valid] or hold_out_every")
    return corpus


def progress(rows: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """Iterate over the rows; on a terminal, a progress bar shows speed and remaining time."""
    return tqdm(rows, what, total, unit=" lines", unit_scale=True, disable=None)


def shell_variables(corpus: Corpus) -> str:
    """What a shell recipe needs of a corpus, as assignments."""
    lists = {
        "tests": [part.name for part in corpus.test],
        # what a folder given with --data may hold
        "inputs": [
            *corpus.files,
            *(f"{x}.{y}" for x in corpus.split() for y in (corpus.source, corpus.target)),
        ],
        "clean_flags": ["--filter-languages"] if corpus.filter_languages else [],
        "piece_flags": [
            *(["--byte-fallback"] if corpus.byte_fallback else []),
            *("--max-ratio", str(corpus.max_ratio), "--max-length", str(corpus.max_length)),
        ],
    }
    values = {
        "src": corpus.source,
        "tgt": corpus.target,
        "vocab": str(corpus.vocab),
        "hold_out": str(corpus.hold_out_every),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    return "\n".join([*lines, *(f"{name}=({shlex.join(v)})" for name, v in lists.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--tests", default="", help="names of other test sets, with commas between")
    parser.add_argument("--vocab", type=int, help="another number of pieces")
    args = parser.parse_args()
    print(shell_variables(read(args.corpus, tests=args.tests, vocab=args.vocab)))


if __name__ == "__main__":
    main()
