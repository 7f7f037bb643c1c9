"""What a corpus consists of: `corpus.toml` of a recipe, read and checked."""

import sys
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Part:
    """Parallel text. `source`, `target`: where each side is; `lines`: how many, 0 if not known."""

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
        """Name of each split, as its files are called -> its parts."""
        splits = {"train": self.train}
        if self.valid is not None:
            splits["valid"] = [self.valid]
        return splits | {part.name: [part] for part in self.test}


def files(path: Path) -> dict[str, str]:
    """Names and addresses of what a corpus is downloaded from."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))["files"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
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


def read(path: Path) -> Corpus:
    """The corpus that a file describes.

    Raises:
        SystemExit: something in it is missing or unknown.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        table["train"] = [_part(p) for p in table["train"]]
        table["test"] = [_part(p) for p in table["test"]]
        if "valid" in table:
            table["valid"] = _part(table["valid"])
        corpus = Corpus(**table)
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        sys.exit(f"{path}: {error}")
    if (corpus.valid is None) == (corpus.hold_out_every == 0):
        sys.exit(f"{path}: give either [valid] or hold_out_every")
    return corpus


@contextmanager
def in_place_of(*paths: Path) -> Iterator[list[Any]]:
    """Text files to write, which get their names when all of them are whole."""
    partial = [p.with_name(p.name + ".partial") for p in paths]
    files = [p.open("w", encoding="utf-8") for p in partial]
    try:
        yield files
    except BaseException:
        for f, p in zip(files, partial, strict=True):
            f.close()
            p.unlink()
        raise
    for f, p, path in zip(files, partial, paths, strict=True):
        f.close()
        p.replace(path)


def progress(rows: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
    """The rows, with a bar that shows speed and time left; on a terminal only."""
    return tqdm(rows, what, total, unit=" lines", unit_scale=True, disable=None)
