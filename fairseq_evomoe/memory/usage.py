"""How the rows of look-up tables are used, counted while a model is validated.

Letters: K tables, N rows a table.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from fairseq_evomoe.kernels.lookup.score import patterns


def usage(hits: Tensor) -> dict[str, Tensor]:
    """Compute the statistics of one layer's hits, (K, N) counts.

    Each statistic has shape (K,), except for `bit_imbalance`, which has shape (K, t) for t bits per
    table. `bit_imbalance` is |2 m - 1| for the mean m of each bit: 0 means that the bit is set half
    of the time, 1 that it never changes. The norm before a hash keeps it near 0 (section 2.4 of
    arXiv 2411.12992). `skew` is the number of hits of a table's busiest row, divided by the mean
    over its rows. `unused` is the fraction of rows without a hit.
    """
    hits = hits.double()
    rows = hits.size(1)
    bits = patterns(rows.bit_length() - 1, hits.device).double()
    total = hits.sum(1, keepdim=True).clamp_min(1)
    return {
        "bit_imbalance": (2 * (hits @ bits) / total - 1).abs(),
        "skew": hits.amax(1) * rows / total.squeeze(1),
        "unused": (hits == 0).double().mean(1),
    }


class RowCounts:
    """How often each row was read, per look-up layer."""

    def __init__(self) -> None:
        self._hits: dict[nn.Module, Tensor] = {}

    def of(self, layer: nn.Module) -> Tensor | None:
        """Hits of a layer's rows, (K, N) float64; None if the layer has not run."""
        return self._hits.get(layer)

    def add(self, layer: nn.Module, rows: Tensor, height: int) -> None:
        """Count the rows (B, K) that a layer reads in tables of `height` rows, N."""
        k = rows.size(1)
        flat = (rows + torch.arange(k, device=rows.device) * height).flatten()
        hits = torch.bincount(flat, minlength=k * height).view(k, height).double()
        earlier = self._hits.get(layer)
        self._hits[layer] = hits if earlier is None else earlier + hits


_COUNTS: ContextVar[RowCounts | None] = ContextVar("row_counts", default=None)


def current_counts() -> RowCounts | None:
    """The counts that are kept in this thread, or None; a compiled layer counts nothing."""
    return None if torch.compiler.is_compiling() else _COUNTS.get()


@contextmanager
def counting_rows() -> Iterator[RowCounts]:
    """Within, look-up layers in evaluation mode that run in this thread count the rows they read.

    Padding is counted as well, since a look-up layer does not know it. Memory experts are not
    counted.
    """
    counts = RowCounts()
    token = _COUNTS.set(counts)
    try:
        yield counts
    finally:
        _COUNTS.reset(token)
