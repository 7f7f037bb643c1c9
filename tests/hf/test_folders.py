"""`evomoe-export --format hf` and `nllb-moe`: folders, tokenizers, generation, the way back."""

import fairseq_evomoe.hf  # noqa: F401  # before transformers; see there

# isort: split

import json
import re
import shutil
import sys

import pytest
import sentencepiece as spm
import torch
from conftest import USER_DIR, run, tool, train, train_args
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from fairseq_evomoe.tools import export
from fairseq_evomoe.tools.to_hf import nllb, tokenizer

FLAGS = {
    "translation": ("--evo-spawn-update", 10, "--dts-anneal-updates", 60, "--lr", 0.01),
    "lm": ("--moe-gate", "switch", "--moe-freq", 1),
    "mlm": ("--moe-gate", "stable", "--stable-freeze-update", 10),
}
UPDATES = {"translation": 120, "lm": 20, "mlm": 20}


@pytest.fixture(scope="module")
def checkpoints(toy, tmp_path_factory):
    """A trained checkpoint of each family."""
    folder = tmp_path_factory.mktemp("hf")
    for family, flags in FLAGS.items():
        limit = ("--max-update", UPDATES[family])
        train(*train_args(toy, folder / family, *limit, *flags, family=family))
    return {family: folder / family / "checkpoint_last.pt" for family in FLAGS}


@pytest.fixture(scope="module")
def folders(checkpoints, tmp_path_factory):
    """Their exported folders, with code, in files of at most 100 kB."""
    out = tmp_path_factory.mktemp("exported")
    for family, path in checkpoints.items():
        sizes = ("--shard-size", "100KB", "--beam", "4", "--scores", "BLEU on toy: 1.0")
        export.main(
            [str(path), "--output", str(out / family), "--format", "hf", *sizes, "--with-code"]
        )
    return out


def test_a_folder_holds_what_is_promised(folders):
    """Sharded weights, configuration, tokenizer, code, card with the facts of the training."""
    names = {p.name for p in (folders / "translation").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "fairseq.json"} <= names
    assert {"modeling_evomoe.py", "model.safetensors.index.json"} <= names
    card = (folders / "translation/README.md").read_text()
    for fact in ("updates: 120", "gate dts, hard stage", "BLEU on toy: 1.0", "language: [en, de]"):
        assert fact in card
    described = json.loads((folders / "translation/config.json").read_text())
    assert described["moe"]["stage"] == 2 and described["architectures"] == [
        "EvoMoEForConditionalGeneration"
    ]


ALONE = """
import sys
sys.modules["fairseq"] = None  # any import of it fails
sys.modules["torchaudio"] = None
import torch
{imports}
from transformers import {auto} as Auto, AutoTokenizer
model, about = Auto.from_pretrained({folder!r}, output_loading_info=True{trust})
assert not any(about.values()), about
ids = torch.tensor([[2, 9, 8, 7, 2], [2, 6, 2, 1, 1]])
target = torch.tensor([[2, 5, 6], [2, 7, 8]])
more = dict(decoder_input_ids=target) if "Seq2Seq" in {auto!r} else dict()
torch.save(model(input_ids=ids, **more).logits, {out!r})
tokenizer = AutoTokenizer.from_pretrained({folder!r}{trust})
# saved and loaded once more, and generation, by the same code
model.save_pretrained({out!r} + "-again")
again = Auto.from_pretrained({out!r} + "-again"{trust})
pairs = zip(again.parameters(), model.parameters(), strict=True)
assert all(torch.equal(a, b) for a, b in pairs)
# products round as the alignment of weights in a file has it
one, two = (m(input_ids=ids, **more).logits for m in (again, model))
assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)
if hasattr(again, "lm_head") and "Masked" not in {auto!r}:
    assert again.generate(ids[:, :3], max_new_tokens=3).size(1) > 1
print(type(model).__module__, tokenizer("the dog").input_ids)
"""


