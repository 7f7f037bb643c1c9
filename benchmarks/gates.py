"""Every gate on the same task: one row a run, one run a (gate, seed).

    python benchmarks/gates.py --task multi30k --data DIR --gates dense switch dts
    python benchmarks/gates.py --task lm --data DIR --gates dts --label cold \\
        -- --dts-temperature-end 0.1

A run trains with the real fairseq-train, on one thread so that several fit side by side;
translation is scored by fairseq-generate and sacreBLEU. All runs of a task share data, order of
batches, model, number of updates, experts and, in the end, active experts per token (1; gshard 2,
mixture all; in translation expert_choice has experts in the encoder alone); only the gate's flags
differ. Rows are appended to the csv; a run whose row is there is not repeated.

Tasks: `multi30k`, English-German captions (train, valid, test2016 .en and .de); `lm`, four English
texts (Shakespeare, speeches, encyclopedia), each cut into 94 % train, 3 % valid, 3 % test; `mlm`,
the same texts, masked.
"""

import argparse
import csv
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import sacrebleu
import sentencepiece as spm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from timing import append, machine  # noqa: E402

BIN = Path(sys.executable).parent
USER_DIR = ROOT / "fairseq_evomoe"
TEXTS = ("tinyshakespeare.txt", "state_union.txt", "inaugural.txt", "wikitext2.raw.valid.txt")

FIELDS = (
    "task gate label seed updates experts flags valid_nll_bits test_nll_bits bleu chrf "
    "active_experts load_max_mean dead_experts threads device torch date"
).split()

BALANCED = ("--moe-gate-loss-wt", "0.01")
UNBALANCED = ("--moe-gate-loss-wt", "0")
PRE_NORM = ("--encoder-normalize-before", "--decoder-normalize-before")
LOOK_UPS = ("--moe-freq", "0", *PRE_NORM)
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
    "switch_evo": ("--moe-gate", "switch", "--evo-spawn-update", "{tenth}", *BALANCED),
    "dts": ("--moe-gate", "dts", "--evo-spawn-update", "0", *BALANCED),
    "evomoe": ("--moe-gate", "dts", *BALANCED),
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
        *("--moe-gate", "dts", "--expert-type", "memory", "--memory-bits", "6"),
        *(*PRE_NORM, *BALANCED),
    ),
}
"""Name in the table -> flags. `dts` starts from independent experts, `evomoe` from one. Look-ups
stand where the norm comes first, beside `dense_pre`; a language model has that anyway."""

TASKS: dict[str, dict] = {
    "multi30k": {
        "updates": 500,
        "experts": 4,
        "vocab": 4000,
        "flags": (
            *("--task", "translation_evomoe", "-s", "en", "-t", "de", "--share-all-embeddings"),
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
            *("--task", "masked_lm_evomoe", "--tokens-per-sample", "128", "--seed", "1"),
            *("--arch", "roberta_evomoe", "--encoder-embed-dim", "128"),
            *("--encoder-ffn-embed-dim", "512", "--criterion", "moe_masked_lm"),
            *("--lr", "3e-3", "--warmup-updates", "100", "--max-tokens", "2048"),
        ),
    },
}


