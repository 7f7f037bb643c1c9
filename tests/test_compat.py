"""compat/: each mend cures its fault, and nothing more than that."""

import argparse
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.data import data_utils, iterators
from fairseq.logging import progress_bar

from fairseq_evomoe import compat


class Evil:
    """Unpickling it would run code."""

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
    """One number per layer and expert stays out of a line for people, not of one for programs."""
    stats = {"loss": 1.5, "moe_load/encoder.1/e0": 0.25, "train_moe_load/encoder.1/e0": 0.25}
    simple = progress_bar.SimpleProgressBar(range(3))
    assert list(simple._format_stats(stats)) == ["loss"]
    assert set(progress_bar.JsonProgressBar(range(3))._format_stats(stats)) == set(stats)


def test_mending_twice_changes_nothing():
    """A second import of the plugin (spawned workers, hydra) wraps nothing again."""
    before = (options.parse_args_and_arch, data_utils.batch_by_size)
    compat.mend()
    assert (options.parse_args_and_arch, data_utils.batch_by_size) == before


def test_a_set_whose_samples_are_all_too_long_says_so():
    """Not an IndexError in fairseq."""
    with pytest.raises(ValueError, match="no sample is left.*--max-tokens"):
        data_utils.batch_by_size(
            np.arange(0), num_tokens_fn=lambda i: 1, max_tokens=10, required_batch_size_multiple=8
        )


def test_threads_that_load_batches_end_before_the_interpreter():
    """One that waits for room in a full queue stops, without eating the rest of its source."""
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


@pytest.mark.parametrize(("before", "level"), [("", "20"), ("logging.basicConfig(level=30)", "30")])
def test_importing_leaves_no_debugging_output_on(before, level):
    """fairseq alone sets every library's logger to debugging; a level of the user's stays."""
    program = f"import logging\n{before}\nimport fairseq_evomoe\nprint(logging.getLogger().level)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[-1] == level, done.stderr
