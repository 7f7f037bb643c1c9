"""Checkpoints for inference alone, with smaller weights: `evomoe-export --tables` and others."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairseq_evomoe.kernels.lookup.score import quantise
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.rule import HashRule, Tables
from fairseq_evomoe.old_names import read_flag
from fairseq_evomoe.tools.checkpoint import (
    built,
    flags_of,
    load,
    model_class,
    with_flags,
)


def converted(
    source: Path,
    *,
    tables: str | None = None,
    experts: str | None = None,
    output_layer: str | None = None,
    ngrams: str | None = None,
) -> dict[str, Any]:
    """Read a checkpoint and convert its tables, experts or output layer, for inference only.

    fairseq-generate and fairseq's other commands read the result like any checkpoint. Optimizer
    state is left out.

    Args:
        tables: "bf16", or "int8" with one scale per row. The linear part of tables
            (`--memory-linear`) is added to the rows; "fp32" does this alone.
        experts: "int8", with one scale per row of an expert's matrices.
        output_layer: "int8", with one scale per word.
        ngrams: "mapped" leaves the tables of `--memory-ngram` in the file when a model is loaded;
            without `tables`, all tables become "fp32".

    Raises:
        ValueError: the checkpoint has nothing that can be converted.
    """
    checkpoint = load(source)
    checkpoint.pop("last_optimizer_state", None)
    if ngrams is not None:
        _map_ngrams(checkpoint, source)
        if read_flag(flags_of(checkpoint), "memory_tables", "trained") == "trained":
            tables = tables or "fp32"
    if tables is not None:
        _convert_tables(checkpoint, source, tables)
    if experts is not None:
        _convert_experts(checkpoint, source, experts)
    if output_layer is not None:
        _convert_output_layer(checkpoint, source, output_layer)
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


def _convert_output_layer(checkpoint: dict[str, Any], source: Path, dtype: str) -> None:
    """Rounds a copy of the matrix: embeddings that share it stay as they are."""
    flags, model = flags_of(checkpoint), checkpoint["model"]
    name = "decoder.output_projection.weight"
    if read_flag(flags, "output_storage", "trained") != "trained":
        raise ValueError(f"--output-layer: that of {source} is converted already")
    if name not in model:
        raise ValueError(
            f"--output-layer: {source} has no output layer of a decoder that is one matrix"
        )
    if not model_class(flags).__module__.startswith("fairseq_evomoe."):
        raise ValueError(f"--output-layer: {source} holds a model of fairseq's own; train ours")
    model[name], model["decoder.output_projection.row_scale"] = quantise(model[name])
    checkpoint["cfg"]["model"] = with_flags(flags, output_storage=dtype)


def _map_ngrams(checkpoint: dict[str, Any], source: Path) -> None:
    """Record that n-gram tables stay in the file; `compat.saving` and `NgramTables` act on it."""
    flags = flags_of(checkpoint)
    if not read_flag(flags, "memory_ngram"):
        raise ValueError(f"--ngrams: {source} has no n-gram tables (--memory-ngram)")
    checkpoint["cfg"]["model"] = with_flags(flags, memory_ngram_mapped=True)


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
