"""Log and check how much memory look-up tables take, before they are built.

Letters: D width, t bits per table (tau), d extra bits (delta), K = ceil(D / t) tables, N = 2^t
rows.
"""

import logging
from pathlib import Path
from typing import Any

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory.config import MemoryConfig

logger = logging.getLogger(__name__)


def table_parameters(
    memory: MemoryConfig,
    moe: MoEConfig,
    *,
    side: str,
    layers: int,
    width: int,
    encoder: int | None = None,
) -> int:
    """Count the parameters of all tables on one side of a model.

    A feed-forward network has K N H parameters in its first look-up and ceil(H / (t + d)) N 2^d D
    in its second, where H is (t + d) K or `--memory-ffn-embed-dim`, and a look-up beside a dense
    network (`--memory-parallel`) K N D. Self-attention has K N 3 D. Attention over an encoder of
    width D' adds K N D + K' N 2 D, where K' = ceil(D' / t). Each output projection by look-up adds
    K N D. With `--memory-linear` N is 2^t + t. The tables of n-grams (`--memory-ngram`) have their
    rows times D.

    Args:
        side: "encoder" or "decoder".
        layers: number of layers.
        width: D.
        encoder: D' of the encoder that a decoder attends to, or 0 if there is none.
    """
    bits, wide = memory.memory_bits, memory.memory_bits + memory.memory_delta
    rows, more_rows = (2**t + t * memory.memory_linear for t in (bits, wide))
    count = -(-width // bits)
    hidden = memory.hidden_width(width)
    ffn = count * rows * hidden + -(-hidden // wide) * more_rows * width
    beside = count * rows * width
    out = count * rows * width * (memory.memory_out_proj == "memory")
    attention = count * rows * 3 * width + out
    if encoder:
        attention += count * rows * width + -(-encoder // bits) * rows * 2 * width + out
    total = memory.memory_ngram_rows * width if memory.memory_ngram else 0
    for index in range(layers):
        if moe.is_moe_layer(side, index):
            experts = moe.moe_expert_count + moe.moe_shared_expert
            total += ffn * experts * (moe.moe_expert_type == "memory")
        elif memory.memory_ffn and memory.covers(index):
            total += beside if memory.memory_parallel else ffn
        if memory.memory_attention and memory.covers(index):
            total += attention
    return total


def free_memory() -> int | None:
    """Return the bytes of available memory, or None if the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(x for x in lines if x.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def check_table_memory(cfg: Any, *sides: str) -> None:
    """Log how much memory the tables of a model will take, before the model is built.

    Raises:
        ValueError: the weights of the tables alone exceed the available memory; the message names
            the flags that make the tables smaller.
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
            encoder=cfg.encoder.embed_dim if cross else None,
        )
    if not total:
        return
    size = {"int8": 1, "bf16": 2}.get(cfg.memory.memory_tables, 4)
    logger.info(
        "look-up tables: %.1f M parameters, %.2f GB; training them with Adam in fp32 takes %.2f GB "
        "(weights, gradients, two moments)",
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
            "free memory: lower --memory-bits or --memory-delta (each bit less halves the tables "
            "that use it), or give fewer --memory-layers"
        )
    if total * 16 > free:
        logger.warning(
            "to train these tables on this machine's CPU, %.1f GB are needed, but %.1f GB are free",
            total * 16 / 1e9,
            free / 1e9,
        )
