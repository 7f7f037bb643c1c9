"""Compare methods on text of mixed domains, each at its own best learning rate.

    python -m benchmarks.quality.campaign prepare --data CORPORA/lm
    python -m benchmarks.quality.campaign run --stage rates   # one seed, a third
    python -m benchmarks.quality.campaign run --stage main    # three seeds, at the best rate
    python -m benchmarks.quality.campaign run --stage arithmetic   # --amp against fp32
    python -m benchmarks.quality.campaign table

The task is causal language modelling: 4 layers of width 128, 4,000 pieces, 4,096 tokens per update,
one pass over the text without repetition. Every run shares data, order of batches, model, optimizer
and schedule of the learning rate; only the flags of `METHODS`, the peak rate and the arithmetic
differ. A run that is interrupted continues from its last checkpoint, and a run whose row exists is
not repeated. Several processes may share a stage: a run that one has begun is left to it.

Rows go to `results/quality.csv`, the validation curves to `results/quality_curves.csv`. Losses are
bits per piece on the validation text of all domains.
"""

import argparse
import csv
import fcntl
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sentencepiece as spm
import text_files

from benchmarks import RESULTS, ROOT
from benchmarks.quality.tasks import BALANCED, BIN, USER_DIR, run
from benchmarks.speed.timing import append, machine

VOCABULARY = 4000
VALIDATIONS = 8

PLAIN = ("--moe-gate-token-bias", "0")
LOOK_UPS = ("--moe-freq", "0", "--memory-ffn", "--memory-lr-scale", "1")
WHOLE = (*LOOK_UPS, "--memory-attention")
LINEAR = ("--memory-linear", "--memory-straight-through")
WIDE = ("--memory-delta", "0", "--memory-ffn-embed-dim", "512")
METHODS: dict[str, tuple[str, ...]] = {
    "dense": ("--moe-freq", "0"),
    "switch": ("--moe-gate", "switch", *BALANCED),
    "evomoe": ("--moe-gate", "dts", *BALANCED, *PLAIN),
    "dts": ("--moe-gate", "dts", "--evo-spawn-update", "0", *BALANCED, *PLAIN),
    "gshard": ("--moe-gate", "gshard", *BALANCED),
    "hash": ("--moe-gate", "hash", "--moe-gate-loss-wt", "0"),
    "base": ("--moe-gate", "base", "--moe-gate-loss-wt", "0"),
    "stable": ("--moe-gate", "stable", "--moe-gate-loss-wt", "0.3"),
    "dense n-grams": ("--moe-freq", "0", "--memory-ngram", "2"),
    "switch n-grams": ("--moe-gate", "switch", *BALANCED, "--memory-ngram", "2"),
    "evomoe n-grams": ("--moe-gate", "dts", *BALANCED, *PLAIN, "--memory-ngram", "2"),
    "look-ups n-grams": (*WHOLE, "--memory-score", "l1", *LINEAR, "--memory-ngram", "2"),
    "dense beside look-ups": (*LOOK_UPS, "--memory-parallel", "--memory-score", "abs_prob"),
    "look-ups": (*WHOLE, "--memory-score", "abs_prob"),
    "look-ups linear": (*WHOLE, "--memory-score", "abs_prob", "--memory-linear"),
    "look-ups l1": (*WHOLE, "--memory-score", "l1", *LINEAR),
    "look-ups spawned": (
        *(*WHOLE, "--memory-score", "l1", *LINEAR),
        *("--memory-out-proj", "dense", "--memory-spawn-update", "400"),
    ),
    "look-ups FFN l1": (*LOOK_UPS, "--memory-score", "l1", *LINEAR),
    "look-ups FFN wide": (*LOOK_UPS, "--memory-score", "l1", *LINEAR, *WIDE),
}
"""Name in the tables -> flags. `evomoe` starts from one expert, `dts` from independent ones."""

RATES = ("4.5e-3", "3e-3", "6e-3", "1.5e-3")
RATES_OF_LOOK_UPS = ("6e-3", "3e-3", "9e-3", "12e-3")
"""In the order in which they are tried: the rate that has won most often comes first."""

STAGES = {
    "rates": (1333, (1,)),
    "main": (4000, (1, 2, 3)),
    "long": (12000, (1, 2, 3)),
    "arithmetic": (1500, (1, 2, 3)),
}
"""Stage -> number of updates, seeds. `rates` tries four rates; `arithmetic` runs a method in fp32
and with `--amp`, at `RATES[0]`; the others run it at the best of its rates."""

