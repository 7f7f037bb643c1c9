"""Weights of MemoryFormer's official code.

Letters: H output width, K tables, N rows per table.
"""

import torch
from torch import Tensor

from fairseq_evomoe.kernels.lookup.score import patterns
from fairseq_evomoe.memory.layer import MemoryLayer


@torch.no_grad()
def load_official(layer: MemoryLayer, tables: Tensor, bias: Tensor | None = None) -> None:
    """Fill a layer with weights of MemoryFormer's official code.

    In the official code the first value of a slice is the highest bit of a row's number; here (and
    in eq. 4) it is the lowest, so the rows of each table are permuted. The official score is
    `abs_prob` at temperature 1. The official code counts z = 0 as positive on GPUs, as this package
    does, and as negative on CPUs.

    Args:
        layer: layer that receives the weights.
        tables: (K N, H) or (K, N, H), any float dtype.
        bias: (H,).

    Raises:
        ValueError: the sizes or the layer's score differ.
    """
    if (layer.rule.score, layer.rule.temperature) != ("abs_prob", 1.0):
        raise ValueError(
            f"--memory-score {layer.rule.score}: the official weights were trained with abs_prob "
            "at --memory-temperature 1"
        )
    if tables.numel() != layer.tables.numel() or tables.size(-1) != layer.tables.size(-1):
        raise ValueError(
            f"tables {tuple(tables.shape)} do not fit {tuple(layer.tables.shape)}: --memory-bits "
            "or the widths differ"
        )
    reversed_rows = (patterns(layer.rule.bits) << torch.arange(layer.rule.bits).flip(0)).sum(-1)
    stacked = tables.view(layer.tables.shape)
    layer.fill(stacked[:, reversed_rows], torch.zeros(tables.size(-1)) if bias is None else bias)
