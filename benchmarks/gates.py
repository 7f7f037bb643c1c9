"""Every gate on the same task: one row a run, one run a (gate, seed).

    python benchmarks/gates.py --task multi30k --data DIR --gates dense switch dts
    python benchmarks/gates.py --task lm --data DIR --gates dts --label cold \\
        -- --dts-temperature-end 0.1

A run trains with the real fairseq-train, on one thread so that several fit side by side;
translation is scored by fairseq-generate and sacreBLEU, a masked LM by fine-tuning it. All runs of
a task (`gate_tasks.py`) share data, order of batches, model, number of updates, experts and, in
the end, active experts per token (1; gshard 2, mixture all; in translation expert_choice has
experts in the encoder alone); only the gate's flags differ. Rows are appended to the csv, ten
points of each run's curve to `curves.csv` beside it; a run whose row is there is not repeated.
"""

import argparse
import csv
import json
import math
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import sacrebleu

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from gate_tasks import (  # noqa: E402
    BIN,
    GATES,
    ROBERTA,
    TASKS,
    USER_DIR,
    flags_of,
    lines_of,
    prepare,
    run,
)
from timing import append, machine  # noqa: E402

FIELDS = (
    "task gate label seed updates experts flags valid_nll_bits test_nll_bits bleu chrf accuracy "
    "active_experts load_max_mean dead_experts threads device torch date"
).split()
LOCK = Lock()
CURVE = "task gate label seed updates experts at tokens valid_nll_bits active_experts".split()


def rows_in(log: Path, kind: str) -> list[dict]:
    return [json.loads(x) for x in re.findall(rf"\| {kind} \| (\{{.*\}})", log.read_text())]


def curve(log: Path) -> list[dict]:
    """One row a validation: update, tokens seen, NLL, and the mean number of active experts in
    training since the row before."""
    trained, points, before = rows_in(log, "train_inner"), [], 0
    for row in rows_in(log, "valid"):
        at = int(row["valid_num_updates"])
        done = [r for r in trained if int(r["num_updates"]) <= at]
        since = [r for r in done if int(r["num_updates"]) > before]
        active = [float(r.get("moe_active_experts") or 1) for r in since]
        points.append(
            {
                "at": at,
                "tokens": round(at * statistics.mean(float(r["wpb"]) for r in done)),
                "valid_nll_bits": row.get("valid_nll_loss", row["valid_loss"]),
                "active_experts": round(statistics.mean(active), 3) if active else "",
            }
        )
        before = at
    return points


def fine_tune(checkpoint: Path, classes: Path, experts: int, seed: int, flags: list[str]) -> float:
    """Accuracy, %, on the test passages after two epochs over the training passages."""
    out = checkpoint.parent / "tuned"
    out.mkdir(exist_ok=True)
    for left_over in out.glob("checkpoint*"):
        left_over.unlink()
    # what belongs to the task that the model learnt under; each has a value
    timing = [i for i, f in enumerate(flags) if f.startswith(("--evo-", "--dts-temperature-"))]
    mine = [f for i, f in enumerate(flags) if not {i, i - 1} & set(timing)]
    run(
        BIN / "fairseq-train", classes, "--user-dir", USER_DIR, "--task", "sentence_prediction",
        "--num-classes", 4, "--init-token", 0, "--separator-token", 2, "--restore-file",
        checkpoint, "--reset-optimizer", "--reset-dataloader", "--reset-meters",
        "--reset-lr-scheduler", *ROBERTA, "--max-positions", 128, "--moe-expert-count", experts,
        "--criterion", "moe_sentence_prediction", "--optimizer", "adam", "--lr", "5e-4",
        "--lr-scheduler", "inverse_sqrt", "--warmup-updates", 50, "--batch-size", 32,
        "--max-epoch", 2, "--seed", seed, "--required-batch-size-multiple", 1, "--cpu",
        "--num-workers", 0, "--no-save", "--save-dir", out, "--log-format", "json", *mine,
        out=out / "train.log",
    )  # fmt: skip
    return float(rows_in(out / "train.log", "valid")[-1]["valid_accuracy"])