@pytest.mark.parametrize("family", FLAGS)
@pytest.mark.parametrize("with_code", [True, False], ids=["with code", "with the package"])
def test_it_loads_where_there_is_no_fairseq(family, with_code, folders, checkpoints, tmp_path):
    """In another process and folder; the logits are those of fairseq's model."""
    auto = {"translation": "AutoModelForSeq2SeqLM", "lm": "AutoModelForCausalLM"}
    folder = tmp_path / "moved"
    shutil.copytree(folders / family, folder)
    if not with_code:
        for path in folder.glob("*_evomoe.py"):
            path.unlink()
        described = json.loads((folder / "config.json").read_text())
        del described["auto_map"]
        (folder / "config.json").write_text(json.dumps(described))
    code = ALONE.format(
        imports="" if with_code else "import fairseq_evomoe.hf",
        auto=auto.get(family, "AutoModelForMaskedLM"),
        trust=", trust_remote_code=True" if with_code else "",
        folder=str(folder),
        out=str(tmp_path / "logits.pt"),
    )
    path = {"PYTHONPATH": str(USER_DIR.parent)} if not with_code else {}
    said = run(sys.executable, "-c", code, cwd=tmp_path, env={"HF_HOME": str(tmp_path), **path})
    assert ("transformers_modules" in said) == with_code
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoints[family])])
    model.eval()
    ids = torch.tensor([[2, 9, 8, 7, 2], [2, 6, 2, 1, 1]])
    real = ids.ne(1)
    with torch.no_grad():
        if family == "translation":
            want = model(ids, real.sum(1), torch.tensor([[2, 5, 6], [2, 7, 8]]))[0]
            real = slice(None)
        else:
            want = model(ids)[0]
    have = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(have[real], want[real], rtol=1e-5, atol=1e-5)
    words = task.source_dictionary.encode_line("the dog", append_eos=False, add_if_not_exist=False)
    if family == "mlm" and not with_code:
        pair = AutoTokenizer.from_pretrained(folder)("the", "dog").input_ids
        assert [i for i in pair if i <= 2] == [0, 2, 2, 2]
    around = {"translation": ([], [2]), "lm": ([2], []), "mlm": ([0], [2])}[family]
    assert str([*around[0], *words.tolist(), *around[1]]) in said


@pytest.mark.parametrize("family", FLAGS)
def test_the_way_back_is_exact(family, folders, checkpoints, tmp_path):
    """The checkpoint that a folder becomes has the same tensors, to the bit, and the same flags."""
    back = tmp_path / "back.pt"
    export.main([str(folders / family), "--output", str(back), "--from-hf"])
    before, after = (torch.load(p, weights_only=False) for p in (checkpoints[family], back))
    assert list(before["model"]) == list(after["model"])
    for name, value in before["model"].items():
        assert value.dtype == after["model"][name].dtype
        assert torch.equal(value, after["model"][name]), name
    assert after["cfg"] == before["cfg"]


@pytest.mark.parametrize("kind", ["tables int8", "tables bf16", "experts int8", "half"])
def test_the_way_back_of_small_dtypes_is_exact(kind, toy, tmp_path):
    """Language models, whose flags are a dictionary, with converted and with half weights."""
    flags = ("--moe-freq", 1, "--moe-gate", "switch")
    if "tables" in kind:
        flags = ("--moe-freq", 0, "--memory-ffn", "--memory-attention", "--memory-bits", 4)
        flags = (*flags, "--memory-ngram", 2, "--memory-score", "l1", "--memory-linear")
    train(*train_args(toy, tmp_path, "--max-update", 2, *flags, family="lm"))
    path = tmp_path / "checkpoint_last.pt"
    if kind == "half":
        state = torch.load(path, weights_only=False)
        half = {n: v.half() if v.dtype == torch.float32 else v for n, v in state["model"].items()}
        torch.save({**state, "model": half}, path)
    else:
        what, dtype = kind.split()
        small = tmp_path / "small.pt"
        export.main([str(path), "--output", str(small), f"--{what}", dtype])
        path = small
    export.main([str(path), "--output", str(tmp_path / "out"), "--format", "hf"])
    export.main([str(tmp_path / "out"), "--output", str(tmp_path / "back.pt")])
    before, after = (torch.load(p, weights_only=False) for p in (path, tmp_path / "back.pt"))
    for name, value in before["model"].items():
        assert value.dtype == after["model"][name].dtype, name
        assert torch.equal(value, after["model"][name]), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_translation_is_no_longer_than_the_positions(toy, tmp_path):
    """As in fairseq-generate; a model that cannot end a sentence stops there."""
    flags = ("--decoder-learned-pos", "--max-target-positions", 20, "--max-update", 1)
    train(*train_args(toy, tmp_path, *flags))
    path = tmp_path / "checkpoint_last.pt"
    export.main([str(path), "--output", str(tmp_path / "out"), "--format", "hf"])
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.max_length == 21
    assert model.generate(torch.tensor([[5, 6, 7, 2]])).size(1) <= 21


