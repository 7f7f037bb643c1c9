"""Find a parameter's float32 master and its moments in a fairseq optimizer.

fairseq has four layouts: plain (the parameter itself), memory-efficient half precision (no master,
moments keyed by the half parameter), fp16 / bf16 with one master per parameter, and fp16 with all
masters flattened into one tensor per device.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

ROWS, COLUMNS = "exp_avg_sq_row", "exp_avg_sq_col"
"""Adafactor's second moments of a matrix: means over its columns, and over its rows."""


class OptimizerViews:
    """Views into a fairseq optimizer's state, in the shape of the model's parameters.

    Args:
        optimizer: a `FairseqOptimizer`, whether wrapped for mixed precision or not.

    Raises:
        ValueError: the optimizer's state is sharded or spread over several devices.
    """

    def __init__(self, optimizer: Any) -> None:
        self.inner: torch.optim.Optimizer = optimizer.optimizer
        masters = getattr(optimizer, "fp32_params", None)
        # parameter -> (tensor that the inner optimizer steps, offset in it or None for all of it)
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
        """Return the float32 master of `parameter`, or its data if there is no separate master."""
        if parameter not in self._home:
            return parameter.data
        home, offset = self._home[parameter]
        return self._view(home.data, offset, parameter)

    def moments(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """The optimizer state of a stacked parameter (E, ...) that has one part per expert.

        That is state with one entry per weight (Adam: exp_avg, exp_avg_sq), and factored state that
        lacks one of the last two axes (Adafactor: exp_avg_sq_row, exp_avg_sq_col).
        """
        home, offset = self._home.get(parameter, (parameter, None))
        for key, value in self.inner.state.get(home, {}).items():
            if not isinstance(value, Tensor):
                continue
            if value.shape == home.shape:
                yield self._view(value, offset, parameter)
            elif key == ROWS or (key == COLUMNS and home.dim() > 2):
                yield value

    def mean_over_base(self, parameter: nn.Parameter) -> None:
        """Turn what Adafactor keeps as a mean over all experts into the base expert's own value.

        Its column means of a stacked bias (E, H) run over the experts. Until the split only the
        base has had gradients, so the mean is its value divided by E.
        """
        home, _ = self._home.get(parameter, (parameter, None))
        columns = self.inner.state.get(home, {}).get(COLUMNS)
        if columns is not None and home.dim() == 2:
            columns.mul_(len(home))
