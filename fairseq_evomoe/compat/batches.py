"""Patches for how fairseq builds and loads batches."""

import contextlib
import logging
import queue
import threading
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
from fairseq.data import data_utils, iterators, language_pair_dataset, token_block_dataset
from fairseq.data.indexed_dataset import MMapIndexedDataset, data_file_path

from fairseq_evomoe.compat.patching import patch

logger = logging.getLogger(__name__)


@patch(MMapIndexedDataset, "_do_init", test="tests/test_compat.py")
def name_empty_data(original: Any) -> Any:
    """Name the file if a data set has no line; fairseq reports an attribute of its own instead."""

    def _do_init(self: Any, path: str) -> None:
        if Path(data_file_path(path)).stat().st_size == 0:
            raise ValueError(
                f"{data_file_path(path)} is empty: the text that fairseq-preprocess made it from "
                "has no line"
            )
        original(self, path)

    return _do_init


@patch(MMapIndexedDataset, "__del__", test="tests/test_compat.py")
def close_what_was_opened(original: Any) -> Any:
    """Close the files of a data set only if they could be opened."""

    def close(self: Any) -> None:
        if hasattr(self, "_bin_buffer_mmap"):
            original(self)

    return close


@patch(data_utils, "batch_by_size", test="tests/test_compat.py")
def keep_last_batch(original: Any) -> Any:
    """Keep the sentences that `--required-batch-size-multiple` (8 by default) drops.

    In fairseq, training, validation and fairseq-generate lose the last n mod 8 sentences, which are
    the longest. This patch returns them as one more batch. If every sentence was filtered out,
    fairseq fails with an IndexError. The patch raises a ValueError that names the filtering flags.
    """

    def batch_by_size(indices: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(indices, np.ndarray):
            indices = np.fromiter(indices, dtype=np.int64, count=-1)
        try:
            batches = original(indices, *args, **kwargs)
        except IndexError:
            if len(indices):
                raise
            raise ValueError(
                "no sample is left: each is longer than --max-tokens, --max-source-positions, "
                "--max-target-positions or --tokens-per-sample allow, or the set is empty"
            ) from None
        fixed_shapes = kwargs.get("fixed_shapes") is not None or len(args) > 5
        kept = sum(len(b) for b in batches)
        if fixed_shapes or kept == len(indices):
            return batches
        return [*batches, indices[kept:]]

    return batch_by_size


def _numpy_lacks_compat() -> bool:
    return not hasattr(np, "compat")


@patch(token_block_dataset, "np", test="tests/test_compat.py", needed=_numpy_lacks_compat)
@patch(language_pair_dataset, "np", test="tests/test_compat.py", needed=_numpy_lacks_compat)
def keep_numpy_compat(original: Any) -> Any:
    """Provide `np.compat.long`, which numpy 2 lacks.

    fairseq needs it for `--sample-break-mode eos` and for length buckets.
    """

    class NumPy:
        compat = types.SimpleNamespace(long=np.int64)

        def __getattr__(self, name: str) -> Any:
            return getattr(original, name)

    return NumPy()


@patch(iterators.EpochBatchIterator, "state_dict", test="tests/cli/test_expert_parallel.py")
def save_number_of_workers(original: Any) -> Any:
    """Save with how many workers a run has come to its place in an epoch."""

    def state_dict(self: Any) -> dict[str, Any]:
        return {**original(self), "num_shards": self.num_shards}

    return state_dict


@patch(iterators.EpochBatchIterator, "load_state_dict", test="tests/cli/test_expert_parallel.py")
def keep_place_in_epoch(original: Any) -> Any:
    """Resume at the right batch of an epoch after the number of workers has changed.

    A fairseq checkpoint counts the batches that one worker has seen, but not the workers. A run
    resumed with another number of workers would skip batches or see some twice. This patch saves
    the number of workers too, and converts the place in the epoch from the total number of batches
    that the workers have seen.
    """

    def load_state_dict(self: Any, state_dict: dict[str, Any]) -> Any:
        saved = state_dict.get("num_shards", self.num_shards)
        seen = state_dict.get("iterations_in_epoch", 0) * saved
        if saved != self.num_shards and seen:
            again = seen % self.num_shards
            if again:
                logger.warning(
                    "%d batches of this epoch are seen again: %d were seen by %d workers, and "
                    "that number is not a multiple of the %d workers of this run",
                    *(again, seen, saved, self.num_shards),
                )
            place = seen // self.num_shards
            state_dict = {**state_dict, "iterations_in_epoch": place}
        return original(self, state_dict)

    return load_state_dict


def stop_loading_batches(patience: float = 5.0) -> None:
    """Stop the threads that prefetch batches, before the interpreter exits.

    A run that stops within an epoch leaves such a thread running. Python kills it inside torch's
    C++ code, so that a run which has trained and saved successfully occasionally aborts at exit.

    Args:
        patience: seconds to wait for all threads together.
    """
    deadline = time.monotonic() + patience
    for thread in threading.enumerate():
        if isinstance(thread, iterators.BackgroundConsumer):
            thread._max_len = 0
            while thread.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):
                    # the thread may be blocked on a full queue
                    thread._queue.get_nowait()
                thread.join(0.01)
