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
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Score the words of all positions: a `MaskedLMOutput` with logits (B, L, V)."""
        real = real_positions(input_ids, inputs_embeds, attention_mask, self.config.pad_token_id)
        x, inner, routings = self.model.encoder.run(input_ids, real, embeds=inputs_embeds)
        logits = self.lm_head(x)
        _, aux = self._kept(routings, output_router_logits)
        loss = None
        if labels is not None:
            unknown = self.config.unk_token_id
            loss = labels_loss(logits, labels, unknown, num_items_in_batch)
        output = MaskedLMOutput(
            loss=self._with_balance(loss, aux),
            logits=logits,
            hidden_states=self._shown(inner, output_hidden_states),
        )
        return self._returned(output, return_dict)


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
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Score classes: a `SequenceClassifierOutput` with logits (B, labels).

        The loss is that of `config.problem_type`: regression (by default with one label),
        single_label_classification or multi_label_classification.
        """
        real = real_positions(input_ids, inputs_embeds, attention_mask, self.config.pad_token_id)
        x, inner, routings = self.model.encoder.run(input_ids, real, embeds=inputs_embeds)
        logits = self.classifier(x)
        _, aux = self._kept(routings, output_router_logits)
        loss = None if labels is None else self._loss(logits, labels)
        output = SequenceClassifierOutput(
            loss=self._with_balance(loss, aux),
            logits=logits,
            hidden_states=self._shown(inner, output_hidden_states),
        )
        return self._returned(output, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        kind = self.config.problem_type
        if kind == "regression" or (kind is None and self.config.num_labels == 1):
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        if kind == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)
