"""`--format nllb-moe`: transformers' own NllbMoe, for translation models that have its shape.

The folder needs neither our classes nor `trust_remote_code`. NllbMoe in transformers 5 (seen in
5.24) computes other experts than the router chose: expert 1 for first choices and expert 0 for all
others. The folder is right for transformers 4, and for any version in which this is mended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

from fairseq_evomoe.tools.checkpoint import in_place_of
from fairseq_evomoe.tools.to_hf.weights import name_for_hf
from fairseq_evomoe.tools.to_hf.write import (
    Options,
    difference,
    generation,
    loaded,
    save_tokenizers,
)

NAMES = (
    ("encoder_attn_layer_norm", "cross_attention_layer_norm"),
    ("encoder_attn", "cross_attention"),
    ("final_layer_norm", "ff_layer_norm"),
    ("moe_layer.gate", "ffn.router.classifier"),
)


def configure(config: Any) -> NllbMoeConfig:
    """The configuration of the NllbMoe that has a model's shape.

    Args:
        config: our configuration of the model.

    Raises:
        ValueError: NllbMoe has no such model; the message names the flag of the training.
    """

    def need(ok: bool, flag: str, why: str) -> None:
        if not ok:
            raise ValueError(f"--format nllb-moe: {flag}: {why}; use --format hf")

    need(config.model_type == "evomoe_translation", "--task", "only translation models have it")
    moe, encoder, decoder = config.moe, config.encoder_stack, config.decoder_stack
    need(moe is not None, "--moe-freq", "the model has no experts, or they have not split yet")
    need(moe["gate"] == "gshard", f"--moe-gate {moe['gate']}", "NllbMoe routes by gshard's top-2")
    for flag, key in (
        ("--moe-shared-expert", "shared"),
        ("--moe-balance-bias", "balance_bias"),
        ("--moe-gate-token-bias", "token_bias"),
    ):
        need(not moe[key], flag, "NllbMoe has no such part")
    need(moe["expert_type"] == "ffn", "--moe-expert-type memory", "NllbMoe has no look-ups")
    need(moe["storage"] == "trained", "--moe-expert-storage int8", "NllbMoe has no int8 experts")
    need(config.memory is None, "--memory-ffn, --memory-attention or --memory-ngram", "no look-ups")
    need(len(config.tied or {}) == 2, "--share-all-embeddings", "NllbMoe has one embedding")
    for name, side in (("encoder", encoder), ("decoder", decoder)):
        need(side["normalize_before"], f"--{name}-normalize-before", "NllbMoe is pre-norm")
        need(side["final_norm"], "--no-decoder-final-norm", "NllbMoe normalises at the end")
        need(
            bool(side["positions"]) and not side["learned_positions"],
            f"--{name}-learned-pos or --no-token-positional-embeddings",
            "NllbMoe has sines and cosines",
        )
        need(not side["norm_embedding"], "--layernorm-embedding", "NllbMoe has no such part")
        need(side["width"] == encoder["width"], f"--{name}-embed-dim", "NllbMoe has one width")
        need(
            len({layer["ffn_width"] for layer in side["layers"]}) == 1,
            "--moe-expert-ffn-dim",
            "experts of NllbMoe are as wide as the dense networks",
        )
    width = encoder["width"]
    need(
        config.activation_function in ("relu", "gelu", "tanh"),
        f"--activation-fn {config.activation_function}",
        "NllbMoe takes relu, gelu or tanh here",
    )
    return NllbMoeConfig(
        vocab_size=config.vocab_size,
        d_model=width,
        num_experts=moe["experts"],
        encoder_layers=len(encoder["layers"]),
        decoder_layers=len(decoder["layers"]),
        encoder_attention_heads=encoder["heads"],
        decoder_attention_heads=decoder["heads"],
        encoder_ffn_dim=encoder["layers"][0]["ffn_width"],
        decoder_ffn_dim=decoder["layers"][0]["ffn_width"],
        encoder_sparse_step=_step(encoder),
        decoder_sparse_step=_step(decoder),
        max_position_embeddings=max(encoder["positions"], decoder["positions"]),
        scale_embedding=encoder["embed_scale"] != 1,
        activation_function=config.activation_function,
        dropout=config.dropout,
        attention_dropout=config.attention_dropout,
        activation_dropout=config.activation_dropout,
        router_aux_loss_coef=config.router_aux_loss_coef,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        # in evaluation it would shrink the experts' output
        moe_token_dropout=0.0,
        second_expert_policy="all",
        decoder_start_token_id=config.decoder_start_token_id,
        tie_word_embeddings=True,
    )


def _step(side: dict[str, Any]) -> int:
    """Every so many layers one has experts; 0 if none has."""
    kinds = [layer["ffn"] for layer in side["layers"]]
    return kinds.index("moe") + 1 if "moe" in kinds else 0


def weights(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """fairseq's tensors under NllbMoe's names."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = name_for_hf(name)
        for old, new in NAMES:
            ours = ours.replace(f".{old}.", f".{new}.")
        if ".moe_layer.experts." in ours:
            short = ours[-2:]
            part = f"fc{short[1]}.{'weight' if short[0] == 'w' else 'bias'}"
            place = ours.removesuffix(f"moe_layer.experts.{short}")
            for e, one in enumerate(value):
                found[f"{place}ffn.experts.expert_{e}.{part}"] = one
        elif ours in wanted:
            found[ours] = value
    found["model.shared.weight"] = state["encoder.embed_tokens.weight"]
    return {name: value for name, value in found.items() if name in wanted}


@contextmanager
def the_chosen_experts() -> Iterator[None]:
    """Within, NllbMoe computes the experts that its router chose."""
    layer: Any = NllbMoeSparseMLP
    broken = layer.forward

    def forward(self: Any, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, x.size(-1))
        # the mask marks what may be seen, and the router takes it for padding
        _, weight, _ = self.router(flat, None)
        experts = (self.experts[f"expert_{e}"] for e in range(self.num_experts))
        parts = [weight[:, e, None] * expert(flat) for e, expert in enumerate(experts)]
        return torch.stack(parts).sum(0).reshape(x.shape)

    layer.forward = forward
    try:
        yield
    finally:
        layer.forward = broken


def export(source: Path, folder: Path, options: Options) -> float:
    """Write the folder, and return the largest difference of logits from fairseq's model.

    The comparison computes the experts that the router chose, as NllbMoe of transformers 4 does.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: NllbMoe has no such model, or the two models differ; nothing is written.
    """
    checkpoint, model, _, task, config = loaded(source, options)
    theirs = configure(config)
    nllb = NllbMoeForConditionalGeneration(theirs).eval()
    state = weights(checkpoint["model"], set(nllb.state_dict()))
    nllb.load_state_dict(state, strict=False, assign=True)
    nllb.tie_weights()
    with the_chosen_experts():
        found = difference(model, nllb, config.model_type)
    nllb.generation_config = generation(config, options)
    with in_place_of(folder) as partial:
        partial.mkdir()
        nllb.save_pretrained(partial, max_shard_size=options.shard_size)
        save_tokenizers(task, config, partial, options)
    return found
