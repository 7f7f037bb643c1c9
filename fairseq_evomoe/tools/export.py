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

from fairseq_evomoe.tools import json_values
from fairseq_evomoe.tools.checkpoint import (
    command,
    flags_of,
    in_place_of,
    load,
    refuse_existing,
    write,
)
from fairseq_evomoe.tools.converted import converted

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
    if args.from_hf and (args.format != "safetensors" or _smaller(args)):
        raise ValueError(
            "--from-hf: makes a checkpoint; leave out --format, --tables, --experts, "
            "--output-layer and --ngrams"
        )


def _smaller(args: argparse.Namespace) -> dict[str, str]:
    """The dtypes of weights that are asked for: argument of `converted` -> dtype."""
    names = ("tables", "experts", "output_layer", "ngrams")
    return {name: getattr(args, name) for name in names if getattr(args, name)}


def run(args: argparse.Namespace) -> None:
    _refuse_without_effect(args)
    if args.format != "safetensors":
        _for_transformers(args)
    elif smaller := _smaller(args):
        refuse_existing(args.output)
        write(converted(args.source, **smaller), args.output)
    elif args.from_hf or args.source.is_dir():
        refuse_existing(args.output)
        write(_restored(args), args.output)
    else:
        export(args.source, args.output)
    print(f"wrote {args.output}")


def _for_transformers(args: argparse.Namespace) -> None:
    if args.output_layer:
        raise ValueError(
            f"--format {args.format}: transformers has no output layer in int8; leave out "
            "--output-layer"
        )
    if _smaller(args):
        raise ValueError(
            f"--format {args.format}: convert first (--tables, --experts or --ngrams), and export "
            "the checkpoint that this writes"
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
        "--output-layer",
        choices=("int8",),
        help="write a checkpoint with the decoder's output layer of this dtype instead, for "
        "inference; the embeddings stay as they are",
    )
    made.add_argument(
        "--ngrams",
        choices=("mapped",),
        help="write a checkpoint whose n-gram tables stay in its file when it is loaded, and of "
        "which inference reads the rows that it needs; without --tables, all tables become fp32",
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
