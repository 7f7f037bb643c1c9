"""Running averages of weights, `--store-ema`, across the split."""

from typing import Any

import torch
from fairseq.models.ema.ema import EMA

from fairseq_evomoe.compat.wrapping import wrap
from fairseq_evomoe.modules.moe_layer import moe_layers


def start_averages_at_split() -> None:
    """Let the average of an expert start when it arises: before, there is nothing of it to average.

    fairseq would average the entries of the stacked weights that nobody has used yet.
    """

    def make(original: Any) -> Any:
        @torch.no_grad()
        def _step_internal(self: EMA, new_model: Any, updates: int | None = None) -> None:
            unsplit = {n for n, layer in moe_layers(self.model) if not layer.spawned}
            original(self, new_model, updates)
            for name, layer in moe_layers(new_model):
                if name not in unsplit or not layer.spawned:
                    continue
                arisen = [i for i, e in enumerate(layer.experts.slots) if e > 0]
                for part, p in layer.experts.named_parameters():
                    path = f"{name}.experts.{part}"
                    for average in (self.model.get_parameter(path), self.fp32_params.get(path)):
                        if average is not None:
                            average[arisen] = p[arisen].to(average)

        return _step_internal

    wrap(EMA, "_step_internal", make)
