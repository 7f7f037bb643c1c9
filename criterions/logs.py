"""Logging outputs of several batches and workers as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def summed(logs: Sequence[Mapping[str, Any]], key: str) -> Tensor:
    """The sum over all logs of a value, a number or a tensor, in float64 on the CPU."""
    return torch.stack([torch.as_tensor(log[key]).double().cpu() for log in logs]).sum(0)
