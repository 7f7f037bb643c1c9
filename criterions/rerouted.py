"""Share of validation tokens whose first expert is another than at the validation before."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor

from fairseq_evomoe.criterions.logs import summed
from fairseq_evomoe.modules.records import RoutingLog

MOST = 2**22
"""Number of choices, one per token and layer, that are kept from one validation to the next."""


class FirstExperts:
    """The expert that each validation token went to first, by batch, from one validation to the
    next.

    A batch is known by its tokens, so that any number of validation sets can be mixed. Beyond
    `MOST` choices no new batches are kept.
    """

    def __init__(self) -> None:
        self._chosen: dict[bytes, Tensor] = {}
        self._kept = 0

    def compare(self, tokens: Tensor, log: RoutingLog) -> dict[str, Tensor]:
        """Count the tokens that changed their first expert, and keep this batch's choices.

        Args:
            tokens: ids of the batch, any shape.
            log: what the layers recorded in evaluation mode for these tokens.

        Returns:
            Logging outputs, which may be summed over batches and workers: (token, layer) pairs that
            were compared, and those of them with another expert.
        """
        zero = torch.zeros((), dtype=torch.float64)
        counts = {"moe_compared": zero, "moe_changed": zero}
        chosen = [r.first for r in log.records if r.first is not None]
        if not chosen:
            return counts
        now = torch.cat(chosen).to("cpu", torch.int16)
        key = tokens.cpu().numpy().tobytes()
        before = self._chosen.get(key)
        if before is None:
            if self._kept + len(now) > MOST:
                return counts
            self._kept += len(now)
        elif len(before) == len(now):
            counts = {
                "moe_compared": zero + len(now),
                "moe_changed": (before != now).sum().double(),
            }
        self._chosen[key] = now
        return counts


def log_rerouted(logs: Sequence[Mapping[str, Any]]) -> None:
    """Log `moe_rerouted`, the share of tokens that changed; nothing at the first validation."""
    logs = [log for log in logs if "moe_compared" in log]
    compared = float(summed(logs, "moe_compared")) if logs else 0.0
    if compared:
        share = float(summed(logs, "moe_changed")) / compared
        metrics.log_scalar("moe_rerouted", share, compared, priority=49, round=4)
