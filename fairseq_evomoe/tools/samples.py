"""Sentences of a data set with the experts that each of their pieces went to."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.dataclass.configs import GenerationConfig
from torch import Tensor

from fairseq_evomoe.compat.words import BYTE
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import RoutingPlan, TokenBatch
from fairseq_evomoe.tools.specialists import dictionary_of, experts_of_tokens
from fairseq_evomoe.tools.words import spelling, starts_of, symbols_of

LONGEST = 120
"""Number of tokens after which a shown text is cut."""


@dataclass(frozen=True)
class Piece:
    """A token in one layer.

    Attributes:
        text: as people read it, without marks.
        starts: whether a word begins with it.
        experts: (expert, weight) of its active experts, the largest weight first.
    """

    text: str
    starts: bool
    experts: list[tuple[int, float]]


@dataclass
class Sample:
    """One sentence.

    Attributes:
        texts: what it is -> text, for example "source", "translation", "reference".
        layers: layer -> the pieces that it routed.
    """

    texts: dict[str, str]
    layers: dict[str, list[Piece]] = field(default_factory=dict)


def text_of(ids: Tensor, dictionary: Dictionary) -> str:
    """The text of token ids, with pieces put together."""
    marks = any("▁" in dictionary[i] for i in ids.tolist())
    return dictionary.string(ids, "sentencepiece" if marks else "subword_nmt")


def _pieces(plan: RoutingPlan, tokens: TokenBatch, dictionary: Dictionary) -> list[Piece]:
    ids = tokens.token.tolist()
    names = [dictionary[i] for i in ids]
    symbols = symbols_of(dictionary)
    special = [i in symbols for i in ids]
    return [
        # a byte alone has no character
        Piece(name if alone or BYTE.fullmatch(name) else spelling([name]), starts, experts)
        for name, alone, starts, experts in zip(
            *(names, special, starts_of(names, special), experts_of_tokens(plan)), strict=True
        )
    ]


def _inputs(model: Any, task: Any, batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What to run the model on for one sentence, and the texts to show with it."""
    net_input = dict(batch["net_input"])
    if "prev_output_tokens" not in net_input:
        dictionary = dictionary_of(task, "encoder" if hasattr(model, "encoder") else "decoder")
        net_input["src_tokens"] = net_input["src_tokens"][:, :LONGEST]
        return net_input, {"text": text_of(net_input["src_tokens"][0], dictionary)}
    generator = task.build_generator([model], GenerationConfig(beam=4))
    hypothesis = task.inference_step(generator, [model], batch)[0][0]["tokens"][:LONGEST]
    end = hypothesis.new_tensor([task.target_dictionary.eos()])
    net_input["prev_output_tokens"] = torch.cat([end, hypothesis[:-1]])[None]
    return net_input, {
        "source": text_of(net_input["src_tokens"][0], task.source_dictionary),
        "translation": text_of(hypothesis, task.target_dictionary),
        "reference": text_of(
            utils.strip_pad(batch["target"][0], task.target_dictionary.pad()),
            task.target_dictionary,
        ),
    }


@torch.no_grad()
def samples(model: Any, task: Any, *, subset: str, count: int) -> Iterator[Sample]:
    """Yield `count` sentences, spread evenly over a data set, with the experts of their pieces.

    A translation model translates them by a beam of 4; the decoder's pieces are those that it reads
    while it writes its translation.
    """
    model.eval()
    layers = [layer for _, layer in moe_layers(model)]
    data = task.dataset(subset)
    plans: dict[str, tuple[RoutingPlan, TokenBatch]] = {}

    def keep(name: str) -> Any:
        return lambda gate, args, plan: plans.update({name: (plan, args[2])})

    for i in range(min(count, len(data))):
        batch = data.collater([data[i * len(data) // count]])
        net_input, texts = _inputs(model, task, batch)
        hooks = [layer.gate.register_forward_hook(keep(layer.name)) for layer in layers]
        try:
            plans.clear()
            model(**net_input)
        finally:
            for hook in hooks:
                hook.remove()
        if plans:
            yield Sample(
                texts,
                {name: _pieces(*seen, dictionary_of(task, name)) for name, seen in plans.items()},
            )
