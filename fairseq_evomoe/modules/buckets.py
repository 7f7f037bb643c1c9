"""How the rows of look-up tables are used, counted while a model is validated.

Letters: K tables, N rows a table.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fairseq_evomoe.kernels.lookup import patterns
from fairseq_evomoe.modules.memory_layer import MemoryLayer


def usage(hits: Tensor) -> dict[str, Tensor]:
    """Statistics of one layer's hits, (K, N) counts, each (K,) but `bit_imbalance`, (K, t).

    bit_imbalance: |2 m - 1| of the mean m of each bit; 0 is even, 1 a bit that never changes (the
    norm before a hash is there to keep it near 0, section 2.4 of arXiv 2411.12992). skew: hits of
    a table's busiest row over its mean. unused: share of rows without a hit.
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


@contextmanager
def counting(model: nn.Module) -> Iterator[list[MemoryLayer]]:
    """Within, every look-up layer of a model that does not train counts the rows it reads.

    Yields the layers; each has `.hits`, (K, N) float64 or None. Pads are counted, since a look-up
    does not know them; memory experts are not. Counts are dropped on the way out.
    """
    layers = [] if model.training else [m for m in model.modules() if isinstance(m, MemoryLayer)]
    for layer in layers:
        layer.hits, layer.counting = None, True
    try:
        yield layers
    finally:
        for layer in layers:
            layer.hits, layer.counting = None, False