def test_the_translations_are_those_of_fairseq_generate(folders, checkpoints, toy):
    """With 4 beams, word by word, also for sentences that reach the maximum length."""
    flags = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0", "--beam", "4")
    paths = ("--path", checkpoints["translation"], "-s", "en", "-t", "de")
    said = run(tool("fairseq-generate"), toy / "bin", *flags, *paths)
    found = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", said, re.M))
    model = AutoModelForSeq2SeqLM.from_pretrained(folders / "translation", trust_remote_code=True)
    words = AutoTokenizer.from_pretrained(folders / "translation", trust_remote_code=True)
    lines = (toy / "test.en").read_text().splitlines()
    batch = words(lines, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        made = words.batch_decode(model.generate(**batch), skip_special_tokens=True)
    assert len(found) == 43 and len(set(made)) > 10
    assert made == [found[str(i)] for i in range(len(lines))]
    # the half-trained model cannot end some of them
    assert max(len(line.split()) for line in made) == 200


def test_trainer_goes_on_and_fairseq_takes_over(folders, toy, tmp_path):
    """Trainer lowers the loss with the balance loss in it; LoRA runs; fairseq reads the result."""
    folder = folders / "translation"
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)
    words = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model.config.output_router_logits = True
    lines = [(toy / f"train.{x}").read_text().splitlines()[:64] for x in ("en", "de")]
    rows = [
        {"input_ids": words(s).input_ids, "labels": words(t).input_ids}
        for s, t in zip(*lines, strict=True)
    ]
    collate = DataCollatorForSeq2Seq(words, model)
    batch = collate(rows[:16])
    output = model(**batch)
    assert 0.9 < float(output.decoder_aux_loss) < 4
    without = model(**batch, output_router_logits=False)
    assert without.encoder_router_logits is None and len(output.encoder_router_logits) == 1
    difference = (output.loss - without.loss).item()
    assert difference == pytest.approx(0.01 * float(output.decoder_aux_loss), rel=1e-3)
    arguments = TrainingArguments(
        *(str(tmp_path / "runs"),),
        max_steps=30,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
        gradient_checkpointing=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.05
    trainer.save_model(str(tmp_path / "tuned"))
    with pytest.raises(SystemExit):
        export.main([str(tmp_path / "tuned"), "--output", str(tmp_path / "x.pt"), "--from-hf"])
    for name in ("fairseq.json", "fairseq_rest.safetensors"):
        shutil.copy(folder / name, tmp_path / "tuned")
    export.main([str(tmp_path / "tuned"), "--output", str(tmp_path / "tuned.pt"), "--from-hf"])
    (back,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "tuned.pt")])
    ids = batch["input_ids"]
    with torch.no_grad():
        want = model.eval()(input_ids=ids, decoder_input_ids=ids).logits
        have = back.eval()(ids, ids.ne(1).sum(1), ids)[0]
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-5)
    _lora(model, batch)


def _lora(model, batch):
    from peft import LoraConfig, get_peft_model

    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    tuned(**batch).loss.backward()
    names = [n for n, p in tuned.named_parameters() if p.grad is not None and p.grad.abs().sum()]
    assert names and all("lora_" in n for n in names)


