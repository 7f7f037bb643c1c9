"""`--arch roberta_evomoe*`: the masked language model (RoBERTa) with evolving MoE layers."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaEncoder, RobertaModel
from fairseq.models.roberta.model import base_architecture, roberta_large_architecture
from fairseq.modules.transformer_sentence_encoder import init_bert_params
from omegaconf import OmegaConf, open_dict
from torch import nn

from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.models.stacks import (
    add_flags,
    build_encoder,
    configure,
    memory_defaults,
    moe_defaults,
)
from fairseq_evomoe.modules.moe_layer import EvoMoELayer

BERT_STD = 0.02


def init_params(module: nn.Module) -> None:
    """Apply fairseq's BERT initialisation, also to experts; the base expert equals a dense FFN."""
    if not isinstance(module, MemoryAttention):
        init_bert_params(module)
    if isinstance(module, EvoMoELayer):
        module.reset_normal_(BERT_STD)


class RobertaEvoMoEEncoder(RobertaEncoder):
    """fairseq's RoBERTa encoder, built on a Transformer encoder with MoE layers."""

    def build_encoder(self, args: Any, dictionary: Any, embed_tokens: nn.Module) -> nn.Module:
        encoder = build_encoder(configure(args, "encoder"), dictionary, embed_tokens)
        encoder.apply(init_params)
        return encoder


@register_model("roberta_evomoe")
class RobertaEvoMoEModel(RobertaModel):
    """RoBERTa (arXiv 1907.11692) whose FFNs evolve into MoE layers (arXiv 2112.14397)."""

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        return {}

    @classmethod
    def add_args(cls, parser: Any) -> None:
        super().add_args(parser)
        add_flags(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        with open_dict(args) if OmegaConf.is_config(args) else nullcontext():
            base_architecture(args)
            if getattr(args, "max_positions", None) is None:
                args.max_positions = getattr(args, "tokens_per_sample", None)
                if args.max_positions is None:
                    args.max_positions = args.tokens_per_sample = task.max_positions()
            encoder = RobertaEvoMoEEncoder(args, task.source_dictionary)
        return cls(args, encoder)

    def apply(self, fn: Callable[[nn.Module], None]) -> Any:
        # RobertaModel initialises the whole model again, with a function that ignores experts
        return super().apply(init_params if fn is init_bert_params else fn)


@register_model_architecture("roberta_evomoe", "roberta_evomoe")
def evomoe_roberta_small(args: Any) -> None:
    """4 layers of width 256, small enough to train on a CPU in minutes."""
    args.encoder_layers = getattr(args, "encoder_layers", 4)
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 256)
    args.encoder_ffn_embed_dim = getattr(args, "encoder_ffn_embed_dim", 1024)
    args.encoder_attention_heads = getattr(args, "encoder_attention_heads", 4)
    moe_defaults(args, experts=4)
    base_architecture(args)


@register_model_architecture("roberta_evomoe", "roberta_evomoe_base")
def evomoe_roberta_base(args: Any) -> None:
    """RoBERTa-base with 16 experts in every second layer."""
    moe_defaults(args, experts=16)
    base_architecture(args)


@register_model_architecture("roberta_evomoe", "roberta_evomoe_large")
def evomoe_roberta_large(args: Any) -> None:
    """RoBERTa-large with 16 experts in every second layer, the size in the paper."""
    moe_defaults(args, experts=16)
    roberta_large_architecture(args)


@register_model_architecture("roberta_evomoe", "roberta_memoryformer_base")
def memoryformer_roberta_base(args: Any) -> None:
    """RoBERTa-base with look-ups in place of all linear maps (MemoryFormer, arXiv 2411.12992)."""
    memory_defaults(args, "encoder")
    base_architecture(args)
