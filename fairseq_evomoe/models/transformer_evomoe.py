"""`--arch transformer_evomoe*`: the translation Transformer with evolving MoE layers."""

from typing import Any

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    DEFAULT_MAX_SOURCE_POSITIONS,
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerModel,
    base_architecture,
    transformer_iwslt_de_en,
    transformer_wmt_en_de_big,
)
from torch import nn

from fairseq_evomoe.models.stacks import (
    add_flags,
    build_decoder,
    build_encoder,
    configure,
    memory_defaults,
    moe_defaults,
)


@register_model("transformer_evomoe")
class TransformerEvoMoEModel(TransformerModel):
    """Transformer (arXiv 1706.03762) whose FFNs evolve into MoE layers (arXiv 2112.14397)."""

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        return {}

    @classmethod
    def add_args(cls, parser: Any) -> None:
        super().add_args(parser)
        add_flags(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        base_architecture(args)
        for name, default in (
            ("max_source_positions", DEFAULT_MAX_SOURCE_POSITIONS),
            ("max_target_positions", DEFAULT_MAX_TARGET_POSITIONS),
        ):
            if getattr(args, name, None) is None:
                setattr(args, name, default)
        cfg = configure(args, "encoder", "decoder")
        # skip TransformerModel.build_model, which would build a configuration without `moe`
        return super(TransformerModel, cls).build_model(cfg, task)

    @classmethod
    def build_encoder(cls, cfg: Any, src_dict: Any, embed_tokens: nn.Module) -> nn.Module:
        return build_encoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: Any, tgt_dict: Any, embed_tokens: nn.Module) -> nn.Module:
        return build_decoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


@register_model_architecture("transformer_evomoe", "transformer_evomoe")
def evomoe_small(args: Any) -> None:
    """3 + 3 layers of width 256, small enough to train on a CPU in minutes."""
    args.encoder_layers = getattr(args, "encoder_layers", 3)
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 256)
    args.encoder_ffn_embed_dim = getattr(args, "encoder_ffn_embed_dim", 512)
    args.encoder_attention_heads = getattr(args, "encoder_attention_heads", 4)
    args.decoder_layers = getattr(args, "decoder_layers", 3)
    args.decoder_attention_heads = getattr(args, "decoder_attention_heads", 4)
    moe_defaults(args, experts=4)
    base_architecture(args)


@register_model_architecture("transformer_evomoe", "transformer_evomoe_iwslt_de_en")
def evomoe_iwslt_de_en(args: Any) -> None:
    """transformer_iwslt_de_en with 4 experts in every second layer."""
    moe_defaults(args, experts=4)
    transformer_iwslt_de_en(args)


@register_model_architecture("transformer_evomoe", "transformer_evomoe_wmt_en_de")
def evomoe_wmt_en_de(args: Any) -> None:
    """Transformer-base with 8 experts in every second layer."""
    moe_defaults(args, experts=8)
    base_architecture(args)


@register_model_architecture("transformer_evomoe", "transformer_evomoe_wmt_en_de_big")
def evomoe_wmt_en_de_big(args: Any) -> None:
    """Transformer-big with 4 experts in every second layer, as in the paper's translation runs."""
    moe_defaults(args, experts=4)
    transformer_wmt_en_de_big(args)


@register_model_architecture("transformer_evomoe", "transformer_memoryformer")
def memoryformer_small(args: Any) -> None:
    """MemoryFormer (arXiv 2411.12992) with 3 + 3 layers of width 256."""
    memory_defaults(args, "encoder", "decoder")
    evomoe_small(args)


@register_model_architecture("transformer_evomoe", "transformer_memoryformer_iwslt_de_en")
def memoryformer_iwslt_de_en(args: Any) -> None:
    """transformer_iwslt_de_en with look-ups in place of all linear maps."""
    memory_defaults(args, "encoder", "decoder")
    evomoe_iwslt_de_en(args)


@register_model_architecture("transformer_evomoe", "transformer_memoryformer_wmt_en_de")
def memoryformer_wmt_en_de(args: Any) -> None:
    """Transformer-base with look-ups in place of all linear maps."""
    memory_defaults(args, "encoder", "decoder")
    evomoe_wmt_en_de(args)
