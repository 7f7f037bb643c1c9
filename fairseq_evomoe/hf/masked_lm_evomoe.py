"""The masked language model and the classifier that were trained with fairseq-evomoe.

`output_router_logits` adds the balance loss to the loss, as in `modeling_evomoe`. Letters: B
sentences, L positions, D model width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from .base_evomoe import EvoMoEPreTrainedModel, Stacks, labels_loss, real_positions
from .configuration_evomoe import EvoMoEMaskedLMConfig
from .feed_forward_evomoe import ACTIVATIONS


class MaskedLMHead(nn.Module):
    """RoBERTa's output layer (arXiv 1907.11692)."""

    def __init__(self, config: EvoMoEMaskedLMConfig) -> None:
        super().__init__()
        width = config.side("encoder")["width"]
        self.dense, self.layer_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.activation = ACTIVATIONS[config.activation_function]
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, V)."""
        return F.linear(self.layer_norm(self.activation(self.dense(x))), self.weight, self.bias)


class EvoMoEForMaskedLM(EvoMoEPreTrainedModel):
    """A masked language model."""

    config_class = EvoMoEMaskedLMConfig

    def __init__(self, config: EvoMoEMaskedLMConfig) -> None:
        super().__init__(config)
        self.model = Stacks(config)
        self.lm_head = MaskedLMHead(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of words."""
        return self.model.encoder.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        num_items_in_batch: Any = None,
        **unused: Any,
    ) -> MaskedLMOutput:
        """Score the words of all positions: logits (B, L, V), the loss at labels (B, L)."""
        real = real_positions(input_ids, inputs_embeds, attention_mask, self.config.pad_token_id)
        x, inner, routings = self.model.encoder.run(input_ids, real, embeds=inputs_embeds)
        logits = self.lm_head(x)
        _, aux = self._kept(routings, output_router_logits)
        loss = None
        if labels is not None:
            unknown = self.config.unk_token_id
            loss = labels_loss(logits, labels, unknown, num_items_in_batch)
        return MaskedLMOutput(
            loss=self._with_balance(loss, aux),
            logits=logits,
            hidden_states=tuple(inner) if output_hidden_states else None,
        )


class ClassificationHead(nn.Module):
    """RoBERTa's head on the state of the first token."""

    def __init__(self, config: EvoMoEMaskedLMConfig) -> None:
        super().__init__()
        width = config.side("encoder")["width"]
        labels = int(config.num_labels or 2)
        self.dense, self.out_proj = nn.Linear(width, width), nn.Linear(width, labels)
        self.activation = ACTIVATIONS[config.classifier_activation]
        self.dropout = nn.Dropout(config.classifier_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, labels)."""
        h = self.activation(self.dense(self.dropout(x[:, 0])))
        return self.out_proj(self.dropout(h))


class EvoMoEForSequenceClassification(EvoMoEPreTrainedModel):
    """A masked language model's encoder with a classifier."""

    config_class = EvoMoEMaskedLMConfig
    # tells Trainer that the loss is a mean over sentences
    accepts_loss_kwargs = False

    def __init__(self, config: EvoMoEMaskedLMConfig) -> None:
        super().__init__(config)
        self.model = Stacks(config)
        self.classifier = ClassificationHead(config)
        self._tied_weights_keys = {}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of words."""
        return self.model.encoder.embed_tokens

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutput:
        """Score classes: logits (B, labels); with one label it is a regression."""
        real = real_positions(input_ids, inputs_embeds, attention_mask, self.config.pad_token_id)
        x, inner, routings = self.model.encoder.run(input_ids, real, embeds=inputs_embeds)
        logits = self.classifier(x)
        _, aux = self._kept(routings, output_router_logits)
        loss = None
        if labels is not None and self.config.num_labels == 1:
            loss = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(
            loss=self._with_balance(loss, aux),
            logits=logits,
            hidden_states=tuple(inner) if output_hidden_states else None,
        )
