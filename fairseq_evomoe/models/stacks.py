"""fairseq's Transformer encoder and decoder with MoE layers: what all model families share."""

from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
)
from torch import nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory_config import MemoryConfig
from fairseq_evomoe.models.table_memory import state_tables
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.transformer_layer import DecoderLayer, EncoderLayer, LayerStack, wrap


class EvoMoEEncoder(LayerStack, TransformerEncoderBase):
    """fairseq's Transformer encoder, with MoE layers where the flags put them."""

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        layer = EncoderLayer(
            cfg, self.next_index(), return_fc=self.return_fc, dictionary=self.dictionary
        )
        return wrap(layer, cfg)

    def forward_scriptable(self, src_tokens, *args, **kwargs):
        self.hand_down(src_tokens)
        return super().forward_scriptable(src_tokens, *args, **kwargs)


class EvoMoEDecoder(LayerStack, TransformerDecoderBase):
    """fairseq's Transformer decoder, with MoE layers where the flags put them.

    Args:
        reads: dictionary of the tokens it reads, where that is not the one it writes.
    """

    def __init__(self, cfg: Any, dictionary: Any, *args: Any, reads: Any = None, **kw: Any) -> None:
        self._reads = dictionary if reads is None else reads
        super().__init__(cfg, dictionary, *args, **kw)

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        layer = DecoderLayer(cfg, self.next_index(), no_encoder_attn, dictionary=self._reads)
        return wrap(layer, cfg)

    def extract_features_scriptable(
        self, prev_output_tokens, encoder_out, incremental_state=None, *args, **kwargs
    ):
        incremental = incremental_state is not None
        self.hand_down(prev_output_tokens[:, -1:] if incremental else prev_output_tokens)
        return super().extract_features_scriptable(
            prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
        )


def add_flags(parser: Any) -> None:
    """Our flags on a parser, for models that fairseq configures by arguments."""
    for flags in (MoEConfig(), MemoryConfig()):
        gen_parser_from_dataclass(parser, flags, delete_default=True, with_prefix="")


def configure(args: Any, *sides: str) -> TransformerConfig:
    """fairseq's configuration of a Transformer, with our flags, checked, as its `moe` and `memory`.

    Args:
        args: Namespace or DictConfig with every flag.
        sides: "encoder", "decoder": what the model has; the other's frequency means nothing.

    Raises:
        ValueError: a flag is out of range; the message names it and the fix.
    """
    moe = MoEConfig.from_args(args)
    for side in {"encoder", "decoder"} - set(sides):
        flag = f"--{side}-moe-freq"
        moe.need(getattr(moe, f"{side}_moe_freq") == 0, flag, f"this model has no {side}")
    moe.check(GATES)
    cfg = TransformerConfig.from_namespace(args)
    memory = MemoryConfig.from_args(args).check()
    replaced = any(moe.freq(s) for s in sides) or memory.memory_ffn or memory.memory_attention
    for flag, given in (
        (f"--quant-noise-pq {cfg.quant_noise.pq}", cfg.quant_noise.pq),
        ("--scale-fc", getattr(args, "scale_fc", False)),
    ):
        if given and replaced:
            raise ValueError(
                f"{flag}: acts inside the dense FFN, which an MoE or memory layer does not have; "
                "leave it out, or use --moe-freq 0 without --memory-ffn"
            )
    if memory.memory_attention and getattr(args, "cross_self_attention", False):
        raise ValueError("--cross-self-attention: memory attention has none; leave one out")
    cfg.moe, cfg.memory = moe, memory
    state_tables(cfg, *sides)
    return cfg


def evolve(args: Any, *, experts: int) -> None:
    """Architecture defaults: `experts` in every second layer."""
    # a frequency given for one side leaves the other dense
    one_sided = getattr(args, "encoder_moe_freq", 0) or getattr(args, "decoder_moe_freq", 0)
    args.moe_freq = getattr(args, "moe_freq", 0 if one_sided else 2)
    args.moe_expert_count = getattr(args, "moe_expert_count", experts)


def memorise(args: Any, *sides: str) -> None:
    """Architecture defaults of a MemoryFormer: look-ups everywhere, norms first, no experts."""
    for name in ("memory_ffn", "memory_attention"):
        setattr(args, name, getattr(args, name, True))
    for side in sides:
        setattr(args, f"{side}_normalize_before", getattr(args, f"{side}_normalize_before", True))
    args.moe_freq = getattr(args, "moe_freq", 0)
