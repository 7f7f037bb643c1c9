"""`evomoe-export`: convert a checkpoint to safetensors and JSON, and back, bit for bit.

The exported folder holds `model.safetensors` (weights and evolution state) and `config.json` (every
flag, the number of updates, and which tensors are tied). It contains no pickled data, so it is safe
to share and can be read by other software. Optimizer state is not exported. If the input is such a
folder, the tool writes the checkpoint again.
"""

import argparse
import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from tqdm import tqdm

from fairseq_evomoe.kernels.lookup.score import quantise
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.rule import HashRule, Tables
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
_KEPT = ("args", "cfg", "optimizer_history", "task_state")
_TAG = "__python__"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ValueError("safetensors is missing: pip install 'fairseq-evomoe[export]'") from error
    return safetensors.torch


def encode(value: Any) -> Any:
    """Encode plain Python data as JSON, from which `decode` restores equal values and types.

    Raises:
        ValueError: the data holds other types than numbers, text, containers and Namespaces.
    """
    if isinstance(value, DictConfig | ListConfig):
        value = OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [encode(v) for v in value]}
    if isinstance(value, Namespace):
        return {_TAG: "Namespace", "items": encode(vars(value))}
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value) and _TAG not in value:
            return {k: encode(v) for k, v in value.items()}
        return {_TAG: "dict", "items": [[encode(k), encode(v)] for k, v in value.items()]}
    raise ValueError(f"cannot write a {type(value).__name__} as JSON: {value!r:.80}")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {k: decode(v) for k, v in value.items()}
    if kind == "tuple":
        return tuple(decode(v) for v in value["items"])
    if kind == "Namespace":
        return Namespace(**decode(value["items"]))
    if kind == "dict":
        return {decode(k): decode(v) for k, v in value["items"]}
    raise ValueError(f"{CONFIG} holds an unknown {_TAG} {kind!r}")


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
        **{k: encode(checkpoint[k]) for k in _KEPT if k in checkpoint},
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
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG} is not of format {FORMAT!r}")
    tensors = safetensors.load_file(folder / WEIGHTS)
    tied = config["tied"]
    model = {}
    for name in config["order"]:
        origin = tied.get(name, name)
        if origin not in tensors:
            raise ValueError(f"{folder / WEIGHTS} lacks {origin}")
        model[name] = tensors[origin]
    checkpoint = {k: decode(config[k]) for k in _KEPT if k in config}
    return {**checkpoint, "model": model, "extra_state": {}}


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


def _convert_tables(checkpoint: dict[str, Any], source: Path, dtype: str) -> None:
    found = _convertible(
        *(checkpoint, source),
        what="tables",
        storage="memory_tables",
        endings=(".tables",),
        lacks="look-up layer",
    )
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


def run(args: argparse.Namespace) -> None:
    if args.tables or args.experts:
        refuse_existing(args.output)
        write(converted(args.source, tables=args.tables, experts=args.experts), args.output)
    elif args.source.is_dir():
        refuse_existing(args.output)
        write(restore(args.source), args.output)
    else:
        export(args.source, args.output)
    print(f"wrote {args.output}")


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
    return made


def main(argv: Sequence[str] | None = None) -> None:
    command("evomoe-export", parser(), run, argv)


if __name__ == "__main__":
    main()
