"""Save the float32 weights that half-precision training steps, which fairseq forgets."""

from collections.abc import Iterator
from typing import Any

import torch
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from torch import Tensor

from fairseq_evomoe.compat.patching import patch

KEY = "fp32_masters"
"""Where a checkpoint's optimizer state has them: a tensor per float32 tensor of the optimizer."""


def _pairs(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(float32 weights, the same in half precision as the model has them), by parameter or flat."""
    masters = optimizer.fp32_params
    halves = [p for p in optimizer.fp16_params if p.requires_grad]
    if isinstance(masters, list):
        yield from ((m.data, p.data) for m, p in zip(masters, halves, strict=True))
        return
    flats = list(masters.values()) if isinstance(masters, dict) else [masters]
    if len(flats) == 1:
        flat = torch.cat([p.data.view(-1) for p in halves])
        # FSDP and pipelines pad or split; they keep fairseq's behaviour
        if flat.numel() == flats[0].numel():
            yield flats[0].data, flat


@patch(_FP16OptimizerMixin, "state_dict", test="tests/tasks/test_precision.py")
def save_float32_weights(original: Any) -> Any:
    """Save the float32 weights of `--bf16` and `--fp16` training with the optimizer's state.

    fairseq makes them anew from the rounded weights when a run resumes, which then takes another
    course than one that was not interrupted.
    """

    def state_dict(self: Any) -> dict[str, Any]:
        return {**original(self), KEY: [master.clone() for master, _ in _pairs(self)]}

    return state_dict


@patch(_FP16OptimizerMixin, "load_state_dict", test="tests/tasks/test_precision.py")
def load_float32_weights(original: Any) -> Any:
    """Continue from the saved float32 weights, unless the model's weights have been changed since.

    They are used where they round to the weights that the model has.
    """

    def load_state_dict(self: Any, state_dict: dict[str, Any], overrides: Any = None) -> None:
        state = dict(state_dict)
        saved = state.pop(KEY, None) or []
        original(self, state, overrides)
        for (master, half), value in zip(_pairs(self), saved, strict=False):
            known = value.to(master.device)
            if known.shape == master.shape and torch.equal(known.to(half.dtype), half):
                master.copy_(known)

    return load_state_dict
