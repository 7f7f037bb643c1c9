"""Write a checkpoint as a folder for transformers: model, tokenizer, card and the way back."""

import copy
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GenerationConfig

from fairseq_evomoe.hf import AUTO_CLASSES, EvoMoEForSequenceClassification
from fairseq_evomoe.tools import json_values
from fairseq_evomoe.tools.checkpoint import build, flags_of, in_place_of, load
from fairseq_evomoe.tools.to_hf import card, tokenizer
from fairseq_evomoe.tools.to_hf.describe import describe
from fairseq_evomoe.tools.to_hf.weights import contiguous, to_hf

WAY_BACK, REST = "fairseq.json", "fairseq_rest.safetensors"
FORMAT = "fairseq_evomoe for transformers 1"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a user can choose about the folder.

    Attributes:
        data: folder with the dictionaries, or None for the one that the checkpoint names.
        sentencepiece: the models that split source and target, or one for both; none if words were
            separated by spaces.
        with_code: whether the folder brings the classes, for `trust_remote_code`.
        beam, lenpen, max_len_b: defaults of generation, as in fairseq-generate.
        shard_size: largest size of a file, for example "5GB".
        scores: lines for the model card, such as "BLEU on newstest2014: 27.3".
    """

    data: str | None = None
    sentencepiece: list[Path] = field(default_factory=list)
    with_code: bool = False
    beam: int = 5
    lenpen: float = 1.0
    max_len_b: int = 200
    shard_size: str = "5GB"
    scores: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse values that cannot work, before anything is read.

        Raises:
            ValueError: the message names the flag and the fix.
        """
        for ok, flag, fix in (
            (len(self.sentencepiece) <= 2, "--sentencepiece", "give one model, or one per side"),
            (self.beam >= 1, f"--beam {self.beam}", "give 1 or more"),
            (self.max_len_b >= 1, f"--max-len-b {self.max_len_b}", "give 1 or more"),
            (
                re.fullmatch(r"[1-9]\d*[KMGT]I?B", self.shard_size.upper()),
                f"--shard-size {self.shard_size}",
                "give a size such as 500MB or 5GB",
            ),
        ):
            if not ok:
                raise ValueError(f"{flag}: {fix}")


def loaded(source: Path, options: Options) -> tuple[dict[str, Any], Any, Any, Any, Any]:
    """The checkpoint, and fairseq's model, configuration and task of it, and our configuration.

    Raises:
        ValueError: an option cannot work, or the model has no counterpart.
    """
    options.check()
    checkpoint = load(source)
    model, cfg, task = build(source, options.data)
    model.eval()
    balance = getattr(cfg.criterion, "moe_gate_loss_wt", 0.0)
    return checkpoint, model, cfg, task, describe(model, flags_of(checkpoint), balance)


def export(source: Path, folder: Path, options: Options) -> float:
    """Write the folder, and return the largest difference of logits from fairseq's model.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the model has no counterpart, or the two models differ; nothing is written.
    """
    checkpoint, model, cfg, task, config = loaded(source, options)
    ours, mapped = convert(model, config, checkpoint["model"])
    found = difference(model, ours, config.model_type)
    with in_place_of(folder) as partial:
        partial.mkdir()
        _save_model(ours, partial, options)
        save_tokenizers(task, config, partial, options)
        way_back = {
            "format": FORMAT,
            "order": mapped.order,
            "origin": mapped.origin,
            **json_values.kept(checkpoint),
        }
        (partial / WAY_BACK).write_text(json.dumps(way_back, indent=1), encoding="utf-8")
        if mapped.rest:
            save_file(contiguous(mapped.rest), partial / REST, metadata={"format": "pt"})
        two = (partial / "target").is_dir()
        text = card.text(ours, checkpoint, cfg, options, difference=found, two_tokenizers=two)
        (partial / "README.md").write_text(text, encoding="utf-8")
    return found


def convert(model: nn.Module, config: Any, state: dict[str, Any]) -> tuple[Any, Any]:
    """The model for transformers with a checkpoint's weights, and where they went."""
    cls: Any = next(iter(AUTO_CLASSES[type(config)].values()))
    heads: Any = getattr(model, "classification_heads", None)
    if heads:
        cls = EvoMoEForSequenceClassification
        config.tied = None
    ours = cls(config).eval()
    built = model.state_dict()
    # a checkpoint of an older layout is taken as fairseq has upgraded it
    known = state if set(built) <= set(state) else built
    mapped = to_hf(known, set(ours.state_dict()))
    ours.load_state_dict(mapped.model, strict=True, assign=True)
    ours.tie_weights()
    config.dtype = next(p.dtype for p in ours.parameters())
    return ours, mapped