MODEL = (
    *("--task", "language_modeling_evomoe", "--tokens-per-sample", "256"),
    *("--arch", "transformer_lm_evomoe", "--share-decoder-input-output-embed"),
    *("--decoder-embed-dim", "128", "--decoder-ffn-embed-dim", "512"),
    *("--moe-expert-count", "8", "--dropout", "0", "--criterion", "moe_cross_entropy"),
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1"),
    *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "200", "--max-tokens", "4096"),
)

ARITHMETIC: dict[str, tuple[str, ...]] = {"fp32": (), "amp": ("--amp",)}

KEY = ("task", "method", "rate", "seed", "updates", "arithmetic")
FIELDS = (
    *KEY,
    *("valid_bits", "active_experts", "load_max_mean", "dead_experts", "gnorm_max"),
    *("train_seconds", "threads", "device", "torch", "date"),
)
CURVE = (*KEY, "at", "valid_bits")


def lines_of(path: Path) -> Iterator[str]:
    """The paragraphs of a compressed text, without the blank lines between documents."""
    for line in text_files.lines(path, "--data"):
        if words := line.split():
            yield " ".join(words)


def prepare(data: Path, out: Path) -> None:
    """Learn pieces over all domains and binarise train, valid and each domain's valid text."""
    domains = sorted(p.name for p in data.iterdir() if (p / "train.txt.xz").is_file())
    if not domains:
        sys.exit(f"--data {data}: no <domain>/train.txt.xz in it")
    out.mkdir(parents=True, exist_ok=True)
    spm.SentencePieceTrainer.train(
        sentence_iterator=(x for d in domains for x in lines_of(data / d / "train.txt.xz")),
        model_prefix=str(out / "spm"),
        vocab_size=VOCABULARY,
        input_sentence_size=300_000,
        shuffle_input_sentence=True,
        byte_fallback=True,
        minloglevel=2,
    )
    pieces = spm.SentencePieceProcessor(model_file=str(out / "spm.model"))

    def write(name: str, sources: list[Path]) -> Path:
        path = out / name
        with path.open("w", encoding="utf-8") as target:
            for source in sources:
                for line in lines_of(source):
                    target.write(" ".join(pieces.encode(line, out_type=str)) + "\n")
        return path

    train = write("train", [data / d / "train.txt.xz" for d in domains])
    valid = write("valid", [data / d / "valid.txt.xz" for d in domains])
    apart = [write(f"valid.{d}", [data / d / "valid.txt.xz"]) for d in domains]
    run(
        *(BIN / "fairseq-preprocess", "--only-source", "--destdir", out / "bin"),
        *("--trainpref", train, "--validpref", ",".join(map(str, [valid, *apart]))),
        *("--workers", 2),
        out=out / "preprocess.log",
    )
    (out / "domains.json").write_text(json.dumps(domains))


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a csv; none if it does not exist yet."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


def logged(log: str, kind: str) -> list[dict[str, str]]:
    """The JSON lines of one kind in a log; of an update made twice, the last."""
    found = [json.loads(x) for x in re.findall(rf"\| {kind} \| (\{{.*\}})", log)]
    by_update = {int(r.get("num_updates") or r[f"{kind}_num_updates"]): r for r in found}
    return [by_update[n] for n in sorted(by_update)]