def test_a_language_model_scores_and_continues(folders):
    """The loss is that of the next words; generation of several prompts runs from padded ones."""
    model = AutoModelForCausalLM.from_pretrained(folders / "lm", trust_remote_code=True)
    words = AutoTokenizer.from_pretrained(folders / "lm", trust_remote_code=True)
    batch = words(["the dog", "a"], return_tensors="pt", padding=True, return_token_type_ids=False)
    assert batch.input_ids[1, 0] == 1, "prompts are padded on the left"
    labels = batch.input_ids.masked_fill(batch.input_ids <= 2, -100)
    output = model(**batch, labels=labels)
    p = output.logits.log_softmax(-1)
    real = [p[0, i, batch.input_ids[0, i + 1]] for i in range(2)] + [p[1, 1, batch.input_ids[1, 2]]]
    assert output.loss.item() == pytest.approx(-sum(real).item() / 3, rel=1e-5)
    assert model.generate(**batch, max_new_tokens=4).shape == (2, 7)


def test_a_classifier_goes_there_and_back(checkpoints, toy, tmp_path):
    """A masked LM with a classification head gives the same scores, and a folder of it returns."""
    path = checkpoints["mlm"]
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    model.register_classification_head("topics", num_classes=3)
    state = torch.load(path, weights_only=False)
    state["model"] = model.state_dict()
    # fairseq builds the head again for the task that it was trained in, or if this flag is given
    state["cfg"]["model"].load_checkpoint_heads = True
    torch.save(state, tmp_path / "classifier.pt")
    out = tmp_path / "out"
    export.main([str(tmp_path / "classifier.pt"), "--output", str(out), "--format", "hf"])
    ours = AutoModelForSequenceClassification.from_pretrained(out).eval()
    ids = torch.tensor([[0, 9, 8, 7, 2], [0, 6, 2, 1, 1]])
    with torch.no_grad():
        want = model.eval()(ids, classification_head_name="topics", features_only=True)[0]
        torch.testing.assert_close(ours(input_ids=ids).logits, want, rtol=1e-5, atol=1e-5)
    assert ours(input_ids=ids, labels=torch.tensor([0, 2])).loss > 0
    card = (out / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card and "AutoModelForMaskedLM" not in card


@pytest.mark.parametrize(
    "family, flags, message",
    [
        ("lm", ("--adaptive-softmax-cutoff", "20,40"), "--adaptive-softmax-cutoff"),
        ("translation", ("--cross-self-attention",), "--cross-self-attention"),
    ],
)
def test_what_has_no_counterpart_is_refused(family, flags, message, toy):
    """The message names the flag of the training."""
    from conftest import build

    from fairseq_evomoe.tools.to_hf.describe import describe

    if "--adaptive-softmax-cutoff" in flags:
        flags = (*flags, "--criterion", "adaptive_loss")
    cfg, _, model = build(toy, *flags, "--moe-freq", 0, family=family)
    with pytest.raises(ValueError, match=message):
        describe(model, cfg.model, 0.01)


def test_wrong_calls_are_refused(checkpoints, toy, tmp_path, capsys):
    """A text that is not a sentencepiece model, conversions together, a folder that is not ours."""
    source = str(checkpoints["lm"])
    out = ("--output", str(tmp_path / "out"))
    for arguments, message in (
        ((source, *out, "--format", "hf", "--tables", "int8"), "convert first"),
        (
            (source, *out, "--format", "hf", "--sentencepiece", str(toy / "test.en")),
            "not a sentenc",
        ),
        ((str(toy), *out, "--from-hf"), "fairseq.json"),
        ((source, *out, "--beam", "4"), "--beam: has no effect without --format hf or nllb-moe"),
        ((source, *out, "--format", "nllb-moe", "--with-code"), "--with-code: has no effect"),
        ((str(toy), *out, "--from-hf", "--format", "hf"), "--from-hf"),
        ((source, *out, "--format", "nllb-moe"), "--task"),
        ((source, *out, "--format", "hf", "--beam", "0"), "--beam 0"),
        ((source, *out, "--format", "hf", "--max-len-b", "-5"), "--max-len-b -5"),
        ((source, *out, "--format", "hf", "--shard-size", "abc"), "--shard-size abc"),
    ):
        with pytest.raises(SystemExit):
            export.main(list(arguments))
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def nllb_folder(toy, tmp_path_factory):
    """A pre-norm GShard translation model, and its folder for NllbMoe."""
    folder = tmp_path_factory.mktemp("nllb")
    norm = ("--encoder-normalize-before", "--decoder-normalize-before")
    train(*train_args(toy, folder, "--max-update", 10, "--moe-gate", "gshard", *norm))
    path = folder / "checkpoint_last.pt"
    export.main([str(path), "--output", str(folder / "out"), "--format", "nllb-moe"])
    return path, folder / "out"


def test_nllb_moe_gives_the_same_logits(nllb_folder):
    """transformers' own class, on padded batches, with the experts that its router chose."""
    path, out = nllb_folder
    theirs = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
    assert type(theirs).__name__ == "NllbMoeForConditionalGeneration"
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    ids, target = torch.tensor([[9, 8, 7, 2], [6, 2, 1, 1]]), torch.tensor([[2, 5, 6], [2, 7, 8]])
    with torch.no_grad(), nllb.the_chosen_experts():
        want = model.eval()(ids, ids.ne(1).sum(1), target)[0]
        have = theirs(input_ids=ids, attention_mask=ids.ne(1).long(), decoder_input_ids=target)
    torch.testing.assert_close(have.logits, want, rtol=1e-5, atol=1e-5)
    names = set(load_file(out / "model.safetensors"))
    assert "model.encoder.layers.1.ffn.experts.expert_3.fc2.bias" in names


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_tokenizer_gives_the_ids_of_fairseq(kind, byte_fallback, tmp_path):
    """For unseen text, rare characters and spaces; decoding returns the text."""
    known = ["Der große Hund läuft schnell.", "A dog runs fast; cats sleep 12 hours.", "naïve café"]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(known * 20),
        model_prefix=str(tmp_path / "spm"),
        model_type=kind,
        vocab_size=320 if byte_fallback else 60,
        character_coverage=1.0,
        byte_fallback=byte_fallback,
        normalization_rule_name="nfkc",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "spm.model"))
    words = Dictionary()
    for line in known[:2]:
        for piece in pieces.encode(line, out_type=str):
            words.add_symbol(piece)
    words.finalize(padding_factor=8)
    made = tokenizer.build(words, tmp_path / "spm.model", "evomoe_translation", 100)
    made.save_pretrained(tmp_path / "saved")
    made = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for line in (
        *known,
        "  Hunde   schlafen ",
        "漢字 und ☃",
        "\ufb01ne \uff37ide",
        "dog\tcat",
        "",
        "x" * 40,
    ):
        split = pieces.encode(line, out_type=str)
        want = [words.index(piece) for piece in split] + [words.eos()]
        have = made(line).input_ids
        assert [i if i < len(words) else words.unk() for i in have] == want, line
        if words.unk() not in have:
            assert made.decode(have, skip_special_tokens=True) == pieces.decode(split)


