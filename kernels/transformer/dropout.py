"""Dropout on CPUs, where torch draws the numbers of a mask one after the other.

The kernel hashes a seed and the position of an element (csrc/transformer_cpu_body.h). The seed
comes from torch's generator, so that what restores or seeds that generator repeats the mask. The
backward pass computes the mask again, and none is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels.transformer import cpu

torch_dropout = F.dropout


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Elements are 0 with probability p, and else divided by 1 - p, as torch's function does it.

    Args:
        input: of any shape and dtype.
        p: from 0 to 1.
        training: without it, the result is the input.
        inplace: whether to overwrite the input, which is left to torch.

    Returns:
        A tensor of the shape and dtype of the input.
    """
    if not training or inplace or not 0 < p < 1 or not cpu.serves_dropout(input):
        return torch_dropout(input, p, training, inplace)
    seed = int(torch.randint(2**63 - 1, ()))
    return _Dropout.apply(input, p, seed)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return cpu.dropout(x, p, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(dy, ctx.p, ctx.seed), None, None
