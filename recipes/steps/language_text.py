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
import sentencepiece as spm
from clean import normalise
from extract import lines


def paragraphs(files: Sequence[str]) -> Iterator[str]:
    """Yield the normalised lines of all files, one file after another."""
    for where in files:
        yield from map(normalise, lines(where, Path(".")))


def learn(out: Path, files: Sequence[str], vocab: int, sample: int) -> spm.SentencePieceProcessor:
    """Return the sentencepiece model, which is learned on `files` unless it exists already."""
    model = out / "spm.model"
    if not model.exists():
        spm.SentencePieceTrainer.train(
            sentence_iterator=(p for p in corpus.progress(paragraphs(files), "learning") if p),
            model_prefix=str(out / "partial"),
            vocab_size=vocab,
            character_coverage=1.0,
            byte_fallback=True,
            input_sentence_size=sample,
            shuffle_input_sentence=True,
            max_sentence_length=2**16,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (out / "partial.vocab").replace(out / "spm.vocab")
        (out / "partial.model").replace(model)
    return spm.SentencePieceProcessor(model_file=str(model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab", type=int, required=True)
    parser.add_argument("--sample", type=int, default=2_000_000, help="paragraphs to learn from")
    for split in ("train", "valid", "test"):
        parser.add_argument(f"--{split}", nargs="+", required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    processor = learn(args.out, args.train, args.vocab, args.sample)
    counts = {}
    for split in ("train", "valid", "test"):
        words = pieces = 0
        with corpus.in_place_of(args.out / split) as (f,):
            for text in corpus.progress(paragraphs(getattr(args, split)), split):
                row = processor.encode(text, out_type=str)
                # + 1 for the end of the line, which fairseq scores and which is usually counted
                words += len(text.split()) + 1
                pieces += len(row) + 1
                f.write(" ".join(row) + "\n")
        counts[split] = {"words": words, "pieces": pieces}
        print(f"{split}: {words:,} words, {pieces:,} pieces")
    (args.out / "counts.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
