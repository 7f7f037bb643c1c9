"""What the exported models share: weights, losses, and the two sides of a model.

Letters: B sentences, L positions, P earlier positions in a cache, V vocabulary.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from .configuration_evomoe import EvoMoEConfig
from .look_up_evomoe import LookUp
from .routing_evomoe import Routing, balance_loss
from .stacks_evomoe import Positions, Stack

IGNORED = -100
"""Label of positions that have no loss."""


def real_positions(ids: Any, embeds: Any, mask: Tensor | None, pad: int, past: int = 0) -> Tensor:
    """Which positions are no padding, (B, P + L) bool, by the mask or else by the ids.

    Raises:
        ValueError: there are neither ids nor embeddings, or the mask has another length.
    """
    if (ids is None) == (embeds is None):
        raise ValueError("give either ids or embeddings of the tokens")
    shape = ids.shape if embeds is None else embeds.shape[:2]
    if mask is not None:
        if mask.size(1) != past + shape[1]:
            raise ValueError(
                f"attention_mask has {mask.size(1)} positions, and there are {past + shape[1]}"
            )
        return mask.bool()
    device = ids.device if embeds is None else embeds.device
    ones = torch.ones(shape[0], past + shape[1], dtype=torch.bool, device=device)
    if ids is not None:
        ones[:, past:] = ids.ne(pad)
    return ones


class EvoMoEPreTrainedModel(PreTrainedModel):
    """Base class: how weights are named, tied and drawn."""

    config_class: Any = EvoMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]
    _keep_in_fp32_modules_strict = ["row_scale", "scale1", "scale2"]

    def __init__(self, config: EvoMoEConfig) -> None:
        super().__init__(config)
        self._tied_weights_keys = dict(config.tied or {})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        super()._init_weights(module)
        if isinstance(module, LookUp | Positions):
            for p in module.parameters(recurse=False):
                init.normal_(p, std=std)
        elif type(module).__name__ in ("Router", "Experts", "LookUpExperts"):
            for name, p in module.named_parameters(recurse=False):
                ones = name == "norm_weight"
                init.ones_(p) if ones else init.normal_(p, std=std)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a configuration that names files with code has them beside it."""
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        here = Path(__file__)
        # a class that was loaded from a folder with code is copied by transformers
        if getattr(self.config, "auto_map", None) and here.parent.name == "hf":
            for path in here.parent.glob("*_evomoe.py"):
                shutil.copy(path, Path(save_directory) / path.name)
        return saved

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: the words are those of fairseq's dictionary.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the embeddings of this model cannot be resized: its words are those of fairseq's "
            "dictionary, and it reads ids beyond them as the unknown word, so that a tokenizer "
            "with more pieces needs no resizing"
        )

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        """The output, or its values as a tuple if the caller or the configuration says so."""
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _shown(self, states: list[Tensor], wanted: bool | None) -> tuple[Tensor, ...] | None:
        """All hidden states, if they are wanted."""
        wanted = self.config.output_hidden_states if wanted is None else wanted
        return tuple(states) if wanted else None

    def _kept(self, routings: list[Routing], wanted: bool | None) -> tuple[Any, Tensor | None]:
        """Router logits, a tuple, and the balance loss, if wanted and if there are experts."""
        wanted = self.config.output_router_logits if wanted is None else wanted
        if not wanted or not routings:
            return None, None
        return tuple(r.logits for r in routings), balance_loss(routings)

    def _with_balance(self, loss: Tensor | None, aux: Tensor | None) -> Tensor | None:
        if loss is None or aux is None:
            return loss
        return loss + self.config.router_aux_loss_coef * aux.to(loss.device)


def shift_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """What the decoder reads: `start` and the labels without the last."""
    shifted = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted == IGNORED, pad)


def labels_loss(logits: Tensor, labels: Tensor, unknown: int, items: Any = None) -> Tensor:
    """Cross entropy of labels (B, L), in nats; a label beyond the vocabulary counts as unknown.

    Args:
        items: number of labels of the whole update, by which `Trainer` wants a sum divided when it
            accumulates gradients; None for the mean.
    """
    labels = labels.where(labels < logits.size(-1), unknown)
    flat = logits.reshape(-1, logits.size(-1)).float()
    how = "mean" if items is None else "sum"
    loss = F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction=how)
    return loss if items is None else loss / items


class Encoder(Stack):
    """An encoder with the interface that `generate` calls."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutput:
        """(B, L) -> states (B, L, D)."""
        real = real_positions(input_ids, inputs_embeds, attention_mask, self.pad)
        x, states, _ = self.run(input_ids, real, embeds=inputs_embeds)
        return BaseModelOutput(x, hidden_states=tuple(states) if output_hidden_states else None)


class Stacks(nn.Module):
    """The encoder and the decoder of a model, as far as it has them."""

    def __init__(self, config: EvoMoEConfig) -> None:
        super().__init__()
        width = None
        if config.encoder_stack:
            self.encoder = Encoder(config, config.encoder_stack, causal=False)
            width = config.encoder_stack["width"]
        if config.decoder_stack:
            self.decoder = Stack(config, config.decoder_stack, memory_width=width, causal=True)
