"""`evomoe-memorise`: convert a dense checkpoint to a MemoryFormer from which training continues.

Linear layers of attention and feed-forward networks are replaced by look-ups (MemoryFormer, arXiv
2411.12992), whose tables are fitted to the dense layers in two steps. The first step needs no data:
it fits the tables to the dense layers' outputs on normally distributed inputs. The second step,
calibration, runs batches of a data set through the model and fits one layer after another to the
dense model's outputs. Ordinary training then reduces the difference that is left. The tool converts
dense models of fairseq (transformer, transformer_lm, roberta) and of this package. Optimizer state
is left out. For each step the tool prints the share of the variance of each dense layer's output
that is kept, and the loss on a validation set.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from torch import Tensor

from fairseq_evomoe.memory.config import MemoryConfig, OutputProjection
from fairseq_evomoe.memory.conversion import Watch, calibrate, start, variance_kept
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tools.checkpoint import (
    build,
    built,
    command,
    command_line,
    flags_of,
    load,
    refuse_existing,
    target_model,
    with_flags,
    write,
)
from fairseq_evomoe.tools.dense_counterparts import units
from fairseq_evomoe.tools.validation import batches, measure


@dataclass(frozen=True)
class Step:
    """Result of one conversion step.

    Attributes:
        name: name of the step.
        loss: loss of the task on the validation set.
        kept: for each look-up, the share of the dense output's variance that it keeps, on batches
            that were not used for the fit.
    """

    name: str
    loss: float
    kept: dict[str, float]


def memorise(
    path: Path,
    memory: MemoryConfig,
    *,
    seed: int,
    tokens: int,
    subset: str,
    valid_subset: str,
    max_tokens: int,
    data: str | None = None,
) -> tuple[dict[str, Any], list[Step]]:
    """Convert the dense checkpoint at `path` to a MemoryFormer.

    Args:
        path: the dense checkpoint.
        memory: the flags of the look-ups.
        seed: seed of the new parameters and of the random inputs of the fit.
        tokens: number of tokens of `subset` to calibrate on. With 0, only the step without data is
            done.
        subset, valid_subset: names of the data sets for calibration and for the loss.
        max_tokens: maximum number of tokens per batch.
        data: folder with the data. None means the folder named in the checkpoint.

    Returns:
        The new checkpoint, and the result of each step.

    Raises:
        ValueError: the model cannot be converted; the message says why.
    """
    checkpoint = load(path)
    flags = flags_of(checkpoint)
    name = target_model(flags)
    dense, cfg, task = build(path, data)
    if moe_layers(dense):
        raise ValueError(f"{path} has experts; give a dense checkpoint")
    dense.eval()
    changes = {k: v for k, v in vars(memory).items() if k != "_name"}
    flags = with_flags(flags, _name=name, arch=name, moe_freq=0, **changes)
    torch.manual_seed(seed)
    ours = task.build_model(built(flags), from_checkpoint=True)
    target = ours.state_dict()
    for key, value in dense.state_dict().items():
        if key in target:
            target[key].copy_(value)
    ours.eval()
    made = units(ours, dense)
    if not made:
        raise ValueError(
            "--memory-layers names no layer of this model; give all, or numbers from 0 on"
        )
    task.load_dataset(subset)
    task.load_dataset(valid_subset)

    fitting: list[Any] = []
    testing: list[Any] = []
    read = 0
    goal = max(tokens, max_tokens)
    for sample in batches(dense, task, subset, max_tokens, shuffle=True):
        if not sample:
            continue
        # a quarter of the batches read is used for testing only
        (testing if len(testing) * 3 < len(fitting) else fitting).append(sample)
        read += sample["ntokens"]
        if read >= goal * 4 / 3 and testing:
            break
    if not testing:
        testing = fitting

    def watched(samples: Sequence[Any]) -> dict[str, Tensor]:
        watch = Watch()
        for unit in made:
            watch.targets(unit)
        return watch.run(dense, samples)

    loss = lambda model: measure(model, task, cfg, subset=valid_subset, max_tokens=max_tokens).loss
    held_out = watched(testing)
    steps = [Step("dense", loss(dense), {})]

    def note(step: str) -> None:
        steps.append(Step(step, loss(ours), variance_kept(ours, made, testing, held_out)))

    start(made, samples=8192, seed=seed)
    note("without data")
    if tokens:
        calibrate(ours, made, fitting, watched(fitting))
        note("calibrated")
    checkpoint["model"] = ours.state_dict()
    checkpoint["cfg"]["model"] = flags
    checkpoint.pop("last_optimizer_state", None)
    return checkpoint, steps


def run(args: argparse.Namespace) -> None:
    refuse_existing(args.output)
    memory = MemoryConfig.from_args(args)
    if not (memory.memory_ffn or memory.memory_attention):
        memory.memory_ffn = memory.memory_attention = True
    if memory.memory_attention:
        memory.need(
            memory.memory_out_proj != "none",
            "--memory-out-proj",
            "the dense model has an output projection; choose dense to keep it, or memory",
        )
    memory.need(
        not memory.memory_parallel and not memory.memory_ngram,
        "--memory-parallel" if memory.memory_parallel else "--memory-ngram",
        "replaces nothing that could be converted: train a model with it",
    )
    memory.need(
        memory.memory_tables == "trained",
        "--memory-tables",
        "leave the flag out; evomoe-export --tables converts trained tables",
    )
    memory.check()
    if args.tokens < 0:
        raise ValueError(f"--tokens {args.tokens}: must be 0 (no calibration) or more")
    checkpoint, steps = memorise(
        args.checkpoint,
        memory,
        seed=args.seed,
        tokens=args.tokens,
        subset=args.subset,
        valid_subset=args.valid_subset,
        max_tokens=args.max_tokens,
        data=args.data,
    )
    write(checkpoint, args.output)
    names = [s.name for s in steps[1:]]
    print(f"{'variance kept':<44}" + "".join(f"{n:>14}" for n in names))
    for layer in steps[-1].kept:
        print(f"{layer:<44}" + "".join(f"{s.kept[layer]:>14.3f}" for s in steps[1:]))
    print(f"loss on {args.valid_subset}: " + ", ".join(f"{s.name} {s.loss:.3f}" for s in steps))
    print(f"wrote {args.output}; to continue training, add to the dense run's flags:")
    print(
        "  --user-dir fairseq_evomoe --task <its task>_evomoe --criterion moe_<its criterion> "
        f"--arch {target_model(flags_of(checkpoint))} <its sizes> --moe-freq 0 "
        f"{command_line(memory)} --restore-file {args.output} --reset-optimizer "
        "--reset-lr-scheduler --reset-dataloader --reset-meters"
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], conflict_handler="resolve")
    made.add_argument("checkpoint", type=Path, help="dense checkpoint")
    made.add_argument("--output", type=Path, required=True)
    made.add_argument(
        "--data", help="folder with the data; default: the folder named in the checkpoint"
    )
    made.add_argument("--seed", type=int, default=1)
    made.add_argument(
        "--tokens",
        type=int,
        default=32768,
        help="number of tokens to calibrate on; with 0 the tables are fitted without data only",
    )
    made.add_argument("--subset", default="train", help="data set to calibrate on")
    made.add_argument("--valid-subset", default="valid", help="data set to measure the loss on")
    made.add_argument("--max-tokens", type=int, default=4096, help="tokens per batch")
    defaults = MemoryConfig(memory_out_proj=cast(OutputProjection, "dense"))
    gen_parser_from_dataclass(made, defaults, with_prefix="")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-memorise", parser(), run, argv)


if __name__ == "__main__":
    main()
