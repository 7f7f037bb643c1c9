"""Row usage of look-up tables -> logging outputs -> validation metrics. Every key is defined here.

Letters: K tables, N rows per table; R look-up layers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.logging.meters import Meter
from torch import Tensor, nn

from fairseq_evomoe.criterions.logs import summed
from fairseq_evomoe.memory.layer import MemoryLayer
from fairseq_evomoe.memory.usage import RowCounts, usage

_HITS, _SHAPES = "_memory_hits", "_memory_shapes"


def count_rows(model: nn.Module, counts: RowCounts) -> dict[str, Any]:
    """Logging outputs of one batch; they may be summed over batches and workers.

    Args:
        counts: what the look-up layers of the model read in this batch.
    """
    layers = [m for m in model.modules() if isinstance(m, MemoryLayer) and not m.is_dense]
    if not layers:
        return {}
    shapes = [layer.tables.shape[:2] for layer in layers]
    hits = []
    for layer, shape in zip(layers, shapes, strict=True):
        found = counts.of(layer)
        hits.append(layer.tables.new_zeros(shape, dtype=torch.float64) if found is None else found)
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
    """The latest tensor; every update is expected to pass an equal one."""

    def update(self, value: Tensor) -> None:
        self.value = value


def log_rows(logs: Sequence[Mapping[str, Any]]) -> None:
    """Log how evenly the rows of the tables were used over the whole validation run.

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
