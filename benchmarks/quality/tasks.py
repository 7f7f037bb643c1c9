"""What the gates are compared on: the flags of each gate and of each task, and the data.

Tasks:

- `multi30k` and `multi30k_de` translate captions from English to German and from German to English
  (train, valid and test2016, each .en and .de).
- `lm` is a causal LM on four English texts (Shakespeare, two collections of speeches, an
  encyclopedia), each cut into 94 % train, 3 % valid, 3 % test.
- `mlm` is a masked LM on the same texts, which is then fine-tuned to tell the texts apart.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece as spm
import text_files

from benchmarks import ROOT

BIN = Path(sys.executable).parent
USER_DIR = ROOT / "fairseq_evomoe"
TEXTS = ("tinyshakespeare.txt", "state_union.txt", "inaugural.txt", "wikitext2.raw.valid.txt")

BALANCED = ("--moe-gate-loss-wt", "0.01")
UNBALANCED = ("--moe-gate-loss-wt", "0")
PRE_NORM = ("--encoder-normalize-before", "--decoder-normalize-before")
LOOK_UPS = ("--moe-freq", "0", *PRE_NORM)
PLAIN = ("--moe-gate-token-bias", "0")
WORDS = ("--moe-gate-token-bias", "3")
MASK = ("--evo-diversify", "mask", "--evo-diversify-ratio", "0.2")
GATES: dict[str, tuple[str, ...]] = {
    "dense": ("--moe-freq", "0"),
    "mixture": ("--moe-gate", "dense", *BALANCED),
    "switch": ("--moe-gate", "switch", *BALANCED),
    "switch_capacity": ("--moe-gate", "switch", "--moe-capacity-factor", "1.25", *BALANCED),
    "gshard": ("--moe-gate", "gshard", *BALANCED),
    "bias": ("--moe-gate", "switch", "--moe-balance-bias", "0.01", *UNBALANCED),
    "base": ("--moe-gate", "base", *UNBALANCED),
    "hash": ("--moe-gate", "hash", *UNBALANCED),
    "stable": ("--moe-gate", "stable", "--moe-gate-loss-wt", "0.3"),
    "expert_choice": ("--moe-gate", "expert_choice", *UNBALANCED),
    "switch_evo": ("--moe-gate", "switch", "--evo-spawn-update", "{tenth}", *BALANCED, *MASK),
    "dts": ("--moe-gate", "dts", "--evo-spawn-update", "0", *BALANCED, *PLAIN),
    "evomoe": ("--moe-gate", "dts", *BALANCED, *PLAIN),
    "switch_words": ("--moe-gate", "switch", *BALANCED, *WORDS),
    "dts_words": ("--moe-gate", "dts", "--evo-spawn-update", "0", *BALANCED, *WORDS),
    "evomoe_words": ("--moe-gate", "dts", *BALANCED, *WORDS),
    "dense_pre": ("--moe-freq", "0", *PRE_NORM),
    "memoryformer": (*LOOK_UPS, "--memory-ffn", "--memory-attention"),
    "memoryformer_abs": (
        *(*LOOK_UPS, "--memory-ffn", "--memory-attention"),
        *("--memory-score", "abs_prob", "--memory-lr-scale", "1"),
    ),
    "memory_out": (
        *(*LOOK_UPS, "--memory-ffn", "--memory-attention", "--memory-out-proj", "dense"),
    ),
    "memory_ffn": (*LOOK_UPS, "--memory-ffn"),
    "memory_half": (*LOOK_UPS, "--memory-ffn", "--memory-layers", "1,3"),
    "memory_experts": (
        *("--moe-gate", "dts", "--moe-expert-type", "memory", "--memory-bits", "6"),
        *(*PRE_NORM, *BALANCED, *PLAIN),
    ),
}
"""Name in the table -> flags. `dts` starts from independent experts, `evomoe` from one. The gates
named `_words` have a token bias, which is the default of causal language models with a DTS gate.
Look-up models use pre-norm and are compared with `dense_pre`; language models use it anyway."""

ROBERTA = (
    *("--arch", "roberta_evomoe", "--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512"),
    "--encoder-normalize-before",
)
"""Flags of the masked LM. It uses pre-norm, and `mlm` masks two words in five: with post-norm, or
with 15 % of the words masked, the dense model predicts little but the frequency of words after 500
updates."""

TASKS: dict[str, dict] = {
    "multi30k": {
        "updates": 500,
        "experts": 4,
        "vocab": 4000,
        "flags": (
            *("--task", "translation_evomoe", "--share-all-embeddings"),
            *("--arch", "transformer_evomoe", "--encoder-layers", "2", "--decoder-layers", "2"),
            *("--encoder-embed-dim", "128", "--encoder-ffn-embed-dim", "512"),
            *("--criterion", "moe_label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
            *("--dropout", "0.1", "--lr", "5e-3", "--warmup-updates", "200"),
            *("--max-tokens", "2560", "--required-batch-size-multiple", "1"),
        ),
    },
    "lm": {
        "updates": 500,
        "experts": 8,
        "vocab": 2000,
        "flags": (
            *("--task", "language_modeling_evomoe", "--tokens-per-sample", "128"),
            *("--arch", "transformer_lm_evomoe", "--share-decoder-input-output-embed"),
            *("--decoder-normalize-before",),
            *("--decoder-embed-dim", "128", "--decoder-ffn-embed-dim", "512"),
            *("--criterion", "moe_cross_entropy", "--dropout", "0.1"),
            *("--lr", "3e-3", "--warmup-updates", "100", "--max-tokens", "2048"),
        ),
    },
    "mlm": {
        "updates": 500,
        "experts": 8,
        "vocab": 2000,
        "flags": (
            *("--task", "masked_lm_evomoe", "--tokens-per-sample", "128", "--mask-prob", "0.4"),
            *ROBERTA,
            *("--criterion", "moe_masked_lm", "--dropout", "0.1"),
            *("--lr", "3e-3", "--warmup-updates", "100", "--max-tokens", "2048"),
        ),
    },
}
CAPTIONS = TASKS["multi30k"]["flags"]
TASKS["multi30k"] |= {"flags": ("-s", "en", "-t", "de", *CAPTIONS)}
TASKS["multi30k_de"] = TASKS["multi30k"] | {"flags": ("-s", "de", "-t", "en", *CAPTIONS)}


def run(*command: object, out: Path, append: bool = False) -> None:
    """Run a command on one thread, its output in `out`; if it fails, end with its last lines."""
    with out.open("a" if append else "w") as log:
        code = subprocess.call(
            [str(c) for c in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if code:
        sys.exit(f"{command[0]} exited with {code}; the end of {out}:\n{out.read_text()[-3000:]}")


def prepare(task: str, data: Path, out: Path) -> Path:
    """Make the pieces and binarised data of a task, if not yet there; return their folder."""
    translation = task.startswith("multi30k")
    folder = out / ("multi30k" if translation else "texts")
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        if not (folder / "done").exists():
            _prepare(task, data, folder)
            (folder / "done").touch()
        if task == "mlm" and not (folder / "classes" / "done").exists():
            _prepare_classes(data, folder)
            (folder / "classes" / "done").touch()
    return folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that other processes wait until this one has filled it."""
    with (folder / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _prepare(task: str, data: Path, folder: Path) -> None:
    translation = task.startswith("multi30k")
    languages = ("en", "de") if translation else ("",)
    splits = read_multi30k(data) if translation else read_texts(data)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter([line for side in splits["train"] for line in side]),
        model_prefix=str(folder / "spm"),
        vocab_size=TASKS[task]["vocab"],
        character_coverage=1.0,
        minloglevel=2,
    )
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for split, sides in splits.items():
        for language, lines in zip(languages, sides, strict=True):
            text = "\n".join(" ".join(p) for p in pieces.encode(lines, out_type=str)) + "\n"
            (folder / f"{split}{language and '.' + language}").write_text(text, encoding="utf-8")
    kind = ("-s", "en", "-t", "de", "--joined-dictionary") if translation else ("--only-source",)
    prefixes = [x for s in splits for x in (f"--{s}pref", folder / s)]
    run(
        BIN / "fairseq-preprocess", *kind, *prefixes, "--destdir", folder / "bin",
        out=folder / "preprocess.log",
    )  # fmt: skip


