"""How the recipes learn a sentencepiece model."""

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece as spm


def learn(
    out: Path,
    text: Iterable[str],
    *,
    size: int,
    sample: int,
    byte_fallback: bool,
    longest: int = 4192,
) -> spm.SentencePieceProcessor:
    """Return the model `out`/spm.model, which is learned on `text` unless it exists already.

    The text is expected to be normalised (text_files.normalise). The model applies plain NFKC to
    what it is given later; sentencepiece's default would turn the joiners of Persian into spaces.

    Args:
        text: lines; empty ones are left out.
        size: number of pieces (--vocab); a small text may yield fewer.
        sample: number of lines to learn from, drawn at random.
        byte_fallback: whether characters outside the vocabulary are spelled as bytes.
        longest: lines with more bytes than this are not learned from.

    Raises:
        SystemExit: the text is empty, or `size` is too small for its characters.
    """
    model = out / "spm.model"
    if not model.exists():
        seen = 0

        def counted() -> Iterator[str]:
            nonlocal seen
            for line in text:
                if line:
                    seen += 1
                    yield line

        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=counted(),
                model_prefix=str(out / "partial"),
                vocab_size=size,
                character_coverage=1.0,
                byte_fallback=byte_fallback,
                normalization_rule_name="nfkc",
                input_sentence_size=sample,
                shuffle_input_sentence=True,
                max_sentence_length=longest,
                hard_vocab_limit=False,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            if not seen:
                sys.exit(
                    "--train: the text has empty lines only, so there is nothing to learn from"
                )
            if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
                of_bytes = ", 256 of them for bytes" if byte_fallback else ""
                sys.exit(
                    f"--vocab {size} is too small: the characters of this text need at least "
                    f"{needed[1]} pieces{of_bytes}"
                )
            sys.exit(f"--vocab {size}: sentencepiece cannot learn from this text: {error}")
        (out / "partial.vocab").replace(out / "spm.vocab")
        (out / "partial.model").replace(model)
    return spm.SentencePieceProcessor(model_file=str(model))
