"""What fairseq needs to put words together from pieces, and to score large vocabularies."""

import re
from typing import Any

from fairseq.data import data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax
from torch import Tensor

from fairseq_evomoe.compat.patching import patch

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A piece by which sentencepiece spells one byte of a character outside its vocabulary."""


def join_bytes(pieces: str) -> str:
    """Return pieces, separated by spaces, with each run of bytes replaced by its characters.

    Bytes that are not UTF-8 become U+FFFD, as in sentencepiece's own decoder.
    """
    found: list[str] = []
    run = bytearray()
    for piece in [*pieces.split(" "), ""]:
        if byte := BYTE.fullmatch(piece):
            run.append(int(byte[1], 16))
            continue
        if run:
            found.append(run.decode("utf-8", errors="replace"))
            run.clear()
        found.append(piece)
    return " ".join(found[:-1])


@patch(data_utils, "post_process", test="tests/test_compat.py")
def spell_bytes_of_pieces(original: Any) -> Any:
    """Turn sentencepiece's byte pieces into the characters that they spell.

    fairseq's `--remove-bpe sentencepiece` puts pieces together by replacing strings, and leaves
    "<0xF0><0x9F>" in the text.
    """

    def post_process(sentence: str, symbol: str) -> str:
        joined = join_bytes(sentence) if symbol == "sentencepiece" else sentence
        return original(joined, symbol)

    return post_process


@patch(SentencepieceBPE, "decode", test="tests/test_compat.py")
def spell_bytes_in_hub_models(original: Any) -> Any:
    """Do the same where a model decodes by itself, in fairseq-interactive and the hub interface."""

    def decode(self: Any, x: str) -> str:
        return original(self, join_bytes(x))

    return decode


@patch(AdaptiveSoftmax, "get_log_prob", test="tests/test_compat.py")
def keep_adaptive_softmax_differentiable(original: Any) -> Any:
    """Let models with `--adaptive-softmax-cutoff` train with any criterion.

    fairseq's function adds to the output of a log-softmax in place, which torch refuses in the
    backward pass.
    """

    def get_log_prob(self: Any, input: Tensor, target: Tensor | None) -> Tensor:
        rows, length, width = input.size()
        states = input.reshape(-1, width)
        head = self.lsm(self.head(states))
        first = self.cutoff[0]
        chosen: Any = [slice(None)] * len(self.tail)
        if target is not None:
            _, chosen = self.adapt_target(target)
        log_probs = head.new_zeros(len(states), self.vocab_size)
        # columns of tails that no row needs keep the probability of the tail, as in fairseq
        log_probs[:, : first + len(self.tail)] = head
        for i, at in enumerate(chosen):
            if at is None:
                continue
            prior = head[at, first + i].unsqueeze(-1)
            tail = self.lsm(self.tail[i](states[at])) + prior
            log_probs[at, self.cutoff[i] : self.cutoff[i + 1]] = tail
        return log_probs.view(rows, length, -1)

    return get_log_prob
