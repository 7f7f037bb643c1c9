"""fairseq's Transformer encoder and decoder with MoE layers, shared by all model families."""

from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models.transformer import (
    TransformerConfig,
    TransformerDecoderBase,
    TransformerEncoderBase,
)
from torch import Tensor, nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.ngrams import AddNgrams, NgramTables, adding
from fairseq_evomoe.memory.sizes import check_table_memory
from fairseq_evomoe.models.transformer_layer import build_layer, tokens_of
from fairseq_evomoe.modules.gates import GATES
from fairseq_evomoe.modules.output_layer import int8_output_layer
from fairseq_evomoe.modules.plan import TokenBatch
from fairseq_evomoe.old_names import upgrade_values


class EvoMoEEncoder(TransformerEncoderBase):
    """fairseq's Transformer encoder, with experts and look-ups where the flags put them."""

    _built = 0

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(cfg, *args, **kwargs)
        _build_ngrams(self, cfg, "encoder")

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        # fairseq does not tell its builders which layer they build
        self._built += 1
        return build_layer(
            cfg,
            "encoder",
            self._built - 1,
            return_fc=self.return_fc,
            dictionary=self.dictionary,
        )

    def forward_scriptable(self, src_tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        added = None if self.ngrams is None else self.ngrams(src_tokens)
        with tokens_of(TokenBatch(src_tokens, self.padding_idx)), adding(added):
            return super().forward_scriptable(src_tokens, *args, **kwargs)


class EvoMoEDecoder(TransformerDecoderBase):
    """fairseq's Transformer decoder, with experts and look-ups where the flags put them.

    Args:
        reads: dictionary of the input tokens, if it differs from that of the output tokens.
    """

    _built = 0

    def __init__(self, cfg: Any, dictionary: Any, *args: Any, reads: Any = None, **kw: Any) -> None:
        self._reads = dictionary if reads is None else reads
        super().__init__(cfg, dictionary, *args, **kw)
        _build_ngrams(self, cfg, "decoder")

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        self._built += 1
        return build_layer(cfg, "decoder", self._built - 1, no_encoder_attn, dictionary=self._reads)

    def build_output_projection(self, cfg: Any, dictionary: Any, embed_tokens: nn.Module) -> None:
        super().build_output_projection(cfg, dictionary, embed_tokens)
        if cfg.moe.output_storage == "int8":
            self.output_projection = int8_output_layer(self.get_submodule("output_projection"))

    def extract_features_scriptable(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Any,
        incremental_state: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        last = incremental_state is not None
        states = prev_output_tokens[:, -1:] if last else prev_output_tokens
        added = None if self.ngrams is None else self.ngrams(prev_output_tokens, last=last)
        with tokens_of(TokenBatch(states, self.padding_idx)), adding(added):
            return super().extract_features_scriptable(
                prev_output_tokens, encoder_out, incremental_state, *args, **kwargs
            )


def _build_ngrams(stack: Any, cfg: Any, side: str) -> None:
    """Give an encoder or decoder its n-gram tables, if the flags ask for them."""
    stack.ngrams = None
    if cfg.memory.memory_ngram:
        width = getattr(cfg, side).embed_dim
        stack.ngrams = NgramTables(width, cfg.memory, pad=stack.padding_idx)
        stack.dropout_module = AddNgrams(stack.dropout_module)


def build_encoder(cfg: Any, dictionary: Any, embed_tokens: nn.Module) -> TransformerEncoderBase:
    """An encoder: fairseq's own, which torch.jit can script, if flags change nothing in it."""
    cls = TransformerEncoderBase if is_plain(cfg, "encoder") else EvoMoEEncoder
    return cls(cfg, dictionary, embed_tokens)


def build_decoder(
    cfg: Any, dictionary: Any, embed_tokens: nn.Module, *, reads: Any = None, **kwargs: Any
) -> TransformerDecoderBase:
    """A decoder, likewise; the arguments are those of `EvoMoEDecoder`."""
    if is_plain(cfg, "decoder"):
        return TransformerDecoderBase(cfg, dictionary, embed_tokens, **kwargs)
    return EvoMoEDecoder(cfg, dictionary, embed_tokens, reads=reads, **kwargs)


def is_plain(cfg: Any, side: str) -> bool:
    """Whether "encoder" or "decoder" has neither experts, nor look-ups, nor int8 weights."""
    moe, memory = cfg.moe, cfg.memory
    return not (
        moe.freq(side)
        or (side == "decoder" and moe.output_storage == "int8")
        or memory.memory_ngram
        or ((memory.memory_ffn or memory.memory_attention) and _covers_a_layer(cfg, side))
    )


def _covers_a_layer(cfg: Any, side: str) -> bool:
    return any(cfg.memory.covers(i) for i in range(getattr(cfg, side).layers))


def add_flags(parser: Any) -> None:
    """Add our flags to a parser, for models that fairseq configures through argparse."""
    for flags in (MoEConfig(), MemoryConfig()):
        gen_parser_from_dataclass(parser, flags, delete_default=True, with_prefix="")


def configure(args: Any, *sides: str) -> TransformerConfig:
    """Check our flags and return fairseq's Transformer configuration with them.

    They become its attributes `moe` and `memory`.

    Args:
        args: Namespace or DictConfig with every flag.
        sides: which of "encoder" and "decoder" the model has. An MoE frequency given for a side
            that it does not have is refused.

    Raises:
        ValueError: a flag is out of range; the message names it and the fix.
    """
    moe = MoEConfig.from_args(args)
    upgrade_values(moe, warn=True)
    for side in {"encoder", "decoder"} - set(sides):
        flag = f"--{side}-moe-freq"
        moe.need(getattr(moe, f"{side}_moe_freq") == 0, flag, f"this model has no {side}")
    moe.need(
        "decoder" in sides or moe.output_storage == "trained",
        "--output-storage",
        "this model has no decoder",
    )
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
        raise ValueError(
            "--cross-self-attention: memory attention does not support it; leave out this flag or "
            "--memory-attention"
        )
    counts = {side: getattr(cfg, side).layers for side in sides}
    _check_some_layer_has_experts(moe, counts)
    _check_layers_exist(memory, counts)
    cfg.moe, cfg.memory = moe, memory
    check_table_memory(cfg, *sides)
    return cfg


def _check_layers_exist(memory: MemoryConfig, layers: dict[str, int]) -> None:
    """Refuse `--memory-layers` that no side of the model has; `layers` as below."""
    counts = " and ".join(f"{count} {side} layers" for side, count in layers.items())
    memory.need(
        all(n < max(layers.values()) for n in memory.layers() or ()),
        "--memory-layers",
        f"there are {counts}, which are numbered from 0",
    )


def _check_some_layer_has_experts(moe: MoEConfig, layers: dict[str, int]) -> None:
    """Refuse frequencies under which every layer would stay dense.

    Args:
        layers: "encoder" or "decoder" -> its number of layers.
    """
    for side, count in layers.items():
        flag = f"--{side}-moe-freq"
        moe.need(moe.given(flag) <= count, flag, f"the {side} has only {count} layers")
    counts = ", ".join(f"{count} {side} layers" for side, count in layers.items())
    moe.need(
        moe.moe_freq <= max(layers.values()),
        "--moe-freq",
        f"no layer would have experts: there are {counts}; give a smaller number, or 0 for a "
        "dense model",
    )


def moe_defaults(args: Any, *, experts: int) -> None:
    """Set architecture defaults: `experts` experts in every second layer."""
    # if a frequency is given for one side only, the other side stays dense
    one_sided = getattr(args, "encoder_moe_freq", 0) or getattr(args, "decoder_moe_freq", 0)
    args.moe_freq = getattr(args, "moe_freq", 0 if one_sided else 2)
    args.moe_expert_count = getattr(args, "moe_expert_count", experts)


def memory_defaults(args: Any, *sides: str) -> None:
    """Set a MemoryFormer's architecture defaults: look-ups everywhere, pre-norm, no experts."""
    for name in ("memory_ffn", "memory_attention"):
        setattr(args, name, getattr(args, name, True))
    for side in sides:
        setattr(args, f"{side}_normalize_before", getattr(args, f"{side}_normalize_before", True))
    args.moe_freq = getattr(args, "moe_freq", 0)
