"""n-gram tables that stay in the checkpoint's file: `evomoe-export --ngrams mapped`."""

import re
from pathlib import Path

import pytest
import torch
from conftest import USER_DIR, build, run, tool, train, train_args
from fairseq import checkpoint_utils

from fairseq_evomoe.tools import export

ROWS = 2000
NGRAM = ("--moe-freq", 0, "--memory-ngram", 2, "--memory-ngram-rows", ROWS)


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train(*train_args(toy, folder, *NGRAM, "--max-update", 5))
    return folder / "checkpoint_last.pt"


def exported(trained, path, *flags):
    export.main([str(trained), *flags, "--output", str(path)])
    (model,), *_ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    return model.eval()


def in_file(tensor, path):
    """Whether a tensor lies in a mapping of the file, none of which was copied to memory."""
    maps = Path("/proc/self/smaps").read_text()
    for entry in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.M)[1:]:
        first, last = (int(x, 16) for x in entry.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return str(path) in entry and re.search(r"^Anonymous:\s+0 kB", entry, re.M)
    return False


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_same_results_from_the_file(toy, trained, tmp_path, dtype):
    """Rows and translations are those of tables in memory; the tables stay in the file."""
    in_memory = exported(trained, tmp_path / "memory.pt", "--tables", dtype)
    path = tmp_path / "mapped.pt"
    mapped = exported(trained, path, "--tables", dtype, "--ngrams", "mapped")
    for side in ("encoder", "decoder"):
        ours, others = (getattr(m, side).ngrams for m in (mapped, in_memory))
        assert ours.tables.shape == others.tables.shape and ours.tables.dtype == others.tables.dtype
        ids = torch.randint(4, 30, (2, 9))
        assert torch.equal(ours(ids), others(ids))
        with pytest.raises(ValueError, match="are for inference"):
            ours.train()(ids)
        assert in_file(ours.tables, path) and not in_file(others.tables, tmp_path / "memory.pt")
    plugin = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0")
    words = ("-s", "en", "-t", "de", "--beam", "2", "--max-len-b", "5")
    said = []
    for p in (path, tmp_path / "memory.pt"):
        printed = run(tool("fairseq-generate"), toy / "bin", *plugin, *words, "--path", p)
        said.append(re.findall(r"^H-.*", printed, re.M))
    assert said[0] == said[1] != []


def test_without_a_dtype_and_in_two_steps(trained, tmp_path):
    """Without --tables they stay float32. A converted checkpoint can be mapped later."""
    mapped = exported(trained, tmp_path / "a.pt", "--ngrams", "mapped")
    assert mapped.decoder.ngrams.tables.dtype == torch.float32 and mapped.decoder.ngrams.mapped
    exported(trained, tmp_path / "b.pt", "--tables", "int8")
    later = exported(tmp_path / "b.pt", tmp_path / "c.pt", "--ngrams", "mapped")
    assert later.decoder.ngrams.tables.dtype == torch.int8 and later.decoder.ngrams.mapped


def test_a_mapped_model_moves_and_casts(trained, tmp_path):
    """What torch does to all weights, it also does to these."""
    mapped = exported(trained, tmp_path / "a.pt", "--ngrams", "mapped")
    ids = torch.randint(4, 30, (2, 9))
    want = mapped.decoder.ngrams(ids)
    half = mapped.bfloat16().decoder.ngrams(ids)
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), want, rtol=1e-2, atol=1e-4)


def test_what_cannot_work(toy, tmp_path, capsys):
    """Training with mapped tables, and a checkpoint without tables, are refused by name."""
    with pytest.raises(ValueError, match="--memory-ngram-mapped.*evomoe-export --ngrams mapped"):
        build(toy, *NGRAM, "--memory-ngram-mapped")
    train(*train_args(toy, tmp_path, "--moe-freq", 0, "--max-update", 1))
    with pytest.raises(SystemExit):
        exported(tmp_path / "checkpoint_last.pt", tmp_path / "x.pt", "--ngrams", "mapped")
    assert "has no n-gram tables (--memory-ngram)" in capsys.readouterr().err
