"""Step 4: learn a sentencepiece model on the training pairs and split every set into its pieces.

    python recipes/steps/pieces.py --source-lang en --target-lang de --vocab 32000 --out pieces \\
        --train text/clean --valid text/newstest2013 --test text/newstest2014

Training pairs are dropped and counted if a side has too many pieces, or if the numbers of pieces of
the two sides differ too much. Valid and test sets keep all their lines: one that is longer than the
model's positions stops the step, or is cut with --long-lines cut.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import text_files
import vocabulary
from clean import Pair, read_pairs

BATCH = 10000


def batches(rows: Iterable[Pair]) -> Iterator[list[Pair]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH)):
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source-lang", required=True)
    parser.add_argument("--target-lang", required=True)
    parser.add_argument(
        "--vocab", type=int, required=True, help="number of pieces, shared by both languages"
    )
    parser.add_argument(
        "--byte-fallback", action="store_true", help="encode unknown characters as bytes"
    )
    parser.add_argument("--sample", type=int, default=4_000_000, help="sentences to learn from")
    parser.add_argument(
        "--max-length", type=int, default=250, help="maximum pieces per side of a training pair"
    )
    parser.add_argument(
        "--max-pieces", type=int, default=1023, help="pieces per line that the model can take"
    )
    parser.add_argument(
        "--long-lines",
        choices=("stop", "cut"),
        default="stop",
        help="what to do with longer lines of the valid and test sets",
    )
    parser.add_argument(
        "--max-ratio",
        type=float,
        default=3.0,
        help="maximum ratio between the lengths of the two sides of a training pair",
    )
    parser.add_argument("--train", required=True, help="path without the language suffix")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    args = parser.parse_args()
    languages = args.source_lang, args.target_lang
    args.out.mkdir(parents=True, exist_ok=True)

    processor = vocabulary.learn(
        args.out,
        (line for pair in read_pairs(args.train, *languages, "--train") for line in pair),
        size=args.vocab,
        sample=args.sample,
        byte_fallback=args.byte_fallback,
    )

    dropped: Counter = Counter()

    def fits(source: list[str], target: list[str]) -> bool:
        short, long = sorted((len(source), len(target)))
        if long > min(args.max_length, args.max_pieces):
            dropped["too long"] += 1
        elif long > args.max_ratio * short:
            dropped["length ratio"] += 1
        else:
            return True
        return False

    def cut(split: str, side: int, row: list[str]) -> list[str]:
        """The line as the model can take it; lines that are too long are cut or refused."""
        if len(row) <= args.max_pieces:
            return row
        if args.long_lines == "stop":
            name = f"{splits[split]}.{languages[side]}"
            text_files.stop(
                f"{name}, line {kept + 1:,},",
                f"--{split.rstrip('0123456789')}",
                f"has {len(row):,} pieces but the model takes {args.max_pieces:,}; shorten the "
                "line, raise --max-source-positions, --max-target-positions or --max-tokens, or "
                "give --long-lines cut, which keeps the beginning of such lines",
            )
        dropped[f"cut in {split}"] += 1
        return row[: args.max_pieces]

    splits = {"train": args.train, "valid": args.valid}
    splits |= {f"test{i}": prefix for i, prefix in enumerate(args.test)}
    # the sets that must be whole come first, so that a line that does not fit is found at once
    for split in (*(s for s in splits if s != "train"), "train"):
        kept = 0
        paths = (args.out / f"{split}.{language}" for language in languages)
        with text_files.writing(*paths) as files:
            for batch in batches(read_pairs(splits[split], *languages, f"--{split}")):
                sides = [
                    processor.encode(list(side), out_type=str) for side in zip(*batch, strict=True)
                ]
                for pair in zip(*sides, strict=True):
                    if split == "train" and not fits(*pair):
                        continue
                    rows = (cut(split, side, row) for side, row in enumerate(pair))
                    for f, row in zip(files, rows, strict=True):
                        f.write(" ".join(row) + "\n")
                    kept += 1
    reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items()) or "nothing"
    print(f"pieces: {kept:,} training pairs; dropped: {reasons}")


if __name__ == "__main__":
    main()
