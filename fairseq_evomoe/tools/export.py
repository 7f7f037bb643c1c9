"""`evomoe-export`: convert a checkpoint to safetensors and JSON, and back, bit for bit.

The exported folder holds `model.safetensors` (weights and evolution state) and `config.json` (every
flag, the number of updates, and which tensors are tied). It contains no pickled data, so it is safe
to share and can be read by other software. Optimizer state is not exported. If the input is such a
folder, the tool writes the checkpoint again. With `--format hf` it writes a folder that
transformers loads; see `fairseq_evomoe.hf`.
"""

import argparse
import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fairseq_evomoe.kernels.lookup.score import quantise
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.rule import HashRule, Tables
from fairseq_evomoe.tools import json_values
from fairseq_evomoe.tools.checkpoint import (
    built,
    command,
    flags_of,
    in_place_of,
    load,
    read_flag,
    refuse_existing,
    with_flags,
    write,
)

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "fairseq_evomoe checkpoint 1"
HF_ONLY = ("with_code", "scores")
HF_AND_NLLB = ("data", "sentencepiece", "beam", "lenpen", "max_len_b", "shard_size")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("safetensors is missing: pip install 'fairseq-evomoe[export]'") from error
    return safetensors.torch


def export(source: Path, folder: Path) -> None:
    """Export the checkpoint `source` to a folder.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: the checkpoint holds data that JSON cannot represent.
    """
    safetensors = _safetensors()
    refuse_existing(folder)
    checkpoint = load(source)
    flags_of(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, value in checkpoint["model"].items():
        place = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            tensors[name] = value.contiguous().clone()
    config = {
        "format": FORMAT,
        "order": list(checkpoint["model"]),
        "tied": tied,
        **json_values.kept(checkpoint),
    }
    with in_place_of(folder) as partial:
        partial.mkdir()
        safetensors.save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")


def restore(folder: Path) -> dict[str, Any]:
    """Read the checkpoint back from an exported folder.

    Raises:
        ValueError: `evomoe-export` did not write the folder, or its two files do not match.
    """
    safetensors = _safetensors()
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; it was not written by evomoe-export")
    config = json_values.read(folder / CONFIG)
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG} is not of format {FORMAT!r}")
    tensors = safetensors.load_file(folder / WEIGHTS)
    tied = config["tied"]
    model = {}
    for name in config["order"]:
        origin = tied.get(name, name)
        if origin not in tensors:
            raise ValueError(f"{folder / WEIGHTS} lacks {origin}")
        model[name] = tensors[origin]
    return {**json_values.restored(config), "model": model, "extra_state": {}}


def converted(
    source: Path, *, tables: str | None = None, experts: str | None = None
) -> dict[str, Any]:
    """Read a checkpoint and convert its look-up tables or its experts, for inference only.

    fairseq-generate and fairseq's other commands read the result like any checkpoint. Optimizer
    state is left out.

    Args:
        tables: "bf16", or "int8" with one scale per row. The linear part of tables
            (`--memory-linear`) is added to the rows; "fp32" does this alone.
        experts: "int8", with one scale per row of an expert's matrices.

    Raises:
        ValueError: the checkpoint has nothing that can be converted.
    """
    checkpoint = load(source)
    checkpoint.pop("last_optimizer_state", None)
    if tables is not None:
        _convert_tables(checkpoint, source, tables)
    if experts is not None:
        _convert_experts(checkpoint, source, experts)
    return checkpoint


def _convertible(
    checkpoint: dict[str, Any],
    source: Path,
    *,
    what: str,
    storage: str,
    endings: tuple[str, ...],
    lacks: str,
) -> list[str]:
    """Names of the weights that an option converts.

    Args:
        what: of the option, "tables" or "experts".
        storage: the model's flag that says how they are stored.
        endings: of the names.
        lacks: what a model without such weights has none of.

    Raises:
        ValueError: they are converted already, have no such form, or do not exist.
    """
    if read_flag(flags_of(checkpoint), storage, "trained") != "trained":
        raise ValueError(f"--{what}: the {what} of {source} are converted already")
    if any(name.endswith("experts.tables1") for name in checkpoint["model"]):
        raise ValueError(f"--{what}: memory experts (--moe-expert-type memory) cannot be converted")
    found = [name for name in checkpoint["model"] if name.endswith(endings)]
    if not found:
        raise ValueError(f"--{what}: {source} has no {lacks}")
    return found


def _convert_experts(checkpoint: dict[str, Any], source: Path, dtype: str) -> None:
    found = _convertible(
        *(checkpoint, source),
        what="experts",
        storage="moe_expert_storage",
        endings=("experts.w1", "experts.w2"),
        lacks="experts",
    )
    model = checkpoint["model"]
    for name in tqdm(found, unit="matrix", disable=None):
        layer, number = name[:-2], name[-1]
        model[name], model[f"{layer}scale{number}"] = quantise(model[name])
    flags = flags_of(checkpoint)
    checkpoint["cfg"]["model"] = with_flags(flags, moe_expert_storage=dtype)


def _without_dense_layers(checkpoint: dict[str, Any], source: Path) -> None:
    """Remove the dense layers that look-ups grew from (`--memory-spawn-update`), in place.

    Raises:
        ValueError: they have not become look-ups yet.
    """
    model = checkpoint["model"]
    for name in [n for n in model if n.endswith(".spawned")]:
        if not model[name]:
            update = read_flag(flags_of(checkpoint), "memory_spawn_update")
            raise ValueError(
                f"--tables: {source} is from before update {update} (--memory-spawn-update), when "
                "its layers were still dense; take a later checkpoint"
            )
        part = name.removesuffix("spawned")
        for dense in [n for n in model if n.startswith((f"{part}fc1.", f"{part}fc2."))]:
            del model[dense]
        del model[name]
    checkpoint["cfg"]["model"] = with_flags(flags_of(checkpoint), memory_spawn_update=0)