def run(*command: str | Path, out: Path) -> None:
    with out.open("w") as log:
        code = subprocess.call(
            [str(c) for c in command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if code:
        sys.exit(f"{command[0]} exited {code}; the end of {out}:\n{out.read_text()[-3000:]}")


def prepare(task: str, data: Path, out: Path) -> Path:
    """Pieces and binarised data for a task, once; the folder."""
    folder = out / ("multi30k" if task == "multi30k" else "texts")
    done = folder / "bin" / "done"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    languages = ("en", "de") if task == "multi30k" else ("",)
    splits = read_multi30k(data) if task == "multi30k" else read_texts(data)
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
    kind = ("-s", "en", "-t", "de", "--joined-dictionary") if languages[0] else ("--only-source",)
    prefixes = [x for s in splits for x in (f"--{s}pref", folder / s)]
    run(
        BIN / "fairseq-preprocess", *kind, *prefixes, "--destdir", folder / "bin",
        out=folder / "preprocess.log",
    )  # fmt: skip
    done.touch()
    return folder


def lines_of(path: Path) -> list[str]:
    if not path.is_file():
        sys.exit(f"no such file: {path}; give the folder with --data")
    return [" ".join(x.split()) for x in path.read_text(encoding="utf-8").splitlines()]


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


def rows_in(log: Path, kind: str) -> list[dict]:
    return [json.loads(x) for x in re.findall(rf"\| {kind} \| (\{{.*\}})", log.read_text())]


def flags_of(task: str, gate: str, updates: int) -> list[str]:
    """The flags that a gate adds to a task's."""
    flags = [f.format(tenth=updates // 10) for f in GATES[gate]]
    if gate == "expert_choice" and task == "multi30k":
        # a decoder cannot have it
        flags += ["--encoder-moe-freq", "2", "--moe-freq", "0"]
    if task == "lm":
        flags = [f for f in flags if f != PRE_NORM[0]]
    return flags


def one(task: str, gate: str, label: str, seed: int, args, extra: list[str], folder: Path) -> dict:
    setup = TASKS[task]
    updates = args.updates or setup["updates"]
    experts = args.experts or setup["experts"]
    work = args.out / f"{task}-{gate}-{label or 'plain'}-{updates}-{experts}-seed{seed}"
    work.mkdir(parents=True, exist_ok=True)
    for left_over in work.glob("checkpoint*"):
        # an interrupted run must not lend its weights to this one
        left_over.unlink()
    flags = flags_of(task, gate, updates) + extra
    run(
        BIN / "fairseq-train", folder / "bin", "--user-dir", USER_DIR, *setup["flags"],
        "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr-scheduler", "inverse_sqrt",
        "--moe-expert-count", experts, "--max-update", updates, "--seed", seed,
        "--save-dir", work, "--no-epoch-checkpoints", "--no-save-optimizer-state", "--cpu",
        "--num-workers", "0", "--log-format", "json", "--log-interval", "20",
        "--validate-interval-updates", updates, "--validate-interval", "999",
        "--save-interval", "999", *flags,
        out=work / "train.log",
    )  # fmt: skip
    last = rows_in(work / "train.log", "valid")[-1]
    assert int(last["valid_num_updates"]) == updates
    checkpoint = work / "checkpoint_last.pt"
    row = {
        "task": task,
        "gate": gate,
        "label": label,
        "seed": seed,
        "updates": updates,
        "experts": experts,
        "flags": " ".join(extra),
        "valid_nll_bits": last.get("valid_nll_loss", last["valid_loss"]),
        "active_experts": last.get("valid_moe_active_experts", 1),
        "load_max_mean": last.get("valid_moe_load_max_mean", ""),
        "dead_experts": last.get("valid_moe_dead_experts", ""),
        **machine(),
        "threads": 1,
    }
    common = ["--user-dir", USER_DIR, "--cpu", "--num-workers", "0", "--path", checkpoint]
    if task == "multi30k" and args.score:
        run(
            BIN / "fairseq-generate", folder / "bin", *common, "--beam", "4", "--max-tokens", 6000,
            "--remove-bpe", "sentencepiece", "--required-batch-size-multiple", "1",
            out=work / "test.gen",
        )  # fmt: skip
        found = re.findall(r"^H-(\d+)\t\S+\t(.*)$", (work / "test.gen").read_text(), re.MULTILINE)
        hypotheses = [h for _, h in sorted(found, key=lambda x: int(x[0]))]
        (work / "test.hyp").write_text("\n".join(hypotheses) + "\n")
        reference = lines_of(args.data / "test2016.de")
        row["bleu"] = round(sacrebleu.corpus_bleu(hypotheses, [reference]).score, 2)
        row["chrf"] = round(sacrebleu.corpus_chrf(hypotheses, [reference]).score, 2)
    if args.score and task != "multi30k":
        named = setup["flags"][1]
        run(
            BIN / "fairseq-validate", folder / "bin", *common, "--task", named, "--valid-subset",
            "test", "--max-tokens", "2048", "--tokens-per-sample", "128", "--log-format", "json",
            out=work / "test.log",
        )  # fmt: skip
        tested = rows_in(work / "test.log", "test")[-1]
        row["test_nll_bits"] = tested.get("test_nll_loss", tested["test_loss"])
    checkpoint.unlink()
    (work / "checkpoint_best.pt").unlink(missing_ok=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gates", nargs="+", choices=GATES, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--updates", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--label", default="", help="names a variation of flags, given after --")
    parser.add_argument("--out", type=Path, default=ROOT / "work/gates")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/gates.csv")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--no-score", dest="score", action="store_false", help="validation only")
    own, extra = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    args = parser.parse_args(own)
    folder = prepare(args.task, args.data, args.out)
    updates = args.updates or TASKS[args.task]["updates"]
    key = lambda r: tuple(str(r[k]) for k in ("task", "gate", "label", "seed", "updates", "flags"))
    seen, lock = set(), Lock()
    if args.csv.exists():
        with args.csv.open() as f:
            seen = {(*key(r), r["experts"]) for r in csv.DictReader(f)}

    def job(seed: int, gate: str) -> None:
        name = dict(task=args.task, gate=gate, label=args.label, seed=seed, updates=updates)
        experts = str(args.experts or TASKS[args.task]["experts"])
        if (*key(name | {"flags": " ".join(extra)}), experts) in seen:
            return
        row = one(args.task, gate, args.label, seed, args, extra, folder)
        with lock:
            append(args.csv, FIELDS, [row])
        print({k: v for k, v in row.items() if k not in ("device", "torch", "date")}, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(job, s, g) for s in args.seeds for g in args.gates]:
            done.result()


if __name__ == "__main__":
    main()
