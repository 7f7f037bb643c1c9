"""Configurations of exported models for transformers, one class per family.

The parts of a model that differ between checkpoints are described by plain dictionaries, so that
config.json reads like a description of the model:

- `encoder_stack` and `decoder_stack` (`None` where the family has no such side) give the sizes of
  a stack and, under `layers`, what each layer has for attention and for its feed-forward network.
- `moe` gives the rule by which a gate chooses experts, and the stage of training in which the
  checkpoint was saved. `None` means that no layer has experts.
- `memory` gives the rule of look-up layers (MemoryFormer, arXiv 2411.12992), or is `None`.
"""

from typing import Any

from transformers import PreTrainedConfig

WITHOUT_SIDE = "this model has no {side}: its configuration lists no layers there"


class EvoMoEConfig(PreTrainedConfig):
    """What the three families have in common.

    Attributes:
        vocab_size: number of output words.
        hidden_size, num_hidden_layers, num_attention_heads: of the stack whose states become
            words, the decoder where there is one. transformers' utilities read them.
        encoder_stack, decoder_stack, moe, memory: see above.
        tied: name of a weight -> name of the weight that it shares.
        unk_token_id: what a model reads in place of an id that its embeddings lack. A tokenizer
            gives such ids to pieces that were never seen in training.
        output_router_logits: whether the routing of every MoE layer is returned, and the balance
            loss is added to the loss.
        router_aux_loss_coef: weight of the balance loss, by default `--moe-gate-loss-wt` of the
            training.
    """

    vocab_size: int = 4
    hidden_size: int = 4
    num_hidden_layers: int = 1
    num_attention_heads: int = 1
    encoder_stack: Any = None
    decoder_stack: Any = None
    moe: Any = None
    memory: Any = None
    tied: dict[str, str] | None = None
    activation_function: str = "relu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.01
    bos_token_id: Any = 0
    pad_token_id: Any = 1
    eos_token_id: Any = 2
    unk_token_id: int = 3

    def side(self, name: str) -> dict[str, Any]:
        """The description of "encoder" or "decoder".

        Raises:
            ValueError: the model has no such side.
        """
        found = getattr(self, f"{name}_stack")
        if not found:
            raise ValueError(WITHOUT_SIDE.format(side=name))
        return found


class EvoMoETranslationConfig(EvoMoEConfig):
    """An encoder and a decoder, `transformer_evomoe` in fairseq."""

    model_type = "evomoe_translation"
    is_encoder_decoder: bool = True
    decoder_start_token_id: Any = 2


class EvoMoELanguageModelConfig(EvoMoEConfig):
    """A decoder alone, `transformer_lm_evomoe` in fairseq."""

    model_type = "evomoe_lm"


class EvoMoEMaskedLMConfig(EvoMoEConfig):
    """An encoder alone, `roberta_evomoe` in fairseq.

    Attributes:
        classifier_dropout: dropout of the classification head.
        classifier_activation: its activation.
    """

    model_type = "evomoe_mlm"
    classifier_dropout: float = 0.0
    classifier_activation: str = "tanh"
