"""The model card: what a model is, how it was trained, how it is used."""

from typing import Any

from fairseq_evomoe.hf import AUTO_CLASSES, EvoMoEForSequenceClassification

WHAT = {
    "evomoe_translation": "translates",
    "evomoe_lm": "continues text",
    "evomoe_mlm": "fills in masked words",
    "classifier": "classifies texts",
}
"""Kind of model -> what it does."""
STAGES = {1: "soft", 2: "hard"}
USE = {
    "evomoe_translation": """\
batch = tokenizer(["A sentence to translate."], return_tensors="pt")
print({target}.batch_decode(model.generate(**batch), skip_special_tokens=True))""",
    "evomoe_lm": """\
batch = tokenizer(["The beginning of a text"], return_tensors="pt")
words = model.generate(**batch, max_new_tokens=50)
print(tokenizer.batch_decode(words, skip_special_tokens=True))""",
    "evomoe_mlm": """\
batch = tokenizer(["A sentence with a <mask> in it."], return_tensors="pt")
print(model(**batch).logits.shape)""",
    "classifier": """\
batch = tokenizer(["A text to classify."], return_tensors="pt")
print(model(**batch).logits.softmax(-1))""",
}


def text(
    model: Any,
    checkpoint: dict[str, Any],
    cfg: Any,
    options: Any,
    *,
    difference: float,
    two_tokenizers: bool,
) -> str:
    """The card in Markdown.

    Args:
        model: the exported one.
        checkpoint, cfg: of the training.
        options: `write.Options`.
        difference: of the two models' logits.
        two_tokenizers: whether the target has one of its own.
    """
    config, trust = model.config, ", trust_remote_code=True" * options.with_code
    classes = {cls: auto.__name__ for auto, cls in AUTO_CLASSES[type(config)].items()}
    auto, kind = classes[type(model)], config.model_type
    if isinstance(model, EvoMoEForSequenceClassification):
        kind = "classifier"
    target = f'AutoTokenizer.from_pretrained(folder + "/target"{trust})'
    lines = [
        "---",
        "library_name: transformers",
        *_languages(cfg),
        "tags: [fairseq, fairseq-evomoe, mixture-of-experts]",
        "---",
        "",
        f"# A model of fairseq-evomoe that {WHAT[kind]}",
        "",
        *_parts(config),
        "",
        "## Training",
        "",
        *_training(checkpoint, cfg),
        "",
        *(["## Scores", "", *(f"- {line}" for line in options.scores), ""] * bool(options.scores)),
        "## Use",
        "",
        "```python",
        *([] if options.with_code else ["import fairseq_evomoe.hf"]),
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'folder = "."' + ("  # its Python files will run" * options.with_code),
        f"model = {auto}.from_pretrained(folder{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})",
        *([f"target = {target}"] * two_tokenizers),
        USE[kind].format(target="target" if two_tokenizers else "tokenizer"),
        "```",
        "",
        "The logits on padded random text differ from those of fairseq's model by at most "
        f"{difference:.1e}. `evomoe-export FOLDER --output checkpoint.pt` makes the checkpoint for "
        "fairseq again; it needs `fairseq.json` of this folder.",
        "",
    ]
    return "\n".join(lines)


def _languages(cfg: Any) -> list[str]:
    task = cfg.task
    pair = [getattr(task, name, None) for name in ("source_lang", "target_lang")]
    return [f"language: [{', '.join(map(str, pair))}]"] if all(pair) else []


def _parts(config: Any) -> list[str]:
    said = []
    for side in ("encoder", "decoder"):
        stack = getattr(config, f"{side}_stack")
        if stack:
            kinds = [layer["ffn"] for layer in stack["layers"]]
            counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
            said.append(
                f"- {side}: {len(kinds)} layers of width {stack['width']}, feed-forward networks: "
                f"{counts}"
            )
    if config.moe:
        moe = config.moe
        said.append(
            f"- experts: {moe['experts']} in a layer, gate {moe['gate']}, "
            f"{STAGES[moe['stage']]} stage, temperature {moe['temperature']:g}"
        )
    return said


def _training(checkpoint: dict[str, Any], cfg: Any) -> list[str]:
    history = (checkpoint.get("optimizer_history") or [{}])[-1]
    found = {
        "task": cfg.task._name if hasattr(cfg.task, "_name") else cfg.common.get("task"),
        "architecture": getattr(cfg.model, "arch", None) or getattr(cfg.model, "_name", None),
        "criterion": history.get("criterion_name"),
        "optimizer": history.get("optimizer_name"),
        "updates": history.get("num_updates"),
        "seed": cfg.common.seed,
        "peak learning rate": ", ".join(f"{x:g}" for x in cfg.optimization.lr),
        "largest batch in tokens": cfg.dataset.max_tokens,
    }
    extra = checkpoint.get("extra_state") or {}
    metric = cfg.checkpoint.best_checkpoint_metric
    if extra.get("val_loss") is not None:
        found[f"{metric} on validation"] = f"{extra['val_loss']:.3f}"
    return [f"- {name}: {value}" for name, value in found.items() if value not in (None, "")]
