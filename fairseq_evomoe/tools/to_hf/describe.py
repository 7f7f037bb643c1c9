"""The configuration for transformers that describes a model of fairseq."""

from typing import Any

from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel
from torch import nn

from fairseq_evomoe.hf.configuration_evomoe import (
    EvoMoEConfig,
    EvoMoELanguageModelConfig,
    EvoMoEMaskedLMConfig,
    EvoMoETranslationConfig,
)
from fairseq_evomoe.hf.feed_forward_evomoe import ACTIVATIONS
from fairseq_evomoe.hf.routing_evomoe import GATES
from fairseq_evomoe.kernels.lookup.score import linear_gain
from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.layer import MemoryFFN
from fairseq_evomoe.modules.experts import ExpertBank
from fairseq_evomoe.modules.moe_layer import EvoMoELayer, moe_layers
from fairseq_evomoe.modules.output_layer import Int8OutputLayer
from fairseq_evomoe.modules.plan import Phase
from fairseq_evomoe.schedule import Stage
from fairseq_evomoe.tools.checkpoint import built

CONFIGS = {
    TransformerModel: EvoMoETranslationConfig,
    TransformerLanguageModel: EvoMoELanguageModelConfig,
    RobertaModel: EvoMoEMaskedLMConfig,
}
"""Class of fairseq's family -> the class of its configuration."""


def refuse(flag: str, why: str) -> None:
    """Say that a model cannot be exported.

    Raises:
        ValueError: always; the message names the flag of the training.
    """
    raise ValueError(f"--format hf: the model was trained with {flag}, {why}")


def stacks_of(model: nn.Module) -> dict[str, Any]:
    """The encoder and the decoder of a model, by side."""
    if isinstance(model, RobertaModel):
        return {"encoder": model.encoder.sentence_encoder}
    return {side: getattr(model, side) for side in ("encoder", "decoder") if hasattr(model, side)}


def phase_of(model: nn.Module) -> Phase | None:
    """Stage and temperature of a model's MoE layers, or None if it has no such layers.

    Raises:
        ValueError: they differ.
    """
    phases = {layer.phase for _, layer in moe_layers(model)}
    if len(phases) > 1:
        raise ValueError("--format hf: the MoE layers are not in one stage")
    return next(iter(phases), None)


def describe(model: nn.Module, flags: Any, balance: float) -> EvoMoEConfig:
    """Describe a built model.

    Args:
        model: with its weights, in evaluation.
        flags: of the model, as the checkpoint has them.
        balance: weight of the balance loss in training.

    Raises:
        ValueError: a part of the model has no counterpart; the message names the flag.
    """
    family = next((c for cls, c in CONFIGS.items() if isinstance(model, cls)), None)
    if family is None:
        raise ValueError(f"--format hf: {type(model).__name__} is none of the three families")
    stacks = stacks_of(model)
    last: Any = stacks.get("decoder", stacks.get("encoder"))
    cfg, phase = last.cfg, phase_of(model)
    activation = str(cfg.activation_fn)
    if activation not in ACTIVATIONS:
        refuse(f"--activation-fn {activation}", f"which is none of {', '.join(ACTIVATIONS)}")
    memory = MemoryConfig.from_args(built(flags))
    sides = {
        name: _stack(stack, phase, cross=name == "decoder" and len(stacks) == 2)
        for name, stack in stacks.items()
    }
    config = family(
        **{f"{name}_stack": side for name, side in sides.items()},
        moe=_moe(model, phase),
        memory=_memory(memory) if _has_look_ups(sides, memory, model) else None,
        tied=tied(model),
        vocab_size=_words(model, last),
        hidden_size=last.layers[0].embed_dim,
        num_hidden_layers=len(last.layers),
        num_attention_heads=last.layers[0].self_attn.num_heads,
        activation_function=activation,
        dropout=cfg.dropout,
        attention_dropout=cfg.attention_dropout,
        activation_dropout=cfg.activation_dropout or getattr(cfg, "relu_dropout", 0.0),
        router_aux_loss_coef=balance,
        pad_token_id=last.padding_idx,
    )
    # given as False in transformers' defaults, it would untie what is tied here
    config.tie_word_embeddings = bool(config.tied)
    if isinstance(model, RobertaModel):
        _classifier(config, model)
    return config