@contextmanager
def claimed(work: Path) -> Iterator[bool]:
    """Whether this process has the folder of a run for itself."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def train(key: dict[str, str], work: Path, args: argparse.Namespace) -> None:
    """One run, from wherever it stopped; its row and its curve are appended at the end."""
    updates = int(key["updates"])
    log, every = work / "train.log", max(1, updates // VALIDATIONS)
    run(
        *(BIN / "fairseq-train", args.out / "data/bin"),
        *("--user-dir", USER_DIR, *MODEL, *METHODS[key["method"]], *ARITHMETIC[key["arithmetic"]]),
        *("--lr", key["rate"], "--seed", key["seed"], "--max-update", updates, "--save-dir", work),
        *("--no-epoch-checkpoints", "--save-interval-updates", every),
        *("--keep-interval-updates", 1, "--validate-interval-updates", every),
        # the texts of single domains are for evaluation after the training
        "--ignore-unused-valid-subsets",
        *("--num-workers", 0, "--log-format", "json", "--log-interval", min(20, every)),
        *(("--cpu",) if args.device == "cpu" else ()),
        out=log,
        append=True,
    )
    text = log.read_text()
    valid, trained = logged(text, "valid"), logged(text, "train_inner")
    last = valid[-1]
    row = {
        **key,
        "valid_bits": last["valid_loss"],
        "active_experts": last.get("valid_moe_active_experts", 1),
        "load_max_mean": last.get("valid_moe_load_max_mean", ""),
        "dead_experts": last.get("valid_moe_dead_experts", ""),
        "gnorm_max": max(float(r["gnorm"]) for r in trained[len(trained) // 10 :]),
        "train_seconds": round(sum(float(r["train_wall"]) for r in trained)),
        **machine(args.device),
        "threads": 1,
    }
    append(args.results / "quality.csv", FIELDS, [row])
    points = [{**key, "at": r["valid_num_updates"], "valid_bits": r["valid_loss"]} for r in valid]
    append(args.results / "quality_curves.csv", CURVE, points)
    for checkpoint in work.glob("*.pt"):
        checkpoint.unlink()
    print(row, flush=True)


def rates_of(method: str) -> tuple[str, ...]:
    """The rates that are tried for a method."""
    return RATES_OF_LOOK_UPS if method.startswith("look-ups") else RATES


def best_rate(found: list[dict[str, str]], method: str) -> str:
    """The rate of the lowest loss among a method's runs of the stage `rates`."""
    updates = str(STAGES["rates"][0])
    tried = [r for r in found if r["method"] == method and r["updates"] == updates]
    if {r["rate"] for r in tried} != set(rates_of(method)):
        sys.exit(f"{method}: run --stage rates first; tried so far: {[r['rate'] for r in tried]}")
    return min(tried, key=lambda r: float(r["valid_bits"]))["rate"]


def planned(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The keys of every run of a stage, seeds in the outer loop."""
    updates, seeds = STAGES[args.stage]
    updates = args.updates or updates
    sweeps = args.stage == "rates"
    arithmetics = list(ARITHMETIC) if args.stage == "arithmetic" else [args.arithmetic]
    for seed, turn in itertools.product(seeds, range(len(RATES) if sweeps else 1)):
        for method, arithmetic in itertools.product(args.methods, arithmetics):
            if sweeps:
                rate = rates_of(method)[turn]
            elif args.stage == "arithmetic":
                rate = RATES[0]
            else:
                rate = best_rate(rows(args.results / "quality.csv"), method)
            values = ("lm", method, rate, str(seed), str(updates), arithmetic)
            yield dict(zip(KEY, values, strict=True))


def campaign(args: argparse.Namespace) -> None:
    """Every run of a stage that has no row yet."""
    for key in planned(args):
        name = "-".join((key["method"].replace(" ", "_"), key["rate"], key["updates"]))
        if key["arithmetic"] != "fp32":
            name += f"-{key['arithmetic']}"
        with claimed(work := args.out / "runs" / f"{name}-seed{key['seed']}") as ours:
            done = {tuple(r[k] for k in KEY) for r in rows(args.results / "quality.csv")}
            if not ours:
                print(f"{work.name}: another process has begun it", flush=True)
            elif tuple(key.values()) not in done:
                train(key, work, args)


def table(args: argparse.Namespace) -> None:
    """Validation bits: a row per method, length and rate, with the spread over seeds."""
    groups: dict[tuple[int, str, str, str], list[float]] = {}
    for r in rows(args.results / "quality.csv"):
        group = (int(r["updates"]), r["method"], r["rate"], r["arithmetic"])
        groups.setdefault(group, []).append(float(r["valid_bits"]))
    print("| updates | method | peak rate | arithmetic | seeds | valid bits | standard error |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (updates, method, rate, arithmetic), bits in sorted(groups.items()):
        # one run has no spread
        error = f"{statistics.stdev(bits) / math.sqrt(len(bits)):.3f}" if len(bits) > 1 else ""
        mean = statistics.mean(bits)
        shown = (updates, method, rate, arithmetic, len(bits), f"{mean:.3f}", error)
        print("|", " | ".join(map(str, shown)), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("prepare", "run", "table"))
    parser.add_argument("--data", type=Path, help="folder with <domain>/{train,valid}.txt.xz")
    parser.add_argument("--stage", choices=STAGES, default="rates")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--arithmetic", choices=ARITHMETIC, default="fp32")
    parser.add_argument("--updates", type=int, help="another length than the stage's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "work/campaign")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.what == "prepare":
        if args.data is None:
            sys.exit("prepare needs --data DIR")
        prepare(args.data, args.out / "data")
    elif args.what == "run":
        campaign(args)
    else:
        table(args)


if __name__ == "__main__":
    main()
