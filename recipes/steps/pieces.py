"""Step 4: learn a sentencepiece model on the training pairs and split every set into its pieces.

    python recipes/steps/pieces.py --source-lang en --target-lang de --vocab 32000 --out pieces \\
        --train text/clean --valid text/newstest2013 --test text/newstest2014

Training pairs are dropped and counted if a side has too many pieces, or if the numbers of pieces of
the two sides differ too much. Valid and test sets keep all their lines.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import corpus
import sentencepiece as spm
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

    model = args.out / "spm.model"
    if not model.exists():
        spm.SentencePieceTrainer.train(
            sentence_iterator=(
                line for pair in read_pairs(args.train, *languages) for line in pair
            ),
            model_prefix=str(args.out / "partial"),
            vocab_size=args.vocab,
            character_coverage=1.0,
            byte_fallback=args.byte_fallback,
            input_sentence_size=args.sample,
            shuffle_input_sentence=True,
            # a small corpus may yield fewer pieces than --vocab
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (args.out / "partial.vocab").replace(args.out / "spm.vocab")
        (args.out / "partial.model").replace(model)
    processor = spm.SentencePieceProcessor(model_file=str(model))

    dropped: Counter = Counter()

    def fits(source: list[str], target: list[str]) -> bool:
        short, long = sorted((len(source), len(target)))
        if long > args.max_length:
            dropped["too long"] += 1
        elif long > args.max_ratio * short:
            dropped["length ratio"] += 1
        else:
            return True
        return False

    splits = {"train": args.train, "valid": args.valid}
    splits |= {f"test{i}": prefix for i, prefix in enumerate(args.test)}
    for split, prefix in splits.items():
        kept = 0
        with corpus.in_place_of(*(args.out / f"{split}.{lang}" for lang in languages)) as files:
            for batch in batches(read_pairs(prefix, *languages)):
                sides = [
                    processor.encode(list(side), out_type=str) for side in zip(*batch, strict=True)
                ]
                for pair in zip(*sides, strict=True):
                    if split == "train" and not fits(*pair):
                        continue
                    kept += 1
                    for f, row in zip(files, pair, strict=True):
                        f.write(" ".join(row) + "\n")
        if split == "train":
            reasons = ", ".join(f"{n:,} {why}" for why, n in dropped.items()) or "nothing"
            print(f"pieces: {kept:,} training pairs; dropped: {reasons}")


if __name__ == "__main__":
    main()
