"""compat/: each patch of fairseq fixes its fault and changes nothing else."""

import argparse
import gc
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, tool, train_args
from fairseq import options
from fairseq.data import data_utils, indexed_dataset, iterators
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar
from fairseq.modules.adaptive_softmax import AdaptiveSoftmax

from fairseq_evomoe import compat
from fairseq_evomoe.compat.patching import PATCHES


class Evil:
    """An object that would run code when unpickled."""

    def __reduce__(self):
        return (print, ("run",))


def test_checkpoints_may_hold_flags_but_not_code(tmp_path):
    """fairseq's Namespace loads under torch's default; anything that calls a function does not."""
    path = tmp_path / "x.pt"
    torch.save({"args": argparse.Namespace(a=1), "w": torch.ones(2)}, path)
    assert torch.load(path)["args"].a == 1
    torch.save({"args": Evil()}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path)


@pytest.mark.parametrize("n", [1, 7, 8, 17, 43])
@pytest.mark.parametrize("multiple", [1, 8])
def test_no_sentence_is_lost(n, multiple):
    """fairseq's batches cover every index once, whatever the required multiple."""
    indices = np.arange(n)[::-1].copy()
    sizes = np.full(n, 5)
    batches = data_utils.batch_by_size(
        indices,
        lambda i: sizes[i],
        num_tokens_vec=sizes,
        max_tokens=60,
        required_batch_size_multiple=multiple,
    )
    assert np.concatenate(batches).tolist() == indices.tolist()


def test_progress_bar_hides_details_that_json_keeps(caplog):
    """Numbers per layer and expert are left out of the progress bar but kept in JSON lines."""
    stats = {"loss": 1.5, "moe_load/encoder.1/e0": 0.25, "train_moe_load/encoder.1/e0": 0.25}
    simple = progress_bar.SimpleProgressBar(range(3))
    assert list(simple._format_stats(stats)) == ["loss"]
    assert set(progress_bar.JsonProgressBar(range(3))._format_stats(stats)) == set(stats)


def test_mending_twice_changes_nothing():
    """Patching again, as a second import does (spawned workers, hydra), wraps nothing twice."""
    before = (options.parse_args_and_arch, data_utils.batch_by_size)
    compat.apply_patches()
    assert (options.parse_args_and_arch, data_utils.batch_by_size) == before


def test_a_set_whose_samples_are_all_too_long_says_so():
    """An empty set raises an error that names the flags, instead of an IndexError in fairseq."""
    with pytest.raises(ValueError, match="no sample is left.*--max-tokens"):
        data_utils.batch_by_size(
            np.arange(0), num_tokens_fn=lambda i: 1, max_tokens=10, required_batch_size_multiple=8
        )


@pytest.mark.slow
def test_threads_that_load_batches_end_before_the_interpreter():
    """A thread that waits for room in a full queue stops and does not consume the whole source."""
    taken = []

    def source():
        for i in range(10**6):
            taken.append(i)
            yield i

    class Source:
        def __iter__(self):
            return source()

        def __len__(self):
            return 10**6

    buffered = iterators.BufferedIterator(2, Source())
    assert next(buffered) == 0
    assert any(isinstance(t, iterators.BackgroundConsumer) for t in threading.enumerate())
    compat.batches.stop_loading_batches()
    assert not any(isinstance(t, iterators.BackgroundConsumer) for t in threading.enumerate())
    assert len(taken) < 20


@pytest.mark.slow
@pytest.mark.parametrize(("before", "level"), [("", "20"), ("logging.basicConfig(level=30)", "30")])
def test_importing_leaves_no_debugging_output_on(before, level):
    """fairseq alone would leave the root logger at DEBUG; it is at INFO, or as the user set it."""
    program = f"import logging\n{before}\nimport fairseq_evomoe\nprint(logging.getLogger().level)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[-1] == level, done.stderr


