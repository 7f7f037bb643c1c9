"""`--arch transformer_evomoe*`: the translation Transformer with evolving MoE layers."""

from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import (
    DEFAULT_MAX_SOURCE_POSITIONS,
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
    TransformerModel,
    base_architecture,
    transformer_iwslt_de_en,
    transformer_wmt_en_de_big,
)
from torch import nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.transformer_layer import DecoderLayer, EncoderLayer, LayerStack, wrap


class EvoMoEEncoder(LayerStack, TransformerEncoderBase):
    """fairseq's Transformer encoder, with MoE layers where the flags put them."""

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        return wrap(EncoderLayer(cfg, self.next_index(), return_fc=self.return_fc), cfg)

    def forward_scriptable(self, src_tokens, *args, **kwargs):
        self.hand_down(src_tokens)
        return super().forward_scriptable(src_tokens, *args, **kwargs)


class EvoMoEDecoder(LayerStack, TransformerDecoderBase):
    """fairseq's Transformer decoder, with MoE layers where the flags put them."""

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        return wrap(DecoderLayer(cfg, self.next_index(), no_encoder_attn), cfg)

    def extract_features_scriptable(
        self, prev_output_tokens, encoder_out, incremental_state=None, *args, **kwargs
    ):
        incremental = incremental_state is not None
        self.hand_down(prev_output_tokens[:, -1:] if incremental else prev_output_tokens)
        return super().extract_features_scriptable(
            prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
        )


@register_model("transformer_evomoe")
class TransformerEvoMoEModel(TransformerModel):
    """Transformer for translation (arXiv 1706.03762) whose FFNs evolve (arXiv 2112.14397)."""

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        return {}

    @classmethod
    def add_args(cls, parser) -> None:
        super().add_args(parser)
        gen_parser_from_dataclass(parser, MoEConfig(), delete_default=True, with_prefix="")

    @classmethod
    def build_model(cls, args, task):
        base_architecture(args)
        for name, default in (
            ("max_source_positions", DEFAULT_MAX_SOURCE_POSITIONS),
            ("max_target_positions", DEFAULT_MAX_TARGET_POSITIONS),
        ):
            if getattr(args, name, None) is None:
                setattr(args, name, default)
        moe = MoEConfig.from_args(args).check(tuple(GATES))
        cfg = TransformerConfig.from_namespace(args)
        if cfg.quant_noise.pq and (moe.freq("encoder") or moe.freq("decoder")):
            raise ValueError(
                f"--quant-noise-pq {cfg.quant_noise.pq}: quantises the dense FFN, which an MoE "
                "layer does not have; leave it out, or set --moe-freq 0"
            )
        cfg.moe = moe
        # past TransformerModel, whose build_model would make a configuration without `moe`
        return super(TransformerModel, cls).build_model(cfg, task)

    @classmethod
    def build_encoder(cls, cfg, src_dict, embed_tokens):
        return EvoMoEEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg, tgt_dict, embed_tokens):
        return EvoMoEDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


@register_model_architecture("transformer_evomoe", "transformer_evomoe")
def evomoe_small(args) -> None:
    """3 + 3 layers of width 256: trains on a CPU in minutes."""
    args.encoder_layers = getattr(args, "encoder_layers", 3)
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 256)
    args.encoder_ffn_embed_dim = getattr(args, "encoder_ffn_embed_dim", 512)
    args.encoder_attention_heads = getattr(args, "encoder_attention_heads", 4)
    args.decoder_layers = getattr(args, "decoder_layers", 3)
    args.decoder_attention_heads = getattr(args, "decoder_attention_heads", 4)
    _evolve(args, experts=4)
    base_architecture(args)


@register_model_architecture("transformer_evomoe", "transformer_evomoe_iwslt_de_en")
def evomoe_iwslt_de_en(args) -> None:
    """transformer_iwslt_de_en with 4 experts in every second layer."""
    _evolve(args, experts=4)
    transformer_iwslt_de_en(args)


@register_model_architecture("transformer_evomoe", "transformer_evomoe_wmt_en_de")
def evomoe_wmt_en_de(args) -> None:
    """Transformer-base with 8 experts in every second layer."""
    _evolve(args, experts=8)
    base_architecture(args)


@register_model_architecture("transformer_evomoe", "transformer_evomoe_wmt_en_de_big")
def evomoe_wmt_en_de_big(args) -> None:
    """Transformer-big with 4 experts in every second layer, as in the paper's translation runs."""
    _evolve(args, experts=4)
    transformer_wmt_en_de_big(args)


def _evolve(args, *, experts: int) -> None:
    # a frequency given for one side leaves the other dense
    one_sided = getattr(args, "encoder_moe_freq", 0) or getattr(args, "decoder_moe_freq", 0)
    args.moe_freq = getattr(args, "moe_freq", 0 if one_sided else 2)
    args.moe_expert_count = getattr(args, "moe_expert_count", experts)
