"""A tokenizer for transformers from a sentencepiece model and a dictionary of fairseq.

The tokenizer is a fast one, in one JSON file, and gives the ids of the dictionary. sentencepiece
may know pieces that the dictionary lacks, because they never came up in the training text. They get
ids behind the dictionary's, which the models read as `<unk>`, as fairseq does.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import sentencepiece as spm
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SpmConverter

TEMPLATES = {
    "evomoe_translation": "$A {eos}",
    "evomoe_lm": "{eos} $A",
    "evomoe_mlm": "{bos} $A {eos}",
}
"""Model type -> what surrounds a text, as fairseq's tasks have it."""

PAIRS = {
    "evomoe_translation": "$B {eos}",
    "evomoe_lm": "{eos} $B",
    "evomoe_mlm": "{eos} $B {eos}",
}
"""What follows for a second text."""

MASK = "<mask>"


def read_pieces(path: Path) -> Any:
    """Read a sentencepiece model.

    Raises:
        ValueError: the file is not one.
    """
    sentencepiece_model_pb2: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
        spm.SentencePieceProcessor(model_file=str(path))
    except Exception as error:
        # protobuf and sentencepiece have errors of their own
        raise ValueError(f"--sentencepiece {path}: not a sentencepiece model ({error})") from error
    return proto


def build(dictionary: Any, pieces: Path | None, model_type: str, positions: int) -> Any:
    """Build the tokenizer.

    Args:
        dictionary: fairseq's, of the texts that are tokenized.
        pieces: the sentencepiece model that split the training text, or None if its words were
            separated by spaces already.
        model_type: of the configuration.
        positions: number of positions that the model knows.

    Raises:
        ValueError: the dictionary does not belong to the sentencepiece model.
    """
    symbols = list(dictionary.symbols)
    if pieces is None:
        tokenizer = Tokenizer(
            models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=dictionary.unk_word)
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = _of_pieces(read_pieces(pieces), dictionary, pieces)
    special = {"bos": dictionary.bos_word, "eos": dictionary.eos_word}
    template = TEMPLATES[model_type].format(**special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template,
        # two texts have two separators between them, as in fairseq's RoBERTa
        pair=f"{template} {PAIRS[model_type].format(**special)}",
        special_tokens=[(word, dictionary.index(word)) for word in special.values()],
    )
    more = {}
    if model_type == "evomoe_mlm":
        if MASK not in dictionary.indices:
            raise ValueError(f"--data: the dictionary has no {MASK}; it is not that of a masked LM")
        more["mask_token"] = AddedToken(MASK, lstrip=True, special=True, normalized=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=dictionary.bos_word,
        eos_token=dictionary.eos_word,
        unk_token=dictionary.unk_word,
        pad_token=dictionary.pad_word,
        # new words are written behind the last
        padding_side="left" if model_type == "evomoe_lm" else "right",
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
        **more,
    )


def _of_pieces(proto: Any, dictionary: Any, path: Path) -> Tokenizer:
    """transformers' own conversion of a sentencepiece model, with the dictionary's ids."""
    kinds = {p.piece: p.type for p in proto.pieces}
    scores = {p.piece: p.score for p in proto.pieces}
    symbols = list(dictionary.symbols)
    shared = sum(kinds.get(s) in (1, 4, 6) for s in symbols)
    if shared < len(symbols) / 2:
        raise ValueError(
            f"--sentencepiece {path}: only {shared} of the {len(symbols)} words of the dictionary "
            "are pieces of it, so the training text was not split by this model"
        )
    bpe = proto.trainer_spec.model_type == 2
    pairs = [(p.piece, p.score) for p in proto.pieces]
    vocabulary = {p.piece: i for i, p in enumerate(proto.pieces)} if bpe else pairs
    converted = SpmConverter.build_tokenizer_from_spm_proto(proto, vocabulary)
    described = json.loads(converted.to_str())
    symbols += [p for p, kind in kinds.items() if p not in dictionary.indices and kind in (1, 4, 6)]
    if bpe:
        described["model"]["vocab"] = {s: i for i, s in enumerate(symbols)}
    else:
        # a word that sentencepiece lacks is never better than its pieces
        lowest = min(score for piece, score in scores.items() if kinds[piece] == 1)
        rows = [[s, scores.get(s, lowest)] for s in symbols]
        described["model"].update(vocab=rows, unk_id=dictionary.unk())
    described["model"].update({"unk_token": dictionary.unk_word} if bpe else {})
    return Tokenizer.from_str(json.dumps(described))
