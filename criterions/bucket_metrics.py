"""Use of look-up tables -> logging outputs -> metrics of a validation. Every key is named here.

Letters: K tables, N rows a table; R look-up layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.logging.meters import Meter
from torch import Tensor

from fairseq_evomoe.criterions.logs import summed
from fairseq_evomoe.modules.buckets import usage
from fairseq_evomoe.modules.memory_layer import MemoryLayer

_HITS, _SHAPES = "_memory_hits", "_memory_shapes"


def count(layers: Sequence[MemoryLayer]) -> dict[str, Any]:
    """Logging outputs of one batch; they may be summed over batches and workers."""
    if not layers:
        return {}
    shapes = [layer.tables.shape[:2] for layer in layers]
    hits = [
        layer.tables.new_zeros(shape, dtype=torch.float64) if layer.hits is None else layer.hits
        for layer, shape in zip(layers, shapes, strict=True)
    ]
    return {
        "memory_hits": torch.cat([h.flatten() for h in hits]),
        "memory_shapes": torch.tensor(shapes, dtype=torch.float64, device=hits[0].device),
        "memory_batches": 1,
    }


class _Total(Meter):
    """Sum of tensors over a validation run."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.value: Tensor | None = None

    def update(self, value: Tensor) -> None:
        self.value = value if self.value is None else self.value + value

    @property
    def smoothed_value(self) -> float:
        return 0.0 if self.value is None else float(self.value.sum())


class _Latest(_Total):
    """The last of equal tensors."""

    def update(self, value: Tensor) -> None:
        self.value = value


def log_buckets(logs: Sequence[Mapping[str, Any]]) -> None:
    """Log how evenly the rows of tables were used; values are of the whole validation run.

    | key | meaning |
    | --- | --- |
    | memory_bit_imbalance | mean over bits of |2 m - 1|, m the mean of a bit: 0 even, 1 constant |
    | memory_row_skew | hits of the busiest row over the mean of its table, worst table |
    | memory_unused_rows | share of rows without a hit |
    """
    logs = [log for log in logs if "memory_hits" in log]
    if not logs:
        return

    shapes = summed(logs, "memory_shapes") / summed(logs, "memory_batches")
    metrics.log_custom(_Total, _HITS, summed(logs, "memory_hits"))
    metrics.log_custom(_Latest, _SHAPES, shapes)
    for place, (key, statistic) in enumerate(
        {
            "memory_bit_imbalance": lambda u: torch.cat([x["bit_imbalance"].flatten() for x in u]),
            "memory_row_skew": lambda u: torch.stack([x["skew"].max() for x in u]).max(),
            "memory_unused_rows": lambda u: torch.cat([x["unused"] for x in u]),
        }.items()
    ):
        metrics.log_derived(key, lambda meters, f=statistic: _read(meters, f), priority=50 + place)


def _read(meters: Mapping[str, Any], statistic: Any) -> float:
    hits, shapes = meters[_HITS].value, meters[_SHAPES].value
    sizes = [[round(x) for x in shape] for shape in shapes.tolist()]
    parts = hits.split([k * n for k, n in sizes])
    used = [usage(p.view(k, n)) for p, (k, n) in zip(parts, sizes, strict=True)]
    return round(float(statistic(used).mean()), 4)
