"""Dense models of transformers as dense checkpoints of fairseq, for `evomoe-upcycle --from-hf`.

GPT-2 becomes a pre-norm language model with learned positions. Marian becomes a post-norm
translation model whose sines and cosines are learned positions with the same values, because
fairseq's have other frequencies; and since Marian's decoder starts from `<pad>` and fairseq's from
`</s>`, the decoder has embeddings of its own. The words keep their order behind fairseq's four
special ones.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf
from torch import Tensor, nn

import fairseq_evomoe.hf  # noqa: F401  # before transformers; see there
from fairseq_evomoe.tools.checkpoint import in_place_of

ACTIVATIONS = {
    **{"gelu_new": "gelu_accurate", "gelu_pytorch_tanh": "gelu_accurate", "gelu": "gelu"},
    **{"relu": "relu", "tanh": "tanh"},
}
"""transformers' names -> fairseq's, which has no swish that works."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A model of transformers in fairseq's terms.

    Attributes:
        flags: of fairseq-train, for a dense model.
        languages: endings of the dictionaries' names; "" for a language model.
        dictionary: the words.
        state: fairseq's weights.
    """

    flags: list[str]
    languages: tuple[str, ...]
    dictionary: Dictionary
    state: dict[str, Tensor]


def need(ok: bool, what: str, why: str) -> None:
    """Refuse a model that has no counterpart.

    Raises:
        ValueError: it has none; the message names the setting in its config.json.
    """
    if not ok:
        raise ValueError(f"--from-hf: {what}: {why}")


def read(folder: Path, languages: tuple[str, str] | None, *, drop_bias: bool) -> Converted:
    """Convert a folder with a GPT-2 or Marian model and its tokenizer.

    Args:
        languages: source and target, for a translation model.
        drop_bias: leave out Marian's bias of the output words, which fairseq does not have.

    Raises:
        ValueError: the architecture has no counterpart, or files are missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(folder)
        words = AutoTokenizer.from_pretrained(folder)
        kinds = {"gpt2": AutoModelForCausalLM, "marian": AutoModelForSeq2SeqLM}
        need(
            config.model_type in kinds,
            f"model_type {config.model_type!r}",
            f"only {' and '.join(kinds)} map to models of this package",
        )
        model = kinds[config.model_type].from_pretrained(folder, dtype=torch.float32)
    except OSError as error:
        raise ValueError(f"--from-hf {folder}: {str(error).splitlines()[0]}") from error
    if config.model_type == "gpt2":
        return _gpt2(model, words)
    need(languages is not None, "model_type 'marian'", "give --source-lang and --target-lang too")
    return _marian(model, words, languages or ("", ""), drop_bias=drop_bias)


def _dictionary(words: Any, size: int, special: dict[str, str]) -> tuple[Dictionary, list[int]]:
    """fairseq's dictionary of a tokenizer's words, and the row of each word.

    Args:
        size: number of rows of the embeddings.
        special: fairseq's special words -> the words whose rows they have; others have zeros.
    """
    dictionary = Dictionary()
    rows = {dictionary.index(s): words.convert_tokens_to_ids(w) for s, w in special.items()}
    taken = set(rows.values())
    known = words.convert_ids_to_tokens(list(range(min(size, len(words)))))
    for row, word in enumerate(known):
        if row in taken or word is None:
            continue
        if word in dictionary.indices:
            rows.setdefault(dictionary.index(word), row)
            continue
        rows[dictionary.add_symbol(word.replace(" ", "\u2581"))] = row
    return dictionary, [rows.get(i, -1) for i in range(len(dictionary))]


def _rows(embedding: Tensor, rows: list[int]) -> Tensor:
    """The embeddings in the dictionary's order, with zeros for words that have none."""
    index = torch.tensor(rows)
    return embedding[index.clamp(min=0)] * (index >= 0)[:, None]