def test_two_languages_can_have_their_own_dictionaries(toy, tmp_path):
    """The target's tokenizer then lies in a folder of its own, and the card names it."""
    texts = [x for s in ("train", "valid", "test") for x in (f"--{s}pref", toy / s)]
    data = tmp_path / "bin"
    pair = ("-s", "en", "-t", "de")
    run(tool("fairseq-preprocess"), *pair, "--workers", "1", "--destdir", data, *texts)
    one, shared = str(toy / "bin"), "--share-all-embeddings"
    args = train_args(toy, tmp_path, "--max-update", 2, "--share-decoder-input-output-embed")
    train(*(str(data) if a == one else a for a in args if a != shared))
    out = tmp_path / "out"
    path = str(tmp_path / "checkpoint_last.pt")
    export.main([path, "--output", str(out), "--format", "hf"])
    words = {x: Dictionary.load(str(data / f"dict.{x}.txt")) for x in ("en", "de")}
    for folder, language in ((out, "en"), (out / "target", "de")):
        made = AutoTokenizer.from_pretrained(folder)
        line = (toy / f"test.{language}").read_text().splitlines()[0]
        want = words[language].encode_line(line, add_if_not_exist=False).tolist()
        assert made(line).input_ids == want and made.model_max_length == 1024
    card = (out / "README.md").read_text()
    assert 'target = AutoTokenizer.from_pretrained(folder + "/target")' in card
    assert "target.batch_decode(" in card
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    assert model.config.vocab_size == len(words["de"]) != len(words["en"])
