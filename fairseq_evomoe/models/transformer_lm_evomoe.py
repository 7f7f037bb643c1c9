"""`--arch transformer_lm_evomoe*`: the causal language model (GPT) with evolving MoE layers."""

from dataclasses import dataclass
from typing import Any, Optional

from fairseq import options
from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer_lm import (
    DEFAULT_MAX_TARGET_POSITIONS,
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_gpt3_architecture,
    transformer_lm_gpt3_medium,
    transformer_lm_gpt3_small,
    transformer_lm_gpt3_xl,
)
from fairseq.modules import AdaptiveInput, CharacterTokenEmbedder
from torch import nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.models.stacks import build_decoder, configure, memory_defaults, moe_defaults
from fairseq_evomoe.options import option


@dataclass
class TransformerLMEvoMoEConfig(MoEConfig, MemoryConfig, TransformerLanguageModelConfig):
    """fairseq's flags of a language model and the flags of MoE and look-up layers.

    The defaults describe `--arch transformer_lm_evomoe`: 4 layers of width 256 with 4 experts in
    every second layer, small enough to train on a CPU in minutes.
    """

    moe_freq: Optional[int] = option(  # type: ignore[assignment]
        None, "every n-th layer is an MoE layer, 0 for none; by default 2, or --decoder-moe-freq"
    )
    moe_expert_count: int = option(4, "number of experts in each MoE layer")
    moe_gate_token_bias: Optional[float] = option(  # type: ignore[assignment]
        None,
        "add to the gate's logits a learned bias of the token id, drawn with this standard "
        "deviation, so that words keep their experts; by default 3 with --moe-gate dts (without "
        "--dts-parity), else 0",
    )
    decoder_layers: int = option(4, "number of layers")
    decoder_embed_dim: int = option(256, "model width")
    decoder_input_dim: Optional[int] = option(
        None, "width of the input embeddings; by default the model width"
    )
    decoder_output_dim: Optional[int] = option(
        None, "width of the output embeddings; by default the model width"
    )
    decoder_ffn_embed_dim: int = option(1024, "hidden width of the FFN")
    decoder_attention_heads: int = option(4, "number of attention heads")


@register_model("transformer_lm_evomoe", dataclass=TransformerLMEvoMoEConfig)
class TransformerLMEvoMoEModel(TransformerLanguageModel):
    """Decoder-only Transformer whose FFNs evolve into MoE layers (arXiv 2112.14397)."""

    @classmethod
    def hub_models(cls) -> dict[str, str]:
        return {}

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        if args.decoder_layers_to_keep:
            args.decoder_layers = len(args.decoder_layers_to_keep.split(","))
        for name in ("decoder_input_dim", "decoder_output_dim"):
            setattr(args, name, getattr(args, name) or args.decoder_embed_dim)
        if getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = getattr(
                args, "tokens_per_sample", DEFAULT_MAX_TARGET_POSITIONS
            )
        if args.base_layers:
            raise ValueError(
                f"--base-layers {args.base_layers}: fairseq's own BASE layers need one expert per "
                "worker; use --moe-gate base"
            )
        if args.tie_adaptive_weights and (
            not args.adaptive_input
            or args.adaptive_input_factor != args.adaptive_softmax_factor
            or args.adaptive_input_cutoff != args.adaptive_softmax_cutoff
            or args.decoder_input_dim != args.decoder_output_dim
        ):
            raise ValueError(
                "--tie-adaptive-weights needs --adaptive-input, and the same factor, cutoff and "
                "width for input and output"
            )
        if args.moe_freq is None:
            args.moe_freq = 0 if args.decoder_moe_freq else 2
        if args.moe_gate_token_bias is None:
            # docs/evidence.md has the reason for 3; baselines stay as their papers describe them
            args.moe_gate_token_bias = (
                3.0 if args.moe_gate == "dts" and not args.dts_parity else 0.0
            )
        cfg = configure(args, "decoder")
        embed_tokens = cls._embed(args, task.source_dictionary)
        decoder = build_decoder(
            *(cfg, task.target_dictionary, embed_tokens),
            reads=task.source_dictionary,
            no_encoder_attn=True,
        )
        return cls(decoder)

    @classmethod
    def _embed(cls, args: Any, dictionary: Any) -> nn.Module:
        if args.character_embeddings:
            return CharacterTokenEmbedder(
                dictionary,
                options.eval_str_list(args.character_filters, type=tuple),
                args.character_embedding_dim,
                args.decoder_embed_dim,
                args.char_embedder_highway_layers,
            )
        if args.adaptive_input:
            return AdaptiveInput(
                len(dictionary),
                dictionary.pad(),
                args.decoder_input_dim,
                args.adaptive_input_factor,
                args.decoder_embed_dim,
                options.eval_str_list(args.adaptive_input_cutoff, type=int),
                args.quant_noise_pq,
                args.quant_noise_pq_block_size,
            )
        return cls.build_embedding(args, dictionary, args.decoder_input_dim)


@register_model_architecture("transformer_lm_evomoe", "transformer_lm_evomoe_gpt_small")
def evomoe_gpt_small(args: Any) -> None:
    """12 layers of width 768 with 16 experts in every second layer."""
    moe_defaults(args, experts=16)
    transformer_lm_gpt3_small(args)


@register_model_architecture("transformer_lm_evomoe", "transformer_lm_evomoe_gpt_medium")
def evomoe_gpt_medium(args: Any) -> None:
    """24 layers of width 1024 with 16 experts in every second layer, the size in the paper."""
    moe_defaults(args, experts=16)
    transformer_lm_gpt3_medium(args)


@register_model_architecture("transformer_lm_evomoe", "transformer_lm_evomoe_gpt_xl")
def evomoe_gpt_xl(args: Any) -> None:
    """24 layers of width 2048 with 16 experts in every second layer."""
    moe_defaults(args, experts=16)
    transformer_lm_gpt3_xl(args)


def _memoryformer(args: Any, layers: int, width: int, heads: int) -> None:
    for name, value in (("layers", layers), ("embed_dim", width), ("attention_heads", heads)):
        setattr(args, f"decoder_{name}", getattr(args, f"decoder_{name}", value))
    memory_defaults(args, "decoder")
    base_gpt3_architecture(args)


@register_model_architecture("transformer_lm_evomoe", "transformer_lm_memoryformer_tiny")
def memoryformer_tiny(args: Any) -> None:
    """6 layers of width 512, as MemoryFormer-tiny (section 3.1 of arXiv 2411.12992)."""
    _memoryformer(args, 6, 512, 8)


@register_model_architecture("transformer_lm_evomoe", "transformer_lm_memoryformer_small")
def memoryformer_small(args: Any) -> None:
    """12 layers of width 768, as MemoryFormer-small."""
    _memoryformer(args, 12, 768, 12)


@register_model_architecture("transformer_lm_evomoe", "transformer_lm_memoryformer_base")
def memoryformer_base(args: Any) -> None:
    """24 layers of width 1024, as MemoryFormer-base."""
    _memoryformer(args, 24, 1024, 16)
