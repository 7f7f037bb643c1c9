"""Sums of logging outputs over batches and workers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def summed(logs: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    """Sum the value of `key`, a number or a tensor, over all logs, in float64 on the CPU."""
    return torch.stack([torch.as_tensor(log[key]).double().cpu() for log in logs]).sum(0)
