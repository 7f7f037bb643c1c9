"""Patch for moving averages of the weights (`--store-ema`) across the split."""

from typing import Any

import torch
from fairseq.models.ema.ema import EMA

from fairseq_evomoe.compat.patching import patch
from fairseq_evomoe.modules.moe_layer import moe_layers


@patch(EMA, "_step_internal", test="tests/cli/test_commands.py")
def start_averages_at_split(original: Any) -> Any:
    """Start the moving average of an expert at the split, from the expert's weights.

    Before the split only the base expert is in use. Without this patch, fairseq's average would
    include the unused entries of the stacked weights.
    """

    @torch.no_grad()
    def _step_internal(self: EMA, new_model: Any, updates: int | None = None) -> None:
        unsplit = {n for n, layer in moe_layers(self.model) if not layer.timeline.has_split}
        original(self, new_model, updates)
        for name, layer in moe_layers(new_model):
            if name not in unsplit or not layer.timeline.has_split:
                continue
            entries = [i for i, e in enumerate(layer.experts.expert_ids) if e > 0]
            for part, p in layer.experts.named_parameters():
                path = f"{name}.experts.{part}"
                for average in (self.model.get_parameter(path), self.fp32_params.get(path)):
                    if average is not None:
                        average[entries] = p[entries].to(average)

    return _step_internal