def _positions(table: Tensor) -> Tensor:
    """Learned positions as fairseq stores them, which begin behind the id of padding."""
    return torch.cat([table.new_zeros(2, table.size(1)), table])


def _activation(name: str) -> str:
    known = ", ".join(ACTIVATIONS)
    need(name in ACTIVATIONS, f"activation_function {name!r}", f"fairseq has only {known}")
    return ACTIVATIONS[name]


def _gpt2(model: Any, words: Any) -> Converted:
    config = model.config
    for name, usual in (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
        ("layer_norm_epsilon", 1e-5),
        ("tie_word_embeddings", True),
    ):
        have = getattr(config, name)
        need(have == usual, f"{name} {have}", f"fairseq's decoder has {usual}")
    need(words.eos_token is not None, "the tokenizer", "it has no eos_token, which fairseq needs")
    dictionary, rows = _dictionary(words, config.vocab_size, {"</s>": words.eos_token})
    parts = model.transformer
    state = {
        "decoder.embed_tokens.weight": _rows(parts.wte.weight, rows),
        "decoder.embed_positions.weight": _positions(parts.wpe.weight),
        "decoder.layer_norm.weight": parts.ln_f.weight,
        "decoder.layer_norm.bias": parts.ln_f.bias,
    }
    state["decoder.output_projection.weight"] = state["decoder.embed_tokens.weight"]
    for i, layer in enumerate(parts.h):
        place = f"decoder.layers.{i}."
        # GPT-2 stores its matrices the other way round, and those of q, k and v as one
        for name, weight, bias in zip(
            "qkv",
            layer.attn.c_attn.weight.chunk(3, 1),
            layer.attn.c_attn.bias.chunk(3),
            strict=True,
        ):
            state[f"{place}self_attn.{name}_proj.weight"] = weight.t().contiguous()
            state[f"{place}self_attn.{name}_proj.bias"] = bias
        for name, part in (
            ("self_attn.out_proj", layer.attn.c_proj),
            ("fc1", layer.mlp.c_fc),
            ("fc2", layer.mlp.c_proj),
        ):
            state[f"{place}{name}.weight"] = part.weight.t().contiguous()
            state[f"{place}{name}.bias"] = part.bias
        _copy(state, place, {"self_attn_layer_norm": layer.ln_1, "final_layer_norm": layer.ln_2})
    width = config.n_embd
    flags = [
        *("--task", "language_modeling_evomoe", "--arch", "transformer_lm_evomoe"),
        *("--decoder-layers", config.n_layer, "--decoder-embed-dim", width),
        *("--decoder-ffn-embed-dim", config.n_inner or 4 * width),
        *("--decoder-attention-heads", config.n_head, "--decoder-normalize-before"),
        *("--decoder-learned-pos", "--no-scale-embedding", "--share-decoder-input-output-embed"),
        *("--activation-fn", _activation(config.activation_function)),
        *("--max-target-positions", config.n_positions, "--tokens-per-sample", config.n_positions),
        *("--dropout", config.resid_pdrop, "--attention-dropout", config.attn_pdrop),
        *("--criterion", "cross_entropy"),
    ]
    return Converted(flags=[*map(str, flags)], languages=("",), dictionary=dictionary, state=state)