def lines_of(path: Path) -> list[str]:
    return [" ".join(x.split()) for x in text_files.lines(path, "--data")]


def read_multi30k(data: Path) -> dict[str, list[list[str]]]:
    names = {"train": "train", "valid": "valid", "test": "test2016"}
    return {s: [lines_of(data / f"{n}.{x}") for x in ("en", "de")] for s, n in names.items()}


def read_texts(data: Path) -> dict[str, list[list[str]]]:
    splits: dict[str, list[list[str]]] = {"train": [[]], "valid": [[]], "test": [[]]}
    for name in TEXTS:
        lines = [x for x in lines_of(data / name) if x]
        a, b = int(0.94 * len(lines)), int(0.97 * len(lines))
        for split, part in (("train", lines[:a]), ("valid", lines[a:b]), ("test", lines[b:])):
            splits[split][0] += part
    return splits


def _prepare_classes(data: Path, folder: Path) -> None:
    """Write binarised data for telling which of the four texts a passage is from, to
    `folder`/classes.

    A passage has 16 words. Training passages come from the training part of each text, at most 1000
    per text. Test passages come from the rest, at most 300 per text.
    """
    out = folder / "classes"
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    for split, at, most in (("train", slice(0, 94), 1000), ("valid", slice(94, 100), 300)):
        passages, labels = [], []
        for label, name in enumerate(TEXTS):
            lines = [x for x in lines_of(data / name) if x]
            part = slice(at.start * len(lines) // 100, at.stop * len(lines) // 100)
            words = " ".join(lines[part]).split()
            found = [" ".join(words[i : i + 16]) for i in range(0, len(words) - 15, 16)]
            step = max(1, len(found) // most)
            found = found[::step][:most]
            passages += found
            labels += [str(label)] * len(found)
        out.mkdir(exist_ok=True)
        text = [" ".join(x) for x in pieces.encode(passages, out_type=str)]
        (out / f"{split}.text").write_text("\n".join(text) + "\n", encoding="utf-8")
        (out / f"{split}.label").write_text("\n".join(labels) + "\n", encoding="utf-8")
    words = folder / "bin/dict.txt"
    for column, kind in (("text", ("--srcdict", words)), ("label", ())):
        run(
            BIN / "fairseq-preprocess", "--only-source", *kind, "--destdir",
            out / ("input0" if column == "text" else "label"),
            "--trainpref", out / f"train.{column}", "--validpref", out / f"valid.{column}",
            out=out / f"{column}.log",
        )  # fmt: skip


def flags_of(task: str, gate: str, updates: int) -> list[str]:
    """The flags that a gate adds to those of a task."""
    flags = [f.format(tenth=updates // 10) for f in GATES[gate]]
    if gate == "expert_choice" and task.startswith("multi30k"):
        # a decoder cannot use this gate
        flags += ["--encoder-moe-freq", "2", "--moe-freq", "0"]
    if task in ("lm", "mlm"):
        flags = [f for f in flags if f not in PRE_NORM]
    return flags
