"""Step 2: convert archives to plain text, one sentence per line: train, valid, each test set.

    python recipes/steps/extract.py recipes/wmt14_en_de/corpus.toml --archives archives --out text

The script reads plain and compressed text, members of archives, SGML and XML test sets, and IWSLT's
tagged talks. Nothing is unpacked to disk. Both sides must have the same number of lines. If
the published number is known, they must have that number; --any-lines turns this check off. Plain
files SPLIT.LANG in --mirror are preferred to archives.
"""

import argparse
import html
import re
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import corpus
import text_files

SEGMENT = re.compile(r"<seg[^>]*>(.*?)</seg>", re.DOTALL)


def lines(where: str) -> Iterator[str | None]:
    """Yield the sentences of one file without markup, and None for a line that is not UTF-8."""
    if where.endswith((".sgm", ".xml")):
        for found in SEGMENT.finditer(text_files.whole(where)):
            yield " ".join(html.unescape(found[1]).split())
        return
    tagged = "train.tags" in where
    for line in text_files.decodable_lines(where):
        # skip the tagged lines, which hold a talk's URL, title and keywords
        if not (tagged and line is not None and line.startswith("<")):
            yield line


def from_sacrebleu(name: str, source: str, target: str) -> tuple[list[str], list[str]]:
    """Return the sides of a test set of sacreBLEU, which downloads it at the first use."""
    from sacrebleu.utils import get_reference_files, get_source_file

    pair = f"{source}-{target}"
    sides = get_source_file(name, pair), get_reference_files(name, pair)[0]
    return text_files.read(sides[0]), text_files.read(sides[1])


ENDED = "\n"
"""Stands for each line that the shorter side lacks. No real line holds a line feed."""


def pairs(part: corpus.Part, spec: corpus.Corpus, archives: Path) -> Iterator[tuple]:
    """Yield (source, target) lines of a part: None if undecodable, ENDED after a side's end."""
    if part.source[0].startswith("sacrebleu:"):
        name = part.source[0].removeprefix("sacrebleu:")
        sides: Any = from_sacrebleu(name, spec.source, spec.target)
    else:
        sides = [
            (line for where in side for line in lines(str(archives / where)))
            for side in (part.source, part.target)
        ]
    yield from zip_longest(*sides, fillvalue=ENDED)


def undecodable(part: corpus.Part, side: int, number: int) -> NoReturn:
    """Stop at a line that is not UTF-8 text."""
    files = (part.source, part.target)[side]
    text_files.stop(
        f"{', '.join(files)}, line {number:,},",
        "",
        "is not UTF-8 text; convert the file (iconv -f latin1 -t utf-8), or add "
        "--drop-broken-lines to leave out such pairs",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--archives", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--mirror", type=Path, help="folder that may have plain SPLIT.LANG files")
    parser.add_argument("--tests", default="", help="test sets in --mirror to take instead")
    parser.add_argument("--any-lines", action="store_true", help="do not check numbers of lines")
    parser.add_argument(
        "--drop-broken-lines",
        action="store_true",
        help="leave out training pairs with a line that is not UTF-8 text, and count them",
    )
    args = parser.parse_args()
    spec = corpus.read(args.corpus, tests=args.tests)
    languages = spec.source, spec.target
    args.out.mkdir(parents=True, exist_ok=True)
    for split, parts in spec.split().items():
        paths = [args.out / f"{split}.{lang}" for lang in languages]
        if all(p.exists() for p in paths):
            continue
        plain = (
            [text_files.existing(args.mirror.absolute() / p.name) for p in paths]
            if args.mirror
            else []
        )
        if plain and all(Path(p).exists() for p in plain):
            sides = [[p] for p in plain]
            parts = [corpus.Part(*sides, split)]
        with text_files.writing(*paths) as files:
            for part in parts:
                count = broken = 0
                rows = corpus.progress(pairs(part, spec, args.archives), split, part.lines or None)
                for pair in rows:
                    count += 1
                    if ENDED in pair:
                        longer = languages[pair.index(ENDED) ^ 1]
                        sys.exit(f"{part.source}: the {longer} side has more lines than the other")
                    if None in pair:
                        broken += 1
                        if not args.drop_broken_lines or split != "train":
                            undecodable(part, pair.index(None), count)
                        continue
                    for f, text in zip(files, pair, strict=True):
                        f.write(text.replace("\n", " ") + "\n")
                if part.lines and count != part.lines and not args.any_lines:
                    sys.exit(
                        f"{part.source[0]}: {count:,} lines instead of {part.lines:,}; if that is "
                        "intended, add --any-lines"
                    )
                left_out = f", {broken:,} of them left out: not UTF-8" if broken else ""
                print(f"{split}: {count:,} pairs from {part.source[0]}{left_out}")


if __name__ == "__main__":
    main()
