"""Running text -> sentencepiece model and pieces, for causal and masked language models.

    python recipes/language_text.py --out text --vocab 32000 --train wiki.train.raw \\
        --valid wiki.valid.raw --test wiki.test.raw

Each may be several files, or members of an archive as "file.zip!member". A line is a paragraph;
empty lines part documents and stay. counts.json has the words and pieces of each set: perplexity a
word is 2^(bits a piece x pieces / words), which models with other pieces can be compared by.
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
    """Normalised lines of all files, one after another."""
    for where in files:
        yield from map(normalise, lines(where, Path(".")))


def learn(out: Path, files: Sequence[str], vocab: int, sample: int) -> spm.SentencePieceProcessor:
    """The model, learned on the training text unless it is there."""
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
                # every line has its end, as fairseq scores it and as the customary counts have it
                words += len(text.split()) + 1
                pieces += len(row) + 1
                f.write(" ".join(row) + "\n")
        counts[split] = {"words": words, "pieces": pieces}
        print(f"{split}: {words:,} words, {pieces:,} pieces")
    (args.out / "counts.json").write_text(json.dumps(counts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
