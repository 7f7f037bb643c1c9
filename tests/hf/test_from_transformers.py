"""`evomoe-upcycle --from-hf`: dense GPT-2 and Marian models become mixtures of experts."""

import fairseq_evomoe.hf  # noqa: F401  # before transformers; see there

# isort: split

import pytest
import torch
from conftest import run, tool
from fairseq import checkpoint_utils
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    PreTrainedTokenizerFast,
)

WORDS = ("</s>", "<unk>", *(f"w{i}" for i in range(20)), "<pad>")
GPT2 = {"vocab_size": 23, "n_positions": 12, "n_embd": 16, "n_layer": 2, "n_head": 2}
MARIAN = {
    **{"vocab_size": 23, "max_position_embeddings": 12, "d_model": 16, "encoder_layers": 2},
    **{"decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 22},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 22},
    **{"eos_token_id": 0, "activation_function": "relu", "scale_embedding": True},
}


def save(model, folder, words=WORDS):
    """A model with random weights and a tokenizer, as transformers saves them."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    model.eval().save_pretrained(folder)
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return model


def convert(folder, out, *flags, ok=True):
    """Run the command; return what it says."""
    paths = ("--data", out / "data", "--dense", out / "dense.pt", "--output", out / "moe.pt")
    experts = ("--moe-expert-count", 4, "--moe-gate", "dts", "--evo-diversify", "copy")
    return run(tool("evomoe-upcycle"), folder, "--from-hf", *paths, *experts, *flags, ok=ok)


def load(path):
    """fairseq's model of a checkpoint, and its task."""
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model.eval(), task


def ids_of(dictionary, rows):
    """The ids in fairseq of words given by their numbers in transformers."""
    return torch.tensor([[dictionary.index(WORDS[i]) for i in row] for row in rows])


@torch.no_grad()
def test_a_gpt2_gives_the_same_logits_and_grows_experts(tmp_path):
    """Word by word, before and after the split; the result trains on."""
    gpt2 = save(GPT2LMHeadModel(GPT2Config(**GPT2)), tmp_path / "gpt2")
    said = convert(tmp_path / "gpt2", tmp_path)
    assert "continue training" in said
    rows = [[0, 5, 6, 7, 21], [0, 3, 4, 2, 9]]
    want = gpt2(torch.tensor(rows)).logits
    for name in ("dense.pt", "moe.pt"):
        model, task = load(tmp_path / name)
        columns = torch.tensor([task.dictionary.index(w) for w in WORDS])
        have = model(ids_of(task.dictionary, rows))[0][..., columns]
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    assert any("moe_layer.experts" in n for n, _ in model.named_parameters())


@torch.no_grad()
def test_a_marian_gives_the_same_logits_and_grows_experts(tmp_path):
    """On padded sources, from its own start of the decoder."""
    marian = save(MarianMTModel(MarianConfig(**MARIAN)), tmp_path / "marian")
    convert(tmp_path / "marian", tmp_path, "--source-lang", "en", "--target-lang", "de")
    source, target = [[5, 6, 7, 0], [9, 0, 22, 22]], [[22, 8, 3], [22, 4, 11]]
    given = torch.tensor(source)
    want = marian(
        input_ids=given,
        attention_mask=given.ne(22).long(),
        decoder_input_ids=torch.tensor(target),
    ).logits
    for name in ("dense.pt", "moe.pt"):
        model, task = load(tmp_path / name)
        words = task.source_dictionary
        read = ids_of(words, source)
        begun = ids_of(words, target)
        begun[:, 0] = words.eos()
        have = model(read, read.ne(words.pad()).sum(1), begun)[0]
        columns = torch.tensor([words.index(w) for w in WORDS])
        torch.testing.assert_close(have[..., columns], want, rtol=1e-4, atol=1e-4)


def test_what_does_not_map_is_refused_by_name(tmp_path):
    """Another architecture, a setting that fairseq lacks, a bias, missing flags and files."""
    pair = ("--source-lang", "en", "--target-lang", "de")
    bart = BartConfig(vocab_size=23, d_model=16, encoder_layers=1, decoder_layers=1)
    save(BartForConditionalGeneration(bart), tmp_path / "bart")
    save(
        GPT2LMHeadModel(GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)), tmp_path / "odd"
    )
    save(MarianMTModel(MarianConfig(**{**MARIAN, "activation_function": "swish"})), tmp_path / "sw")
    biased = MarianMTModel(MarianConfig(**MARIAN))
    biased.final_logits_bias.add_(1)
    save(biased, tmp_path / "biased")
    for folder, flags, message in (
        ("bart", pair, "model_type 'bart'"),
        ("odd", (), "scale_attn_by_inverse_layer_idx True"),
        ("sw", pair, "activation_function 'swish'"),
        ("biased", pair, "final_logits_bias"),
        ("biased", (), "--source-lang"),
        ("nothing", (), "--from-hf"),
    ):
        out = tmp_path / f"out-{folder}"
        out.mkdir(exist_ok=True)
        said = convert(tmp_path / folder, out, *flags, ok=False)
        assert message in said, said
        assert not list(out.iterdir())
    alone = (tmp_path / "x.pt", "--output", tmp_path / "y.pt", "--dense", tmp_path / "z.pt")
    assert "--dense: has no effect" in run(tool("evomoe-upcycle"), *alone, ok=False)
    convert(tmp_path / "biased", tmp_path, *pair, "--drop-logits-bias")
    with pytest.raises(AssertionError, match="exists"):
        convert(tmp_path / "biased", tmp_path, *pair, "--drop-logits-bias")
