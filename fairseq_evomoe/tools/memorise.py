"""`evomoe-memorise`: a dense checkpoint becomes a MemoryFormer that training continues from.

Linear maps of attention and feed-forward networks are replaced by look-ups (MemoryFormer, arXiv
2411.12992) whose tables are fitted to them: first without data, to what the maps do to normal
inputs, then on batches of a data set, layer after layer, to what the dense model's own layers give
there. What remains of the difference is for ordinary training. Dense models of fairseq
(transformer, transformer_lm, roberta) and of this package are understood; optimizer state stays
behind. Printed: how much of the variance of each dense layer's output every step keeps, and the
loss of every step on a validation set.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.dataclass.utils import gen_parser_from_dataclass
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_evomoe.memory_config import MemoryConfig
from fairseq_evomoe.modules.memory_fit import fit, linear_tables
from fairseq_evomoe.modules.memory_layer import MemoryFFN
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
from fairseq_evomoe.tools.twins import Unit, Watch, units, variance_kept
from fairseq_evomoe.tools.validation import batches, measure


@torch.no_grad()
def _directions(ffn: MemoryFFN, generator: torch.Generator) -> None:
    """The first half of a memory FFN, which decides what the second half hashes.

    Of the t + delta values that a table of the second half hashes, t are the table's own slice of
    the input, whose signs arrive unchanged, and delta are random directions of all of it.
    """
    first, bits = ffn.first, ffn.second.bits
    width = first.tables.size(2)
    weight = torch.randn(width, first.width, generator=generator) / first.width**0.5
    at = torch.arange(first.width)
    row = at // first.bits * bits + at % first.bits
    weight[row] = 0
    weight[row, at] = 1
    first.tables.copy_(linear_tables(first, weight) / first.scale)


@torch.no_grad()
def start(made: Sequence[Unit], *, samples: int, seed: int) -> None:
    """Fill all look-ups without data: fitted to normal inputs behind the dense model's norms."""
    generator = torch.Generator().manual_seed(seed)
    for unit in tqdm(made, desc="without data", unit="layer", disable=None):
        width = unit.layer.width if unit.ffn is None else unit.ffn.first.width
        x = torch.randn(samples, width, generator=generator)
        if unit.norm is not None:
            x = x * unit.norm.weight.float() + unit.norm.bias.float()
        y = unit.free(x)
        if unit.ffn is not None:
            _directions(unit.ffn, generator)
            x = unit.ffn.norm(unit.ffn.first(x))
        prior = None if unit.weight is None else linear_tables(unit.layer, unit.weight)
        # of a linear map the prior is nearly the best there is
        fit(unit.layer, x, y, prior=prior, strength=8 if prior is None else 64)


@torch.no_grad()
def calibrate(
    ours: nn.Module, made: Sequence[Unit], samples: Sequence[Any], wanted: dict[str, Tensor]
) -> None:
    """Fit every look-up, in forward order, to the dense layer's outputs on real inputs.

    A look-up reads what the look-ups before it give, so it also makes up for their errors.
    """
    for unit in tqdm(made, desc="calibration", unit="layer", disable=None):
        watch = Watch()
        watch.inputs(unit)
        x = watch.run(ours, samples)[unit.name]
        prior = unit.layer.tables.float() * unit.layer.scale
        fit(unit.layer, x, wanted[unit.name], prior=prior)


@dataclass(frozen=True)
class Step:
    """What a conversion step left.

    Attributes:
        name: of the step.
        loss: of the task on the validation set.
        kept: look-up -> share of the dense output's variance, on batches not used to fit.
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
    """The MemoryFormer checkpoint made from the dense one at `path`, and what each step left.

    Args:
        memory: the flags of look-ups.
        tokens: of `subset`, to calibrate on; 0: only the start without data.
        subset, valid_subset: names of data sets.
        max_tokens: a batch.
        data: folder with the data; None: the one named in the checkpoint.

    Raises:
        ValueError: the model cannot be converted; the message says why.
    """
    checkpoint = load(path)
    flags = flags_of(checkpoint)
    name = target_model(flags)
    dense, cfg, task = build(path, data)
    if moe_layers(dense):
        raise ValueError(f"{path} has experts: look-ups replace dense layers")
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
        raise ValueError("--memory-layers: names no layer of this model")
    task.load_dataset(subset)
    task.load_dataset(valid_subset)

    fitting: list[Any] = []
    testing: list[Any] = []
    read = 0
    goal = max(tokens, max_tokens)
    for sample in batches(dense, task, subset, max_tokens, shuffle=True):
        if not sample:
            continue
        # a quarter of what is read is for testing alone
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
    memory.need(memory.memory_tables == "trained", "--memory-tables", "evomoe-export makes these")
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
    print(f"wrote {args.output}; to train what is left, add to the dense run's flags:")
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
    made.add_argument("--data", help="folder with the data; default: the checkpoint's")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument(
        "--tokens", type=int, default=32768, help="to calibrate on; 0: start without data only"
    )
    made.add_argument("--subset", default="train", help="data set to calibrate on")
    made.add_argument("--valid-subset", default="valid", help="data set to measure the loss on")
    made.add_argument("--max-tokens", type=int, default=4096, help="in a batch")
    gen_parser_from_dataclass(made, MemoryConfig(memory_out_proj="dense"), with_prefix="")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-memorise", parser(), run, argv)


if __name__ == "__main__":
    main()
