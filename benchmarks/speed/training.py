"""Whole training updates beside fairseq's own model and criterion, in float32 and bfloat16.

    python -m benchmarks.speed.training --task lm --data BIN --csv benchmarks/results/training.csv

What is timed is one update (forward, backward, clip, Adam) by fairseq's Trainer, with this
package's tasks and criterions or with fairseq's own (`stock`). Models take turns in every round, on
the same batches. Medians over the rounds are reported, each also as a ratio of words/s to stock in
float32. MoE layers are in their last stage, with routers of unit scale that spread the tokens. With
`--arithmetic onednn`, products are float32 too, made by oneDNN (`--cpu-matmul`). With
`--device cuda`, `--arithmetic amp` is fairseq's autocast to fp16, and `bf16` has bfloat16 weights.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from fairseq import options, tasks, utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from benchmarks.quality.tasks import USER_DIR
from benchmarks.speed.timing import append, interleave, machine, milliseconds, ratios
from fairseq_evomoe.modules.moe_layer import moe_layers

FIELDS = (
    "task case arithmetic words_per_s ratio_to_stock ratio_p20 ratio_p80 ratio_to_dense "
    "rounds width threads device torch date"
).split()

LM = ("--tokens-per-sample", 256, "--share-decoder-input-output-embed")
TRANSLATION = ("--share-all-embeddings", "--label-smoothing", 0.1)
SETUPS = {
    "lm": {
        "stock": ("--task", "language_modeling", "--arch", "transformer_lm", *LM),
        "ours": ("--task", "language_modeling_evomoe", "--arch", "transformer_lm_evomoe", *LM),
        "criterion": "cross_entropy",
        "sides": ("decoder",),
    },
    "translation": {
        "stock": ("--task", "translation", "--arch", "transformer", *TRANSLATION),
        "ours": ("--task", "translation_evomoe", "--arch", "transformer_evomoe", *TRANSLATION),
        "criterion": "label_smoothed_cross_entropy",
        "sides": ("encoder", "decoder"),
    },
}


def sizes(task: str, width: int, layers: int | None) -> list[Any]:
    """The flags of a model's sizes; the layers are for each side."""
    flags: list[Any] = []
    sides = SETUPS[task]["sides"]
    for side in sides:
        values = {
            "embed-dim": width,
            "ffn-embed-dim": 4 * width,
            "attention-heads": max(4, width // 64),
            "layers": layers or (4 if len(sides) == 1 else 3),
        }
        flags += [x for name, n in values.items() for x in (f"--{side}-{name}", n)]
    if task == "lm":
        # without them fairseq's own language model makes its output layer 512 wide
        flags += ["--decoder-output-dim", width, "--decoder-input-dim", width]
    return flags


DENSE = ("--moe-freq", 0)
MOE = ("--moe-freq", 2, "--moe-expert-count", 8, "--evo-spawn-update", 0)
CASES = {
    "dense": DENSE,
    "switch": (*MOE, "--moe-gate", "switch"),
    "dts": (*MOE, "--moe-gate", "dts", "--dts-hard-update", 1),
    "base": (*MOE, "--moe-gate", "base"),
    "expert_choice": ("--encoder-moe-freq", 2, *MOE[2:], "--moe-gate", "expert_choice"),
    "n-grams": (*DENSE, "--memory-ngram", 2),
    "memoryformer": (*DENSE, "--memory-ffn", "--memory-attention", "--memory-bits", 4),
}
ARITHMETIC = {
    "float32": ("--cpu-matmul", "torch"),
    "onednn": ("--cpu-matmul", "onednn"),
    "bf16": ("--bf16",),
    "amp": ("--amp",),
}


class Run:
    """A trainer with its own model, which repeats the same batches."""

    def __init__(self, argv: list[Any], batches: int) -> None:
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, [str(a) for a in argv])
        cfg = convert_namespace_to_omegaconf(args)
        utils.set_torch_seed(1)
        task = tasks.setup_task(cfg.task)
        model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
        self.trainer = Trainer(cfg, task, model, criterion)
        task.load_dataset("train")
        self.iterator = self.trainer.get_train_iterator(epoch=1, load_dataset=False)
        self.trainer.begin_epoch(1)
        self.batches = list(itertools.islice(self.epoch(), batches))
        self.words = sum(int(b["ntokens"]) for b in self.batches)
        for _, layer in moe_layers(model):
            layer.set_split(True)
            torch.nn.init.normal_(layer.gate.weight)

    def epoch(self) -> Any:
        """The batches from the first on, in a random order that is the same for all models."""
        return self.iterator.next_epoch_itr(shuffle=True)

    def __call__(self) -> None:
        for batch in self.batches:
            self.trainer.train_step([batch])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which models are trained, on what data and how often."""
    parser.add_argument("--task", choices=SETUPS, required=True)
    parser.add_argument("--data", type=Path, required=True, help="binarised by fairseq-preprocess")
    usual = [case for case in CASES if case != "expert_choice"]
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=CASES,
        default=usual,
        help="default: all but expert_choice, which works in encoders alone",
    )
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, help="layers of each side (default: 4, or 3 and 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=4, help="updates per round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)


def _run(args: argparse.Namespace, kind: str, criterion: str, *flags: Any) -> Run:
    common = ("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", 1e-3)
    common += ("--clip-norm", 1, "--max-update", 10**6, "--num-workers", 0)
    common += ("--cpu",) if args.device == "cpu" else ()
    common += tuple(sizes(args.task, args.width, args.layers))
    common += ("--max-tokens", args.max_tokens, "--criterion", criterion)
    argv = [args.data, "--user-dir", USER_DIR, *SETUPS[args.task][kind], *common, *flags]
    return Run(argv, args.batches)


def stock_run(args: argparse.Namespace, *flags: Any) -> Run:
    """fairseq's own model and criterion."""
    return _run(args, "stock", SETUPS[args.task]["criterion"], *flags)


def our_run(args: argparse.Namespace, case: str, arithmetic: str) -> Run:
    """One of `CASES` in one of `ARITHMETIC`."""
    criterion = f"moe_{SETUPS[args.task]['criterion']}"
    return _run(args, "ours", criterion, *CASES[case], *ARITHMETIC[arithmetic])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--arithmetic", nargs="+", choices=ARITHMETIC, default=["float32", "amp"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = {("stock", "float32"): stock_run(args)}
    if "bf16" in args.arithmetic:
        runs["stock", "bf16"] = stock_run(args, "--bf16")
    for case, arithmetic in itertools.product(args.cases, args.arithmetic):
        runs[case, arithmetic] = our_run(args, case, arithmetic)
    times = interleave({f"{c} {a}": r for (c, a), r in runs.items()}, args.rounds)
    rows = []
    for (case, arithmetic), r in runs.items():
        name = f"{case} {arithmetic}"
        to_stock = ratios(times, "stock float32", name)
        dense = f"dense {arithmetic}"
        rows.append(
            {
                "task": args.task,
                "case": case,
                "arithmetic": arithmetic,
                "words_per_s": round(1e3 * r.words / milliseconds(times[name])),
                "ratio_to_stock": to_stock["ratio_p50"],
                "ratio_p20": to_stock["ratio_p20"],
                "ratio_p80": to_stock["ratio_p80"],
                "ratio_to_dense": ratios(times, dense, name)["ratio_p50"] if dense in times else "",
                **{"rounds": args.rounds, "width": args.width},
                **machine(args.device),
            }
        )
        print(rows[-1], flush=True)
    append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
