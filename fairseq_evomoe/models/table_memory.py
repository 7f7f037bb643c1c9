"""How much memory look-up tables take, said and checked before they are built.

Letters: D width, t bits a table (tau), d more bits (delta), K = ceil(D / t) tables, N = 2^t rows.
"""

import logging
from pathlib import Path
from typing import Any

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory_config import MemoryConfig

logger = logging.getLogger(__name__)


def table_parameters(
    memory: MemoryConfig, moe: MoEConfig, *, side: str, layers: int, width: int, encoder: int = 0
) -> int:
    """Parameters of all tables on one side of a model.

    A feed-forward network has K N (t + d) K in its first look-up and K N 2^d D in its second;
    attention K N 3 D, over an encoder of width D' K N D + K' N 2 D more; an output projection by
    look-up K N D each.

    Args:
        side: "encoder" or "decoder".
        layers: how many layers.
        width: D.
        encoder: D' of the encoder that a decoder attends to; 0: none.
    """
    bits, rows = memory.memory_bits, 2**memory.memory_bits
    count = -(-width // bits)
    first = count * rows * (bits + memory.memory_delta) * count
    ffn = first + count * rows * 2**memory.memory_delta * width
    out = count * rows * width * (memory.memory_out_proj == "memory")
    attention = count * rows * 3 * width + out
    if encoder:
        attention += count * rows * width + -(-encoder // bits) * rows * 2 * width + out
    total = 0
    for index in range(layers):
        if moe.is_moe_layer(side, index):
            experts = moe.moe_expert_count + moe.moe_shared_expert
            total += ffn * experts * (moe.expert_type == "memory")
        elif memory.memory_ffn and memory.at(index):
            total += ffn
        if memory.memory_attention and memory.at(index):
            total += attention
    return total


def free_memory() -> int | None:
    """Bytes that programs can still take on this machine; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(x for x in lines if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def state_tables(cfg: Any, *sides: str) -> None:
    """Log what the tables of a model will take, before it is built.

    Raises:
        ValueError: their weights alone do not fit; the message names the flags that shrink them.
    """
    total = 0
    for side in sides:
        part = getattr(cfg, side)
        cross = side == "decoder" and "encoder" in sides and not cfg.no_cross_attention
        total += table_parameters(
            cfg.memory,
            cfg.moe,
            side=side,
            layers=part.layers,
            width=part.embed_dim,
            encoder=cfg.encoder.embed_dim if cross else 0,
        )
    if not total:
        return
    size = {"int8": 1, "bf16": 2}.get(cfg.memory.memory_tables, 4)
    logger.info(
        "look-up tables: %.1f M parameters, %.2f GB; trained with Adam in fp32 %.2f GB (weights, "
        "gradients, two moments)",
        total / 1e6,
        total * size / 1e9,
        total * 16 / 1e9,
    )
    free = free_memory()
    if free is None:
        return
    if total * size > free:
        raise ValueError(
            f"look-up tables of {total * size / 1e9:.1f} GB do not fit into {free / 1e9:.1f} GB of "
            "free memory: lower --memory-bits or --memory-delta (each bit halves the tables it "
            "is in), or give fewer --memory-layers"
        )
    if total * 16 > free:
        logger.warning(
            "to train these tables on this machine's CPU takes %.1f GB, and %.1f GB are free",
            total * 16 / 1e9,
            free / 1e9,
        )