def _marian(model: Any, words: Any, languages: tuple[str, str], *, drop_bias: bool) -> Converted:
    config = model.config
    need(
        config.share_encoder_decoder_embeddings,
        "share_encoder_decoder_embeddings false",
        "only one vocabulary for both languages is supported",
    )
    need(config.tie_word_embeddings, "tie_word_embeddings false", "the output must be tied")
    need(
        drop_bias or not bool(model.final_logits_bias.any()),
        "final_logits_bias",
        "fairseq's output layer has no bias; --drop-logits-bias leaves it out, which further "
        "training has to make good",
    )
    for name in ("eos_token", "unk_token", "pad_token"):
        need(getattr(words, name) is not None, "the tokenizer", f"it has no {name}")
    special = {"</s>": words.eos_token, "<unk>": words.unk_token, "<pad>": words.pad_token}
    dictionary, rows = _dictionary(words, config.vocab_size, special)
    shared = _rows(model.model.shared.weight, rows)
    reads = shared.clone()
    reads[dictionary.eos()] = model.model.shared.weight[config.decoder_start_token_id]
    state = {"encoder.embed_tokens.weight": shared, "decoder.embed_tokens.weight": reads}
    state["decoder.output_projection.weight"] = shared.clone()
    for side in ("encoder", "decoder"):
        stack = getattr(model.model, side)
        table = stack.embed_positions.weight
        state[f"{side}.embed_positions.weight"] = _positions(table)
        for i, layer in enumerate(stack.layers):
            named = {
                n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm)
            }
            _copy(state, f"{side}.layers.{i}.", named)
    flags = [
        *("--task", "translation_evomoe", "--arch", "transformer_evomoe"),
        *("--source-lang", languages[0], "--target-lang", languages[1]),
        *("--encoder-layers", config.encoder_layers, "--decoder-layers", config.decoder_layers),
        *("--encoder-embed-dim", config.d_model, "--decoder-embed-dim", config.d_model),
        *("--encoder-ffn-embed-dim", config.encoder_ffn_dim),
        *("--decoder-ffn-embed-dim", config.decoder_ffn_dim),
        *("--encoder-attention-heads", config.encoder_attention_heads),
        *("--decoder-attention-heads", config.decoder_attention_heads),
        *("--encoder-learned-pos", "--decoder-learned-pos"),
        *([] if config.scale_embedding else ["--no-scale-embedding"]),
        *("--activation-fn", _activation(config.activation_function)),
        *("--max-source-positions", config.max_position_embeddings),
        *("--max-target-positions", config.max_position_embeddings),
        *("--dropout", config.dropout, "--attention-dropout", config.attention_dropout),
        *("--activation-dropout", config.activation_dropout),
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1),
    ]
    return Converted(
        flags=[*map(str, flags)], languages=languages, dictionary=dictionary, state=state
    )


def _copy(state: dict[str, Tensor], place: str, modules: dict[str, Any]) -> None:
    """Add the weights and biases of some modules, by their names in fairseq."""
    for name, module in modules.items():
        state[f"{place}{name}.weight"] = module.weight
        state[f"{place}{name}.bias"] = module.bias


def dense_checkpoint(found: Converted, data: Path) -> dict[str, Any]:
    """A checkpoint of the dense model, as fairseq-train writes one, and its dictionaries.

    Args:
        data: folder for the dictionaries, which is made.

    Raises:
        FileExistsError: `data` exists.
        RuntimeError: the weights do not fit the model.
    """
    with in_place_of(data) as partial:
        partial.mkdir()
        for language in found.languages:
            name = ".".join(part for part in ("dict", language, "txt") if part)
            found.dictionary.save(str(partial / name))
    parser = options.get_training_parser()
    more = ["--moe-freq", "0", "--optimizer", "adam", "--max-tokens", "4096"]
    args = options.parse_args_and_arch(parser, [str(data), *found.flags, *more])
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    # what fairseq saves and transformers has not
    extra = ("version", "_extra_state")
    state = {name: v for name, v in model.state_dict().items() if name.endswith(extra)}
    state |= {name: value.detach().clone() for name, value in found.state.items()}
    model.load_state_dict(state, strict=True)
    whole: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    # fairseq keeps the flags of models that it configures through argparse as they are
    whole["model"] = cfg.model if not OmegaConf.is_config(cfg.model) else whole["model"]
    return {
        "args": None,
        "cfg": whole,
        "model": model.state_dict(),
        "optimizer_history": [
            {
                "criterion_name": "",
                "optimizer_name": "",
                "lr_scheduler_state": {},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {},
    }
