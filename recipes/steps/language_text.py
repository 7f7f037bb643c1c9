"""Learn a sentencepiece model and split running text into pieces, for language models.

    python recipes/steps/language_text.py --out text --vocab 32000 --train wiki.train.raw \\
        --valid wiki.valid.raw --test wiki.test.raw

Each set may consist of several files, or of members of an archive, written "file.zip!member". Each
line is a paragraph. Empty lines separate documents and are kept. counts.json has the numbers of
words and pieces of each set. From these the perplexity per word, 2^(bits per piece x pieces /
words), is computed, by which models with different pieces can be compared.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import corpus
import text_files
import vocabulary


def paragraphs(files: Sequence[str], flag: str) -> Iterator[str]:
    """Yield the normalised lines of all files that an option named, one file after another."""
    for where in files:
        yield from map(text_files.normalise, text_files.lines(where, flag))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--sample", type=int, default=2_000_000, help="paragraphs to learn from")
    for split in ("train", "valid", "test"):
        parser.add_argument(f"--{split}", nargs="+", required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    processor = vocabulary.learn(
        args.out,
        corpus.progress(paragraphs(args.train, "--train"), "learning"),
        size=args.vocab,
        sample=args.sample,
        byte_fallback=True,
        longest=2**16,
    )
    counts = {}
    for split in ("train", "valid", "test"):
        words = pieces = 0
        with text_files.writing(args.out / split) as (f,):
            for text in corpus.progress(paragraphs(getattr(args, split), f"--{split}"), split):
                row = processor.encode(text, out_type=str)
                # + 1 for the end of the line, which fairseq scores and which is usually counted
                words += len(text.split()) + 1
                pieces += len(row) + 1
                f.write(" ".join(row) + "\n")
        counts[split] = {"words": words, "pieces": pieces}
        print(f"{split}: {words:,} words, {pieces:,} pieces")
    text_files.write(args.out / "counts.json", json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
