"""Step 2: convert archives to plain text, one sentence per line: train, valid, each test set.

    python recipes/steps/extract.py recipes/wmt14_en_de/corpus.toml --archives archives --out text

The script reads members of .tgz, .tar and .zip archives, .gz files, SGML and XML test sets, and
IWSLT's tagged talks. Nothing is unpacked to disk. Both sides must have the same number of lines. If
the published number is known, they must have that number; --any-lines turns this check off. Plain
files SPLIT.LANG in --mirror are preferred to archives.
"""

import argparse
import gzip
import html
import io
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import IO

import corpus

SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>", re.DOTALL)


@contextmanager
def opened(where: str, archives: Path) -> Iterator[IO[bytes]]:
    """Open `file` or `file!member` as a decompressed binary stream."""
    name, _, member = where.partition("!")
    with ExitStack() as stack:
        if member and name.endswith(".zip"):
            zipped = stack.enter_context(zipfile.ZipFile(archives / name))
            raw = stack.enter_context(zipped.open(member))
        elif member:
            archive = stack.enter_context(tarfile.open(archives / name))
            raw = archive.extractfile(member)
            if raw is None:
                raise KeyError(f"{member} is not a file")
        else:
            raw = stack.enter_context((archives / name).open("rb"))
        if where.endswith(".gz"):
            raw = stack.enter_context(gzip.open(raw))
        yield raw


def lines(where: str, archives: Path) -> Iterator[str]:
    """Yield the sentences of one file without markup."""
    with opened(where, archives) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", errors="replace", newline="\n")
        if where.endswith((".sgm", ".xml")):
            for found in SEGMENT.finditer(text.read()):
                yield " ".join(html.unescape(found[1]).split())
            return
        tagged = "train.tags" in where
        for line in text:
            # skip the tagged lines, which hold a talk's URL, title and keywords
            if not (tagged and line.startswith("<")):
                yield line.rstrip("\r\n")


def from_sacrebleu(name: str, source: str, target: str) -> tuple[list[str], list[str]]:
    """Return the sides of a test set of sacreBLEU, which downloads it at the first use."""
    from sacrebleu.utils import get_reference_files, get_source_file

    pair = f"{source}-{target}"
    sides = get_source_file(name, pair), get_reference_files(name, pair)[0]
    read = [Path(p).read_text(encoding="utf-8").split("\n") for p in sides]
    return tuple(rows[:-1] if rows[-1] == "" else rows for rows in read)


def pairs(part: corpus.Part, spec: corpus.Corpus, archives: Path) -> Iterator[tuple]:
    """Yield (source, target) lines of a part, with None for a side that has ended early."""
    if part.source[0].startswith("sacrebleu:"):
        name = part.source[0].removeprefix("sacrebleu:")
        yield from zip_longest(*from_sacrebleu(name, spec.source, spec.target))
        return
    sides = [
        (line for where in side for line in lines(where, archives))
        for side in (part.source, part.target)
    ]
    yield from zip_longest(*sides)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--archives", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mirror", type=Path, help="folder that may have plain SPLIT.LANG files")
    parser.add_argument("--any-lines", action="store_true", help="do not check numbers of lines")
    args = parser.parse_args()
    spec = corpus.read(args.corpus)
    languages = spec.source, spec.target
    args.out.mkdir(parents=True, exist_ok=True)
    for split, parts in spec.split().items():
        paths = [args.out / f"{split}.{lang}" for lang in languages]
        if all(p.exists() for p in paths):
            continue
        plain = [args.mirror / p.name for p in paths] if args.mirror else []
        if plain and all(p.exists() for p in plain):
            sides = [[str(p.absolute())] for p in plain]
            parts = [corpus.Part(*sides, split)]
        with corpus.in_place_of(*paths) as files:
            for part in parts:
                count = 0
                rows = corpus.progress(pairs(part, spec, args.archives), split, part.lines or None)
                try:
                    for pair in rows:
                        if None in pair:
                            longer = languages[pair.index(None) ^ 1]
                            sys.exit(
                                f"{part.source}: the {longer} side has more lines than the other"
                            )
                        for f, text in zip(files, pair, strict=True):
                            f.write(text.replace("\n", " ") + "\n")
                        count += 1
                except (OSError, KeyError, tarfile.TarError, EOFError) as error:
                    sys.exit(f"{split}, {part.source}: {error}")
                if part.lines and count != part.lines and not args.any_lines:
                    sys.exit(
                        f"{part.source[0]}: {count:,} lines instead of {part.lines:,}; if that is "
                        "intended, add --any-lines"
                    )
                print(f"{split}: {count:,} pairs from {part.source[0]}")


if __name__ == "__main__":
    main()
