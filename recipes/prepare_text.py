"""Plain parallel text -> sentencepiece model and pieces, ready for fairseq-preprocess.

Training pairs are cleaned, and every count is printed; valid and test sets are kept line for line.

    python prepare_text.py --out pieces --source-lang en --target-lang de --vocab 4000 \\
        --train data/train --valid data/valid --test data/test2016 data/test2017
"""

import argparse
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import sentencepiece as spm


def read_pairs(prefix: str, source: str, target: str) -> list[tuple[str, str]]:
    """Lines of `prefix.source` and `prefix.target`, normalised (NFKC, single spaces).

    Raises:
        SystemExit: a file is missing, or the two differ in length.
    """
    sides = []
    for lang in (source, target):
        path = Path(f"{prefix}.{lang}")
        if not path.is_file():
            sys.exit(f"no such file: {path}")
        lines = path.read_text(encoding="utf-8").split("\n")
        if lines[-1] == "":
            lines.pop()
        sides.append([" ".join(unicodedata.normalize("NFKC", line).split()) for line in lines])
    if len(sides[0]) != len(sides[1]):
        sys.exit(f"{prefix}: {len(sides[0])} {source} lines but {len(sides[1])} {target} lines")
    return list(zip(*sides, strict=True))


def clean(
    pairs: list[tuple[str, str]], tests: list[tuple[str, str]]
) -> tuple[list[tuple[str, str]], Counter]:
    """Drop pairs that are empty, repeated, untranslated or in a test set; count each reason."""
    held_out, seen, kept, dropped = set(tests), set(), [], Counter()
    for pair in pairs:
        if not pair[0] or not pair[1]:
            dropped["empty"] += 1
        elif pair in held_out:
            dropped["in a test set"] += 1
        elif pair in seen:
            dropped["repeated"] += 1
        elif pair[0] == pair[1] and len(pair[0].split()) > 3:
            dropped["source equals target"] += 1
        else:
            seen.add(pair)
            kept.append(pair)
    return kept, dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source-lang", required=True)
    parser.add_argument("--target-lang", required=True)
    parser.add_argument("--vocab", type=int, required=True, help="pieces, shared by both languages")
    parser.add_argument("--max-length", type=int, default=250, help="pieces a side, training only")
    parser.add_argument(
        "--max-ratio", type=float, default=3.0, help="between the sides, training only"
    )
    parser.add_argument("--train", required=True, help="path without the language suffix")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--test", nargs="+", required=True)
    args = parser.parse_args()
    languages = args.source_lang, args.target_lang

    train = read_pairs(args.train, *languages)
    valid = read_pairs(args.valid, *languages)
    tests = [read_pairs(t, *languages) for t in args.test]
    kept, dropped = clean(train, [p for t in tests for p in t])

    args.out.mkdir(parents=True, exist_ok=True)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for pair in kept for line in pair]),
        model_prefix=str(args.out / "spm"),
        vocab_size=args.vocab,
        character_coverage=1.0,
        # a small corpus may not hold as many pieces as asked for
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = spm.SentencePieceProcessor(model_file=str(args.out / "spm.model"))

    def encode(pairs: list[tuple[str, str]]) -> list[tuple[list[str], list[str]]]:
        return [tuple(processor.encode(side, out_type=str) for side in p) for p in pairs]

    pieces = []
    for source, target in encode(kept):
        short, long = sorted((len(source), len(target)))
        if long > args.max_length:
            dropped["too long"] += 1
        elif long > args.max_ratio * short:
            dropped["length ratio"] += 1
        else:
            pieces.append((source, target))
    reasons = ", ".join(f"{n} {why}" for why, n in dropped.items()) or "nothing"
    print(f"train: {len(train)} pairs read, {len(pieces)} kept; dropped: {reasons}")

    splits = {"train": pieces, "valid": encode(valid)}
    splits |= {f"test{i}": encode(t) for i, t in enumerate(tests)}
    for split, rows in splits.items():
        for side, lang in enumerate(languages):
            text = "".join(" ".join(row[side]) + "\n" for row in rows)
            (args.out / f"{split}.{lang}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