@torch.no_grad()
def difference(model: nn.Module, ours: Any, model_type: str, limit: float = 1e-4) -> float:
    """Largest difference between the logits of two models on padded random text.

    Args:
        model: of fairseq.
        ours: for transformers.
        model_type: of our configuration.
        limit: the largest difference that passes, relative to the largest logit.

    Raises:
        ValueError: the models differ by more.
    """
    generator = torch.Generator().manual_seed(1)
    pad, eos = ours.config.pad_token_id, ours.config.eos_token_id
    words = ours.get_input_embeddings().num_embeddings
    first = torch.randint(4, words, (4, 11), generator=generator)
    first[1, 6:] = first[2, 3:] = pad
    real = first.ne(pad)
    # a copy, since float32 would also become the dtype of what is saved
    ours = copy.deepcopy(ours).float()
    if model_type == "evomoe_translation":
        second = torch.randint(4, ours.config.vocab_size, (4, 9), generator=generator)
        second[:, 0] = eos
        want = model(first, real.sum(1), second)[0]
        have = ours(input_ids=first, attention_mask=real.long(), decoder_input_ids=second).logits
        real = torch.ones_like(second, dtype=torch.bool)
    elif isinstance(ours, EvoMoEForSequenceClassification):
        heads: Any = model.classification_heads
        name = next(iter(heads))
        want = model(first, classification_head_name=name, features_only=True)[0]
        have = ours(input_ids=first).logits
        real = torch.ones(len(first), dtype=torch.bool)
    else:
        want, have = model(first)[0], ours(input_ids=first).logits
    want, have = want[real].float(), have[real].float()
    found = float((want - have).abs().max())
    if not found <= limit * max(1.0, float(want.abs().max())):
        raise ValueError(
            f"the exported model's logits differ by {found:.2g} from fairseq's, so nothing is "
            "written; please report the flags of the training"
        )
    return found


def _save_model(ours: Any, folder: Path, options: Options) -> None:
    config = ours.config
    config.architectures = [type(ours).__name__]
    if options.with_code:
        config.auto_map = {"AutoConfig": f"configuration_evomoe.{type(config).__name__}"}
        for auto, cls in AUTO_CLASSES[type(config)].items():
            config.auto_map[auto.__name__] = f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
    if config.model_type != "evomoe_mlm":
        ours.generation_config = generation(config, options)
    ours.save_pretrained(folder, max_shard_size=options.shard_size)


def generation(config: Any, options: Options) -> GenerationConfig:
    """fairseq-generate's search in transformers' terms."""
    common = {
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "suppress_tokens": [config.pad_token_id],
    }
    if config.model_type == "evomoe_lm":
        return GenerationConfig(**common)
    return GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        num_beams=options.beam,
        length_penalty=options.lenpen,
        early_stopping=True,
        # fairseq counts neither the start nor the end of the sentence, and forces the end
        max_length=_longest(config, options) + 2,
        forced_eos_token_id=config.eos_token_id,
        min_length=2,
        **common,
    )


def _longest(config: Any, options: Options) -> int:
    """Largest number of words of a translation, which the decoder's positions limit."""
    positions = config.decoder_stack["positions"]
    return min(options.max_len_b, positions - 1) if positions else options.max_len_b


def save_tokenizers(task: Any, config: Any, folder: Path, options: Options) -> None:
    """The tokenizer of the source, and in a folder of its own that of another target."""
    source, target = task.source_dictionary, task.target_dictionary
    stack = config.encoder_stack or config.decoder_stack
    positions = stack["positions"] or int(1e9)
    models: list[Any] = [*options.sentencepiece, *options.sentencepiece] or [None, None]
    common = (config.model_type, positions)
    tokenizer.build(source, models[0], *common).save_pretrained(folder)
    if target is not None and (target.symbols != source.symbols or models[0] != models[1]):
        tokenizer.build(target, models[1], *common).save_pretrained(folder / "target")
