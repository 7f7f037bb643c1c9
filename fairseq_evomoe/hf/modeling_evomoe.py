"""Models with a decoder that were trained with fairseq-evomoe, for transformers.

`EvoMoEForConditionalGeneration` translates, and `EvoMoEForCausalLM` is a language model. As in
transformers' own MoE models, `output_router_logits` returns the routers' logits and adds the
balance loss, weighted by `config.router_aux_loss_coef`, to the loss. Letters: B sentences, L
positions, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    ForcedEOSTokenLogitsProcessor,
    GenerationMixin,
    LogitsProcessor,
)
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    Seq2SeqMoEOutput,
)

from .base_evomoe import EvoMoEPreTrainedModel, Stacks, labels_loss, real_positions, shift_right
from .configuration_evomoe import (
    EvoMoELanguageModelConfig,
    EvoMoETranslationConfig,
)
from .routing_evomoe import Routing


class EndAtMaximum(LogitsProcessor):
    """At the maximum length a sentence ends, with the probability that the model gives its end.

    This is how fairseq ends a sentence that is too long. transformers' own processor gives the end
    a score of 0, so that such hypotheses win over shorter ones.

    Args:
        length: largest number of ids, the start of the sentence included.
        eos: id of the end.
    """

    def __init__(self, length: int, eos: Tensor) -> None:
        self.length, self.eos = length, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next word -> the same, with -inf for all but the end."""
        if input_ids.size(1) != self.length - 1:
            return scores
        ends = torch.full_like(scores, -torch.inf)
        ends[:, self.eos] = scores[:, self.eos]
        return ends


class _Generates(EvoMoEPreTrainedModel, GenerationMixin):
    """What the two models with a decoder share."""

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As in transformers; with n-grams, the ids before the new ones go along."""
        given = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        memory = self.config.memory
        name = "decoder_input_ids" if self.config.is_encoder_decoder else "input_ids"
        new = given.get(name)
        if memory and memory["ngram"] and new is not None and new.size(1) < input_ids.size(1):
            before = input_ids[:, : -new.size(1)][:, 1 - memory["ngram"] :]
            missing = memory["ngram"] - 1 - before.size(1)
            given["ids_before"] = F.pad(before, (missing, 0), value=self.config.pad_token_id)
        return given

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' processors, with `EndAtMaximum` in place of its own."""
        found = super()._get_logits_processor(*args, **kwargs)
        for i, processor in enumerate(found):
            if isinstance(processor, ForcedEOSTokenLogitsProcessor):
                found[i] = EndAtMaximum(processor.max_length, processor.eos_token_id)
        return found

    def _new_cache(self, cache: Cache | None, use_cache: bool | None) -> Any:
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if getattr(cache, "is_compileable", False):
            raise ValueError("static caches are not supported: leave out cache_implementation")
        if cache is not None or not use_cache:
            return cache
        if not self.config.is_encoder_decoder:
            return DynamicCache()
        return EncoderDecoderCache(DynamicCache(), DynamicCache())


class EvoMoEForConditionalGeneration(_Generates):
    """Translation: an encoder, a decoder and the output words."""

    config_class = EvoMoETranslationConfig

    def __init__(self, config: EvoMoETranslationConfig) -> None:
        super().__init__(config)
        self.model = Stacks(config)
        self.lm_head = nn.Linear(config.side("decoder")["output_width"], config.vocab_size, False)
        self.post_init()

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The encoder, for `generate`."""
        return self.model.encoder

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of source words."""
        return self.model.encoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder reads for labels (B, L)."""
        config = self.config
        return shift_right(labels, config.decoder_start_token_id, config.pad_token_id)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        ids_before: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Score target words: logits (B, L, V), and the loss if there are labels (B, L).

        The output is a `Seq2SeqMoEOutput`.
        """
        pad, decoder = self.config.pad_token_id, self.model.decoder
        source: list[Routing] = []
        states: list[Tensor] = []
        if encoder_outputs is None:
            real = real_positions(input_ids, inputs_embeds, attention_mask, pad)
            over, states, source = self.model.encoder.run(input_ids, real, embeds=inputs_embeds)
        else:
            over = encoder_outputs[0]
            real = torch.ones(over.shape[:2], dtype=torch.bool, device=over.device)
            real = real if attention_mask is None else attention_mask.bool()
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        cache = self._new_cache(cache, use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        target = real_positions(
            decoder_input_ids, decoder_inputs_embeds, decoder_attention_mask, pad, past
        )
        x, inner, routings = decoder.run(
            *(decoder_input_ids, target),
            embeds=decoder_inputs_embeds,
            over=over,
            over_real=None if bool(real.all()) else real,
            cache=cache,
            before=ids_before,
        )
        logits = self.lm_head(x)
        router_logits, aux = self._kept(source + routings, output_router_logits)
        loss = None
        if labels is not None:
            unknown = self.config.unk_token_id
            loss = labels_loss(logits, labels, unknown, num_items_in_batch)
        split = len(source)
        output = Seq2SeqMoEOutput(
            loss=self._with_balance(loss, aux),
            logits=logits,
            encoder_aux_loss=None,
            decoder_aux_loss=aux,
            cache=cache,
            encoder_last_hidden_state=over,
            encoder_hidden_states=self._shown(states, output_hidden_states),
            decoder_hidden_states=self._shown(inner, output_hidden_states),
            encoder_router_logits=router_logits and router_logits[:split],
            decoder_router_logits=router_logits and router_logits[split:],
        )
        return self._returned(output, return_dict)


class EvoMoEForCausalLM(_Generates):
    """A language model."""

    config_class = EvoMoELanguageModelConfig

    def __init__(self, config: EvoMoELanguageModelConfig) -> None:
        super().__init__(config)
        self.model = Stacks(config)
        self.lm_head = nn.Linear(config.side("decoder")["output_width"], config.vocab_size, False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings of words."""
        return self.model.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The output layer."""
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        ids_before: Tensor | None = None,
        num_items_in_batch: Any = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Score the next words: logits (B, L, V), and the loss if there are labels (B, L).

        The output is a `MoeCausalLMOutputWithPast`.

        Args:
            labels: the ids of the text itself; a position is scored by the one before it.
            logits_to_keep: number of last positions whose logits are wanted, 0 for all.
        """
        cache = self._new_cache(cache, False if labels is not None else use_cache)
        past = 0 if cache is None else cache.get_seq_length()
        real = real_positions(
            input_ids, inputs_embeds, attention_mask, self.config.pad_token_id, past
        )
        x, inner, routings = self.model.decoder.run(
            input_ids, real, embeds=inputs_embeds, cache=cache, before=ids_before
        )
        keep = logits_to_keep
        kept = x[:, -keep:] if isinstance(keep, int) and keep else x
        logits = self.lm_head(kept if isinstance(keep, int) else x[:, keep])
        router_logits, aux = self._kept(routings, output_router_logits)
        loss = None
        if labels is not None:
            unknown = self.config.unk_token_id
            loss = labels_loss(logits[:, :-1], labels[:, 1:], unknown, num_items_in_batch)
        output = MoeCausalLMOutputWithPast(
            loss=self._with_balance(loss, aux),
            aux_loss=aux,
            logits=logits,
            cache=cache,
            hidden_states=self._shown(inner, output_hidden_states),
            router_logits=router_logits,
        )
        return self._returned(output, return_dict)
