"""Every way to store a model, in every precision, through every entrance of the hub interface."""

import math

import pytest
import sentencepiece as spm
import torch
from conftest import train, train_args

from fairseq_evomoe.memory.layer import MemoryLayer
from fairseq_evomoe.models.roberta_evomoe import RobertaEvoMoEModel
from fairseq_evomoe.models.transformer_evomoe import TransformerEvoMoEModel
from fairseq_evomoe.models.transformer_lm_evomoe import TransformerLMEvoMoEModel
from fairseq_evomoe.tools import export

CLASSES = {
    "translation": TransformerEvoMoEModel,
    "lm": TransformerLMEvoMoEModel,
    "mlm": RobertaEvoMoEModel,
}
MEMORY = ("--memory-ffn", "--memory-attention", "--memory-bits", 4)
KINDS = {
    # experts, look-up layers and memory attention in one model
    "hybrid": (*MEMORY, "--moe-freq", 2, "--moe-gate", "switch"),
    "memoryformer": (*MEMORY, "--moe-freq", 0, "--memory-score", "l1"),
}
FORMATS = ("trained", "bf16", "int8")
PRECISIONS = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module", params=[(f, k) for f in CLASSES for k in KINDS], ids="-".join)
def folder(request, toy, tmp_path_factory):
    """(family, kind, folder with a checkpoint in each format, folder of its dictionaries)."""
    family, kind = request.param
    made = tmp_path_factory.mktemp(f"formats-{family}")
    train(*train_args(toy, made, *KINDS[kind], "--max-update", 3, family=family))
    spm.SentencePieceTrainer.train(
        input=str(toy / "train.en"), model_prefix=str(made / "spm"), vocab_size=200, minloglevel=2
    )
    for tables in ("bf16", "int8"):
        source, target = made / "checkpoint_last.pt", made / f"{tables}.pt"
        export.main([str(source), "--tables", tables, "--output", str(target)])
    (made / "checkpoint_last.pt").rename(made / "trained.pt")
    return family, kind, made, toy / ("bin" if family == "translation" else "mono")


def loaded(folder, tables, precision):
    """The hub model of a checkpoint, in evaluation."""
    family, _, made, data = folder
    pieces = {"bpe": "sentencepiece", "sentencepiece_model": str(made / "spm.model")}
    hub = CLASSES[family].from_pretrained(
        str(made), f"{tables}.pt", str(data), **(pieces if family == "mlm" else {})
    )
    return hub.eval().to(PRECISIONS[precision])


def plain(found):
    """What an entrance returned as a flat list of numbers and strings."""
    if isinstance(found, torch.Tensor):
        return found.detach().float().flatten().tolist()
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return [x for v in found for x in plain(v)]
    return [] if found is None else [found]


def entrances(family, hub, sentence):
    """Name -> function without arguments, for each entrance that the family's hub model has."""
    if family == "mlm":
        ids = torch.tensor(
            [0, *hub.task.source_dictionary.encode_line(sentence, add_if_not_exist=False).tolist()]
        )
        head = f"head{len(hub.model.classification_heads)}"
        hub.register_classification_head(head, num_classes=3)
        hub.model.classification_heads[head].to(next(hub.model.parameters()).dtype)
        return {
            "extract_features": lambda: hub.extract_features(ids),
            "all layers": lambda: hub.extract_features(ids, return_all_hiddens=True),
            "fill_mask": lambda: hub.fill_mask(f"{sentence} <mask>", topk=3),
            "predict": lambda: hub.predict(head, ids),
            "forward": lambda: hub.model(ids[None], features_only=False)[0],
        }
    return {
        "translate": lambda: hub.translate([sentence], beam=2, max_len_b=8),
        "sample": lambda: hub.sample([sentence], beam=1, sampling=True, max_len_b=8),
        "generate": lambda: hub.generate([hub.encode(sentence)], beam=2, max_len_b=8)[0][0][
            "score"
        ],
        # fairseq's hub interface scores sentences of language models only
        **({"score": lambda: hub.score([sentence])} if family == "lm" else {}),
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tables", FORMATS)
def test_every_entrance(folder, toy, tables, precision):
    """With gradients on and off the results are finite and the same; nothing is nan or refused."""
    family, hub = folder[0], loaded(folder, tables, precision)
    sentence = (toy / "valid.en").read_text(encoding="utf-8").split("\n")[0]
    for name, call in entrances(family, hub, sentence).items():
        results = []
        for grad in (True, False):
            torch.manual_seed(4)
            with torch.set_grad_enabled(grad):
                results.append(call())
        one, other = map(plain, results)
        assert one == other and len(one) > 0, name
        assert all(isinstance(x, str) or math.isfinite(x) for x in one), name


@pytest.mark.parametrize("tables", FORMATS)
def test_precisions_agree(folder, tables):
    """A look-up reads the same rows in each precision: no scale of a row is lost or misread.

    Single look-ups are compared, since a rounding before a hash may fetch another row.
    """
    layers = {
        name: [m for m in loaded(folder, tables, name).modules() if isinstance(m, MemoryLayer)]
        for name in PRECISIONS
    }
    assert layers["float"]
    for one, half, bfloat in zip(*layers.values(), strict=True):
        x = torch.randn(7, one.rule.width).bfloat16().clamp(-2, 2)
        want = one(x.float())
        assert want.abs().max() > 0
        for layer, dtype, error in ((half, torch.float16, 2e-3), (bfloat, torch.bfloat16, 2e-2)):
            found = layer(x.to(dtype))
            assert found.dtype == dtype
            assert (found.float() - want).norm() <= error * want.norm()