def one(task: str, gate: str, label: str, seed: int, args, extra: list[str], folder: Path) -> dict:
    setup = TASKS[task]
    updates = args.updates or setup["updates"]
    every = max(1, updates // args.points)
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
        "--num-workers", "0", "--log-format", "json", "--log-interval", math.gcd(every, 20),
        "--validate-interval-updates", every, "--validate-interval", "999",
        "--save-interval", "999", *flags,
        out=work / "train.log",
    )  # fmt: skip
    last = rows_in(work / "train.log", "valid")[-1]
    assert int(last["valid_num_updates"]) == updates
    checkpoint = work / "checkpoint_last.pt"
    key = dict(task=task, gate=gate, label=label, seed=seed, updates=updates, experts=experts)
    row = {
        **key,
        "flags": " ".join(extra),
        "valid_nll_bits": last.get("valid_nll_loss", last["valid_loss"]),
        "active_experts": last.get("valid_moe_active_experts", 1),
        "load_max_mean": last.get("valid_moe_load_max_mean", ""),
        "dead_experts": last.get("valid_moe_dead_experts", ""),
        **machine(),
        "threads": 1,
    }
    common = ["--user-dir", USER_DIR, "--cpu", "--num-workers", "0", "--path", checkpoint]
    if args.score and task.startswith("multi30k"):
        run(
            BIN / "fairseq-generate", folder / "bin", *common, *setup["flags"][:4],
            "--beam", 4, "--max-tokens", 6000,
            "--remove-bpe", "sentencepiece", "--required-batch-size-multiple", "1",
            out=work / "test.gen",
        )  # fmt: skip
        found = re.findall(r"^H-(\d+)\t\S+\t(.*)$", (work / "test.gen").read_text(), re.MULTILINE)
        hypotheses = [h for _, h in sorted(found, key=lambda x: int(x[0]))]
        (work / "test.hyp").write_text("\n".join(hypotheses) + "\n")
        reference = lines_of(args.data / f"test2016.{setup['flags'][3]}")
        row["bleu"] = round(sacrebleu.corpus_bleu(hypotheses, [reference]).score, 2)
        row["chrf"] = round(sacrebleu.corpus_chrf(hypotheses, [reference]).score, 2)
    elif args.score:
        run(
            BIN / "fairseq-validate", folder / "bin", *common, "--task", setup["flags"][1],
            "--valid-subset", "test", "--max-tokens", "2048", "--tokens-per-sample", "128",
            "--seed", seed, "--log-format", "json",
            out=work / "test.log",
        )  # fmt: skip
        tested = rows_in(work / "test.log", "test")[-1]
        row["test_nll_bits"] = tested.get("test_nll_loss", tested["test_loss"])
    if args.score and task == "mlm":
        row["accuracy"] = fine_tune(checkpoint, folder / "classes", experts, seed, flags)
    with LOCK:
        append(args.csv.parent / "curves.csv", CURVE, [key | x for x in curve(work / "train.log")])
    if not args.keep:
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
    parser.add_argument("--points", type=int, default=10, help="validations in a run")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints, in --out")
    parser.add_argument("--no-score", dest="score", action="store_false", help="validation only")
    own, extra = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, extra = own[:at], own[at + 1 :]
    args = parser.parse_args(own)
    folder = prepare(args.task, args.data, args.out)
    updates = args.updates or TASKS[args.task]["updates"]
    names = ("task", "gate", "label", "seed", "updates", "flags")
    key = lambda r: tuple(str(r[k]) for k in names)
    seen = set()
    if args.csv.exists():
        with args.csv.open() as f:
            seen = {(*key(r), r["experts"]) for r in csv.DictReader(f)}

    def job(seed: int, gate: str) -> None:
        name = dict(task=args.task, gate=gate, label=args.label, seed=seed, updates=updates)
        experts = str(args.experts or TASKS[args.task]["experts"])
        if (*key(name | {"flags": " ".join(extra)}), experts) in seen:
            return
        row = one(args.task, gate, args.label, seed, args, extra, folder)
        with LOCK:
            append(args.csv, FIELDS, [row])
        print({k: v for k, v in row.items() if k not in ("device", "torch", "date")}, flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(job, s, g) for s in args.seeds for g in args.gates]:
            done.result()


if __name__ == "__main__":
    main()
