"""Mends of how fairseq makes and loads batches."""

import contextlib
import logging
import queue
import threading
import time
import types
import typing

import numpy as np
from fairseq.data import data_utils, iterators, language_pair_dataset, token_block_dataset

from fairseq_evomoe.compat.wrapping import wrap

logger = logging.getLogger(__name__)


def keep_last_batch() -> None:
    """`--required-batch-size-multiple` (8 by default) drops the last batch: sentences vanish.

    Training, validation and fairseq-generate lose the last n mod 8 sentences, the longest. They
    come back as one batch more. Where every sentence was filtered out, fairseq ends with an
    IndexError; here the message says what filters them.
    """

    def make(original):
        def batch_by_size(indices, *args, **kwargs):
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

    wrap(data_utils, "batch_by_size", make)


def keep_numpy_compat() -> None:
    """numpy 2 lacks `np.compat.long`: `--sample-break-mode eos` and length buckets need it."""
    if hasattr(np, "compat"):
        return

    class NumPy:
        compat = types.SimpleNamespace(long=np.int64)

        def __getattr__(self, name: str) -> typing.Any:
            return getattr(np, name)

    for module in (token_block_dataset, language_pair_dataset):
        module.np = NumPy()


def keep_place_in_epoch() -> None:
    """A checkpoint counts the batches that one worker has seen, but not the workers.

    Resumed on another number of workers, a run would skip batches or see some twice. Here the
    number of workers is saved too, and the place is that of the batches that all have seen.
    """

    def remember(original):
        def state_dict(self):
            return {**original(self), "num_shards": self.num_shards}

        return state_dict

    def convert(original):
        def load_state_dict(self, state_dict):
            saved = state_dict.get("num_shards", self.num_shards)
            seen = state_dict.get("iterations_in_epoch", 0) * saved
            if saved != self.num_shards and seen:
                again = seen % self.num_shards
                if again:
                    logger.warning(
                        "%d batches of this epoch are seen again: %d were seen by %d workers, and "
                        "%d do not divide them",
                        *(again, seen, saved, self.num_shards),
                    )
                place = seen // self.num_shards
                state_dict = {**state_dict, "iterations_in_epoch": place}
            return original(self, state_dict)

        return load_state_dict

    wrap(iterators.EpochBatchIterator, "state_dict", remember)
    wrap(iterators.EpochBatchIterator, "load_state_dict", convert)


def stop_loading_batches(patience: float = 5.0) -> None:
    """End the threads that load batches ahead, before the interpreter ends.

    A run that stops within an epoch leaves one at work; Python kills it inside torch's C++ code,
    and a training that has succeeded and saved ends with an abort, now and then.
    """
    deadline = time.monotonic() + patience
    for thread in threading.enumerate():
        if isinstance(thread, iterators.BackgroundConsumer):
            thread._max_len = 0
            while thread.is_alive() and time.monotonic() < deadline:
                with contextlib.suppress(queue.Empty):
                    # it may be waiting for room in its queue
                    thread._queue.get_nowait()
                thread.join(0.01)