def _convert_tables(checkpoint: dict[str, Any], source: Path, dtype: str) -> None:
    found = _convertible(
        *(checkpoint, source),
        what="tables",
        storage="memory_tables",
        endings=(".tables",),
        lacks="look-up layer",
    )
    _without_dense_layers(checkpoint, source)
    flags, model = flags_of(checkpoint), checkpoint["model"]
    memory = MemoryConfig.from_args(built(flags))
    for name in tqdm(found, unit="layer", disable=None):
        layer = name.removesuffix("tables")
        linear = model.pop(layer + "linear", None)
        if linear is not None:
            rule = HashRule.from_flags(linear.size(0) * linear.size(1), linear.size(1), memory)
            model[name] = rule.fold(Tables(model[name], None, linear)).rows
        if dtype == "bf16":
            model[name] = model[name].bfloat16()
        elif dtype == "int8":
            model[name], model[layer + "row_scale"] = quantise(model[name])
    checkpoint["cfg"]["model"] = with_flags(
        flags, memory_tables=dtype, memory_linear=False, memory_straight_through=False
    )


def _refuse_without_effect(args: argparse.Namespace) -> None:
    """Refuse flags that the chosen format does not read.

    Raises:
        ValueError: there is one; the message names it and the formats that read it.
    """
    usual = parser().get_default
    readers = dict.fromkeys(HF_ONLY, ("hf",)) | dict.fromkeys(HF_AND_NLLB, ("hf", "nllb-moe"))
    for name, formats in readers.items():
        if getattr(args, name) != usual(name) and args.format not in formats:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag}: has no effect without --format {' or '.join(formats)}")
    if args.from_hf and (args.format != "safetensors" or args.tables or args.experts):
        raise ValueError("--from-hf: makes a checkpoint; leave out --format, --tables, --experts")


def run(args: argparse.Namespace) -> None:
    _refuse_without_effect(args)
    if args.format != "safetensors":
        _for_transformers(args)
    elif args.tables or args.experts:
        refuse_existing(args.output)
        write(converted(args.source, tables=args.tables, experts=args.experts), args.output)
    elif args.from_hf or args.source.is_dir():
        refuse_existing(args.output)
        write(_restored(args), args.output)
    else:
        export(args.source, args.output)
    print(f"wrote {args.output}")


def _for_transformers(args: argparse.Namespace) -> None:
    if args.tables or args.experts:
        raise ValueError(
            f"--format {args.format}: convert first (--tables or --experts), and export the "
            "checkpoint that this writes"
        )
    refuse_existing(args.output)
    to_hf = _transformers("write")
    chosen = {f.name: getattr(args, f.name) for f in dataclasses.fields(to_hf.Options)}
    export_to = _transformers("nllb").export if args.format == "nllb-moe" else to_hf.export
    difference = export_to(args.source, args.output, to_hf.Options(**chosen))
    print(f"logits differ from fairseq's by at most {difference:.1e} on padded random text")


def _restored(args: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint in a folder, of either format."""
    if not args.source.is_dir():
        raise ValueError(f"--from-hf {args.source}: not a folder")
    if args.from_hf or (args.source / "fairseq.json").is_file():
        return _transformers("read").restore(args.source)
    return restore(args.source)


def _transformers(name: str) -> Any:
    """A file of `to_hf`, which needs transformers.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        return importlib.import_module(f"fairseq_evomoe.tools.to_hf.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fairseq_evomoe"):
            raise
        raise ValueError(f"{error.name} is missing: pip install 'fairseq-evomoe[hf]'") from error


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    made.add_argument("source", type=Path, help="a checkpoint or an exported folder")
    made.add_argument("--output", type=Path, required=True, help="folder or checkpoint to write")
    made.add_argument(
        "--tables",
        choices=("fp32", "bf16", "int8"),
        help="write a checkpoint with look-up tables of this dtype instead, for inference",
    )
    made.add_argument(
        "--experts",
        choices=("int8",),
        help="write a checkpoint with experts' matrices of this dtype instead, for inference",
    )
    made.add_argument(
        "--format",
        choices=("safetensors", "hf", "nllb-moe"),
        default="safetensors",
        help="safetensors: weights and flags in two files; hf: a folder that transformers loads; "
        "nllb-moe: one that its own NllbMoe loads, for pre-norm translation models with --moe-gate "
        "gshard",
    )
    made.add_argument(
        "--from-hf", action="store_true", help="make a checkpoint of a folder of --format hf"
    )
    hf = made.add_argument_group("--format hf and nllb-moe")
    hf.add_argument(
        "--data", help="folder with the dictionaries; by default the one that the checkpoint names"
    )
    hf.add_argument(
        "--sentencepiece",
        type=Path,
        nargs="+",
        default=[],
        metavar="MODEL",
        help="the model that split the training text, or one for source and one for target; "
        "without it, words are separated by spaces",
    )
    hf.add_argument(
        "--with-code",
        action="store_true",
        help="add the Python files of the model, so that nothing but transformers need be "
        "installed (trust_remote_code)",
    )
    hf.add_argument("--beam", type=int, default=5, help="default number of beams")
    hf.add_argument("--lenpen", type=float, default=1.0, help="default length penalty")
    hf.add_argument("--max-len-b", type=int, default=200, help="default maximum length")
    hf.add_argument("--shard-size", default="5GB", help="largest size of a file of weights")
    hf.add_argument(
        "--scores",
        nargs="+",
        default=[],
        metavar="LINE",
        help="lines for the model card, such as 'BLEU on newstest2014: 27.3'",
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-export", parser(), run, argv)


if __name__ == "__main__":
    main()
