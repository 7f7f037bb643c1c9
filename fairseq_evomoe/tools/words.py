"""Pieces of words put together, as people read them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fairseq_evomoe.compat.words import join_bytes

START, GOES_ON = "▁", "@@"
"""sentencepiece's mark of a piece that begins a word, and subword-nmt's of one that does not end
it."""


def spelling(pieces: Sequence[str]) -> str:
    """The text of one or more pieces of a word, without marks."""
    text = join_bytes(" ".join(pieces)).replace(" ", "").replace(START, "")
    return text.removesuffix(GOES_ON).replace(GOES_ON, "") or "␣"


def starts_of(pieces: Sequence[str], special: Sequence[bool]) -> list[bool]:
    """Whether a word, or a symbol that belongs to no word, begins with each piece of a sentence."""
    marked = any(p.startswith(START) for p in pieces)
    return [
        not i
        or special[i]
        or special[i - 1]
        or (piece.startswith(START) if marked else not pieces[i - 1].endswith(GOES_ON))
        for i, piece in enumerate(pieces)
    ]


def symbols_of(dictionary: Any) -> set[int]:
    """Ids of the symbols that belong to no word."""
    return {dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk()}


def words_of(pieces: Sequence[str], special: Sequence[bool]) -> list[str]:
    """The word that each piece of a sentence belongs to, one per piece.

    Args:
        pieces: of one sentence.
        special: which of them are symbols that belong to no word, such as the end of the sentence.
    """
    groups: list[list[int]] = []
    for i, starts in enumerate(starts_of(pieces, special)):
        if starts:
            groups.append([])
        groups[-1].append(i)
    found = [""] * len(pieces)
    for group in groups:
        mine = [pieces[i] for i in group]
        word = mine[0] if special[group[0]] else spelling(mine)
        for i in group:
            found[i] = word
    return found


def words_of_ids(ids: Tensor, dictionary: Any) -> list[list[str]]:
    """The same for the token ids of a batch, (B, L) int64: a list of L words for each sentence."""
    symbols = symbols_of(dictionary)
    return [
        words_of([dictionary[i] for i in row], [i in symbols for i in row]) for row in ids.tolist()
    ]
