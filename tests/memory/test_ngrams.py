"""memory/ngrams.py: rows that are found by the ids of the last tokens."""

import pytest
import torch
from conftest import FAMILIES, USER_DIR, build, run, tool, train, train_args, valid_batch
from fairseq import checkpoint_utils

from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.ngrams import HASHES, NgramTables, hashed
from fairseq_evomoe.tools import export

NGRAM = ("--memory-ngram", 2, "--memory-ngram-rows", 50)


def tables(length=2, rows=100, width=16):
    cfg = MemoryConfig(memory_ngram=length, memory_ngram_rows=rows).check()
    made = NgramTables(width, cfg, pad=1)
    torch.nn.init.normal_(made.tables)
    return made


@pytest.mark.parametrize("length", [2, 3, 4])
def test_rows_by_the_last_tokens_alone(length):
    """A position's rows depend on its last n ids, wherever they stand, and on no other; every hash
    finds another row; all rows are used about equally."""
    ids = torch.randint(4, 5000, (2, 2000))
    found = hashed(ids, length, 1000, 1)
    assert found.shape == (HASHES, 2, 2000) and found.min() >= 0 and found.max() < 1000
    again = hashed(ids[:, 700:900], length, 1000, 1)
    assert torch.equal(again[..., length - 1 :], found[..., 700 + length - 1 : 900])
    other = ids.clone()
    other[:, 500] += 1
    changed = (hashed(other, length, 1000, 1) != found).any(0)
    assert changed[:, 500 : 500 + length].all() and changed.sum() == 2 * length
    for one in range(HASHES):
        assert all((found[one] == found[k]).float().mean() < 0.01 for k in range(one))
        counts = found[one].flatten().bincount(minlength=1000)
        assert counts.max() < 20 and (counts == 0).float().mean() < 0.05
    # the order of the tokens counts
    assert (
        hashed(ids.flip(1), length, 1000, 1).flip(2)[..., 10:] != found[..., 10:]
    ).float().mean() > 0.9


def test_output_and_gradient():
    """Each hash reads its part of the width from its own table; the factor is embeddings' own."""
    made = tables()
    ids = torch.randint(4, 300, (3, 7))
    y = made(ids)
    at = hashed(ids, 2, 100, 1)
    want = torch.cat([made.tables[k][at[k]] for k in range(HASHES)], -1) * 4
    assert torch.allclose(y, want)
    y.sum().backward()
    hits = torch.stack([at[k].flatten().bincount(minlength=100) for k in range(HASHES)])
    assert torch.allclose(made.tables.grad, 4.0 * hits[..., None].expand_as(made.tables))


def test_padding_and_steps():
    """Padding on the left changes nothing, and the last position alone gives what all give."""
    made = tables(3)
    ids = torch.randint(4, 300, (2, 9))
    whole = made(ids)
    padded = torch.cat([torch.ones(2, 4, dtype=torch.int64), ids], 1)
    assert torch.equal(made(padded)[:, 4:], whole)
    for step in range(1, 10):
        assert torch.equal(made(ids[:, :step], last=True)[:, 0], whole[:, step - 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_all_families(toy, tmp_path, family):
    """A model starts as one without tables, learns them, and resumes; both sides have their own."""
    plain = train(
        *train_args(toy, tmp_path / "a", "--moe-freq", 0, "--max-update", 3, family=family)
    )
    flags = ("--moe-freq", 0, *NGRAM)
    logs = train(*train_args(toy, tmp_path / "b", *flags, "--max-update", 6, family=family))
    assert logs[0]["loss"] == plain[0]["loss"] and logs[2]["loss"] != plain[2]["loss"]
    path = tmp_path / "b/checkpoint_last.pt"
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"]
    found = [n for n in state if n.endswith("ngrams.tables")]
    assert len(found) == (2 if family == "translation" else 1)
    assert all(state[n].abs().sum() > 0 for n in found)
    train(*train_args(toy, tmp_path / "c", *flags, "--max-update", 3, family=family))
    more = train(*train_args(toy, tmp_path / "c", *flags, "--max-update", 6, family=family))
    assert [r["loss"] for r in more] == [r["loss"] for r in logs[3:]]


@pytest.mark.parametrize("family", ["translation", "lm"])
def test_incremental_decoding(toy, family):
    """Step by step, with the hypotheses of a sentence in another order from the third step on, the
    logits are those of one forward pass."""
    _, task, model = build(toy, "--moe-freq", 0, "--memory-ngram", 3, family=family)
    for name, p in model.named_parameters():
        if name.endswith("ngrams.tables"):
            torch.nn.init.normal_(p)
    model.eval()
    inputs = valid_batch(task, rows=3)["net_input"]
    words = inputs.get("prev_output_tokens", inputs["src_tokens"])[:, :6]
    over = None
    with torch.no_grad():
        if family == "translation":
            source, length = inputs["src_tokens"][:1], inputs["src_lengths"][:1]
            over = model.encoder(source.expand(3, -1), length.expand(3))
        whole = model.decoder(words, encoder_out=over)[0]
        state, order = {}, torch.tensor([2, 0, 1])
        for step in range(1, words.size(1) + 1):
            if step == 3:
                words, whole = words[order], whole[order]
                model.decoder.reorder_incremental_state_scripting(state, order)
            one = model.decoder(words[:, :step], encoder_out=over, incremental_state=state)[0]
            real = words[:, step - 1].ne(task.target_dictionary.pad())
            assert real.any() and torch.allclose(one[real, 0], whole[real, step - 1], atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_smaller_tables(toy, tmp_path, dtype):
    """evomoe-export --tables converts them, and fairseq-generate reads the result."""
    train(*train_args(toy, tmp_path, "--moe-freq", 0, *NGRAM, "--max-update", 5))
    small = tmp_path / "small.pt"
    export.main([str(tmp_path / "checkpoint_last.pt"), "--tables", dtype, "--output", str(small)])
    ids = torch.randint(4, 30, (2, 9))
    outputs = []
    for path in (tmp_path / "checkpoint_last.pt", small):
        (model,), *_ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
        with torch.no_grad():
            outputs.append(model.eval().decoder.ngrams(ids))
    error = (outputs[1] - outputs[0]).norm() / outputs[0].norm()
    assert 0 < error < 0.01
    plugin = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0", "--path", small)
    words = ("-s", "en", "-t", "de", "--beam", "2", "--max-len-b", "5")
    assert "H-0" in run(tool("fairseq-generate"), toy / "bin", *plugin, *words)


def test_what_cannot_work(toy):
    """Values out of range, and a width that cannot be split, are refused by name."""
    for flags, said in (
        (("--memory-ngram", 1), "--memory-ngram 1"),
        (("--memory-ngram", 2, "--memory-ngram-rows", 0), "--memory-ngram-rows 0"),
    ):
        with pytest.raises(ValueError, match=said):
            build(toy, *flags)
    with pytest.raises(ValueError, match="width of 18"):
        NgramTables(18, MemoryConfig(memory_ngram=2), pad=1)
