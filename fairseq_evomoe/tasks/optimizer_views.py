"""Where an optimizer keeps a parameter's float32 master and its moments.

fairseq has four layouts: plain (the parameter itself), memory-efficient half precision (no master,
moments keyed by the half parameter), fp16 / bf16 with one master a parameter, and fp16 with all
masters flattened into one tensor a device.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class OptimizerViews:
    """Views into a fairseq optimizer's state, in the shape of the model's parameters.

    Args:
        optimizer: a `FairseqOptimizer`, wrapped for mixed precision or not.

    Raises:
        ValueError: the optimizer's state is sharded or spread over several devices.
    """

    def __init__(self, optimizer: Any) -> None:
        self.inner: torch.optim.Optimizer = optimizer.optimizer
        masters = getattr(optimizer, "fp32_params", None)
        # parameter -> (tensor that the inner optimizer steps, offset in it; None: as a whole)
        self._home: dict[nn.Parameter, tuple[Tensor, int | None]] = {}
        if masters is None:
            return
        parameters = [p for p in optimizer.fp16_params if p.requires_grad]
        if isinstance(masters, list):
            self._home = {p: (m, None) for p, m in zip(parameters, masters, strict=True)}
            return
        flats = list(masters.values()) if isinstance(masters, dict) else [masters]
        if len(flats) != 1 or flats[0].numel() < sum(p.numel() for p in parameters):
            raise ValueError(
                "cannot split experts under an optimizer whose fp32 masters are sharded over "
                "devices: add --fp16-no-flatten-grads"
            )
        offset = 0
        for p in parameters:
            self._home[p] = (flats[0], offset)
            offset += p.numel()

    def _view(self, whole: Tensor, offset: int | None, parameter: nn.Parameter) -> Tensor:
        if offset is None:
            return whole
        return whole[offset : offset + parameter.numel()].view(parameter.shape)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 master of `parameter`; its own data where there is no separate one."""
        if parameter not in self._home:
            return parameter.data
        home, offset = self._home[parameter]
        return self._view(home.data, offset, parameter)

    def moments(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The optimizer state that has one entry a weight (Adam: exp_avg, exp_avg_sq)."""
        home, offset = self._home.get(parameter, (parameter, None))
        for value in self.inner.state.get(home, {}).values():
            if isinstance(value, Tensor) and value.shape == home.shape:
                yield self._view(value, offset, parameter)