@pytest.mark.parametrize("each", PATCHES, ids=lambda p: p.target)
def test_every_patch_gives_its_reason_and_its_test(each):
    """docs/compat.md can tell, for each patch, why it is there and which test shows it at work."""
    assert each.reason.endswith(".") and len(each.reason.split()) > 4
    assert (ROOT / each.test).is_file()
    required = re.search(r"fairseq-fixed==([\d.]+)", (ROOT / "setup.py").read_text())
    assert each.seen_in == required[1]


BYTES = "▁hi ▁ <0xF0> <0x9F> <0x98> <0x80> s"


def test_byte_pieces_become_characters():
    """--remove-bpe and models from the hub spell bytes; all else is put together as before."""
    assert data_utils.post_process(BYTES, "sentencepiece") == "hi 😀s"
    assert SentencepieceBPE.decode(None, BYTES) == "hi 😀s"
    assert data_utils.post_process("▁a <0xF0> ▁b", "sentencepiece") == "a\ufffd b"
    assert data_utils.post_process("▁a <0x 41> <0x41>", "sentencepiece") == "a<0x41>A"
    assert data_utils.post_process("▁the ▁d og", "sentencepiece") == "the dog"
    assert data_utils.post_process("d@@ og <0x41>", "subword_nmt") == "dog <0x41>"
    assert data_utils.post_process("a b", None) == "a b"


@pytest.mark.parametrize("with_target", [False, True])
def test_adaptive_softmax_has_gradients(with_target):
    """The values are fairseq's, and the gradients those of float64 differences."""
    torch.manual_seed(3)
    module = AdaptiveSoftmax(11, 6, [4, 8], dropout=0.0).double().eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 3, 5], [1, 9, 10]]) if with_target else None
    original = AdaptiveSoftmax.get_log_prob.__wrapped__
    found = module.get_log_prob(x, target)
    with torch.no_grad():
        assert torch.equal(found, original(module, x, target))
    columns = slice(None) if target is None else slice(0, 4)
    assert torch.autograd.gradcheck(lambda x: module.get_log_prob(x, target)[..., columns], x)


def test_an_empty_data_set_is_named(tmp_path, capsys):
    """The message names the file; nothing about attributes of fairseq follows."""
    path = str(tmp_path / "train")
    builder = indexed_dataset.MMapIndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
    builder.finalize(f"{path}.idx")
    with pytest.raises(ValueError, match=r"train.bin is empty: the text that fairseq-preprocess"):
        indexed_dataset.MMapIndexedDataset(path)
    gc.collect()
    assert "_bin_buffer_mmap" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "group, flag, package",
    [
        ("checkpoint", "--write-checkpoints-asynchronously", "iopath"),
        ("common", "--wandb-project", "wandb"),
        ("common", "--aim-repo", "aim"),
    ],
)
def test_a_flag_without_its_package_is_refused(monkeypatch, group, flag, package):
    """fairseq would end with exit code 0 without having trained, or leave no record."""
    given = argparse.Namespace(**{flag[2:].replace("-", "_"): "given"})
    cfg = argparse.Namespace(**{group: given}, distributed_training=argparse.Namespace())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"{flag} .* pip install {package}"):
        distributed_utils.call_main(cfg, lambda cfg: None)


def test_commands_say_only_what_a_user_can_act_on(toy, tmp_path):
    """Training and generating print no notice of a package and no warning of a library."""
    common = ("--user-dir", ROOT / "fairseq_evomoe", "--cpu", "--num-workers", "0")
    train_it = [tool("fairseq-train"), *train_args(toy, tmp_path, "--max-update", 1)]
    path = tmp_path / "checkpoint_last.pt"
    words = ("-s", "en", "-t", "de", "--beam", "1", "--max-len-b", "5", "--path", path)
    generate = [tool("fairseq-generate"), toy / "bin", *common, *words]
    report = [tool("evomoe-report"), "flops", path, "--context", "5"]
    for command in (train_it, generate, report):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [str(c) for c in command]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        said = done.stdout + done.stderr
        for noise in ("install", "Warning", "hydra", "deprecat"):
            lines = [x for x in said.splitlines() if noise in x and "| INFO | fairseq_cli" not in x]
            assert not lines, lines