def _words(model: nn.Module, last: Any) -> int:
    if isinstance(model, RobertaModel):
        return model.encoder.lm_head.bias.numel()
    if getattr(last, "adaptive_softmax", None) is not None:
        refuse("--adaptive-softmax-cutoff", "whose output layer has no counterpart")
    if isinstance(last.output_projection, Int8OutputLayer):
        refuse("--output-storage int8", "which has no counterpart; export the model without it")
    return last.output_projection.weight.size(0)


def _stack(stack: Any, phase: Phase | None, *, cross: bool) -> dict[str, Any]:
    embedding = stack.embed_tokens
    if type(embedding) is not nn.Embedding:
        refuse(
            "--adaptive-input or --character-embeddings",
            f"so that its input is a {type(embedding).__name__}, which has no counterpart",
        )
    if stack.quant_noise is not None:
        refuse("--quant-noise-pq", "which adds a layer behind the embeddings")
    if getattr(stack, "cross_self_attention", False):
        refuse("--cross-self-attention", "which has no counterpart")
    layers, positions = list(stack.layers), stack.embed_positions
    learned = isinstance(positions, nn.Embedding)
    width = layers[0].embed_dim
    projects_out = getattr(stack, "project_out_dim", None)
    return {
        "width": width,
        "heads": layers[0].self_attn.num_heads,
        "vocabulary": embedding.num_embeddings,
        "input_width": embedding.embedding_dim,
        "output_width": width if projects_out is None else projects_out.out_features,
        "embed_scale": stack.embed_scale,
        "normalize_before": bool(layers[0].normalize_before),
        "final_norm": stack.layer_norm is not None,
        "norm_embedding": stack.layernorm_embedding is not None,
        "positions": 0 if positions is None else _positions(stack, positions),
        "learned_positions": learned,
        "layers": [_layer(layer, phase, cross=cross) for layer in layers],
    }


def _positions(stack: Any, positions: Any) -> int:
    if isinstance(positions, nn.Embedding):
        return positions.num_embeddings - int(positions.padding_idx or 0) - 1
    return getattr(stack, "max_source_positions", None) or stack.max_target_positions


def _ffn_width(layer: Any) -> int:
    for part in (layer, getattr(layer, "memory_ffn", None)):
        if isinstance(getattr(part, "fc1", None), nn.Linear):
            return int(part.fc1.out_features)  # type: ignore[union-attr]
    bank = getattr(getattr(layer, "moe_layer", None), "experts", None)
    return bank.hidden if isinstance(bank, ExpertBank) else 0


def _layer(layer: Any, phase: Phase | None, *, cross: bool) -> dict[str, Any]:
    if type(layer).__name__ == "BaseLayer":
        refuse("--base-layers", "fairseq's own BASE layers, which have no counterpart")
    if any(getattr(part, "was_dense", False) for part in layer.modules()):
        refuse(
            "--memory-spawn-update",
            "and still holds its dense layers: take what evomoe-export --tables fp32 makes of it",
        )
    attention = layer.self_attn
    if attention.bias_k is not None or attention.add_zero_attn:
        refuse("biases of keys and values", "which have no counterpart")
    if cross and layer.encoder_attn is None:
        refuse("--no-cross-attention", "which has no counterpart")
    kind = "dense"
    if hasattr(layer, "moe_layer"):
        kind = "moe"
        if phase is not None and phase.stage == Stage.DIVERSIFY:
            kind = "dense" if isinstance(layer.moe_layer.experts, ExpertBank) else "memory"
    elif hasattr(layer, "memory_ffn"):
        kind = "memory" if isinstance(layer.memory_ffn, MemoryFFN) else "beside"
    looks_up = isinstance(attention, MemoryAttention)
    return {
        "attention": "memory" if looks_up else "linear",
        "ffn": kind,
        "ffn_width": _ffn_width(layer),
    }


def _moe(model: nn.Module, phase: Phase | None) -> dict[str, Any] | None:
    if phase is None or phase.stage == Stage.DIVERSIFY:
        return None
    layers = [layer for _, layer in moe_layers(model)]
    layer: EvoMoELayer = layers[0]
    cfg, gate = layer.cfg, layer.gate
    if cfg.moe_gate not in GATES or not type(gate).__module__.startswith("fairseq_evomoe."):
        refuse(f"--moe-gate {cfg.moe_gate}", f"which is none of {', '.join(GATES)}")
    dts = cfg.moe_gate == "dts"
    return {
        "gate": cfg.moe_gate,
        "experts": cfg.moe_expert_count,
        "expert_type": str(cfg.moe_expert_type),
        "shared": layer.experts.shared,
        "storage": str(cfg.moe_expert_storage),
        "balance_bias": cfg.moe_balance_bias,
        "token_bias": bool(cfg.token_bias),
        "top_k": cfg.dts_top_k if dts else cfg.moe_top_k,
        "threshold": cfg.threshold if dts else 0.0,
        "max_experts": cfg.dts_max_experts,
        "combine": str(cfg.dts_combine),
        "parity": cfg.dts_parity,
        "choice_experts": cfg.moe_choice_experts,
        "choice_group": str(cfg.moe_choice_group),
        "stage": int(phase.stage),
        "temperature": phase.temperature,
        "anneal_left": phase.anneal_left,
    }


def _has_look_ups(sides: dict[str, Any], memory: MemoryConfig, model: nn.Module) -> bool:
    layers = [layer for side in sides.values() for layer in side["layers"]]
    of_experts = any(str(m.cfg.moe_expert_type) == "memory" for _, m in moe_layers(model))
    return bool(
        memory.memory_ngram
        or of_experts
        or any(x["attention"] == "memory" or x["ffn"] in ("memory", "beside") for x in layers)
    )


def _memory(cfg: MemoryConfig) -> dict[str, Any]:
    score, wide = str(cfg.memory_score), cfg.memory_bits + cfg.memory_delta
    return {
        "bits": cfg.memory_bits,
        "delta": cfg.memory_delta,
        "ffn_embed_dim": cfg.memory_ffn_embed_dim,
        "score": score,
        "temperature": cfg.memory_temperature,
        "norm": str(cfg.memory_norm),
        "out_proj": str(cfg.memory_out_proj),
        "lr_scale": cfg.memory_lr_scale,
        "linear": cfg.memory_linear,
        "gain": {
            str(bits): linear_gain(score, bits, cfg.memory_temperature)
            for bits in {cfg.memory_bits, wide}
        },
        "tables": str(cfg.memory_tables),
        "ngram": cfg.memory_ngram,
        "ngram_rows": cfg.memory_ngram_rows,
    }


def tied(model: nn.Module) -> dict[str, str]:
    """Which of the weights for transformers are one tensor: name -> name of the first."""
    stacks = stacks_of(model)
    named = {f"model.{s}.embed_tokens.weight": stack.embed_tokens for s, stack in stacks.items()}
    weights = {name: module.weight for name, module in named.items() if hasattr(module, "weight")}
    head = model.encoder.lm_head if isinstance(model, RobertaModel) else None
    if head is None:
        head = getattr(stacks["decoder"], "output_projection", None)
    if head is not None:
        weights["lm_head.weight"] = head.weight
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, weight in weights.items():
        origin = first.setdefault(weight.data_ptr(), name)
        if origin != name:
            found[name] = origin
    return found


def _classifier(config: EvoMoEConfig, model: RobertaModel) -> None:
    heads = model.classification_heads
    if len(heads) > 1:
        raise ValueError(f"--format hf: the model has {len(heads)} classifiers; keep one")
    for head in heads.values():
        if not isinstance(head.out_proj, nn.Linear) or hasattr(head.out_proj, "weight_orig"):
            refuse("--spectral-norm-classification-head", "which has no counterpart")
        config.num_labels = head.out_proj.out_features
        config.classifier_dropout = head.dropout.p
        config.classifier_activation = str(model.args.pooler_activation_fn)
