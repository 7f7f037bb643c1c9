"""The output layer of a decoder in int8, for inference: `evomoe-export --output-layer int8`.

With a large vocabulary, decoding one token reads more weights in the output layer than in all other
layers together, so that its bytes decide the speed.

Letters: T tokens, D model width, V words.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.experts import few_rows
from fairseq_evomoe.kernels.lookup.score import quantise
from fairseq_evomoe.modules.stored import StoredWeights

WIDENED = 4096
"""How many rows of the matrix are widened at once where the int8 kernel does not serve."""


class Int8OutputLayer(StoredWeights):
    """Logits x W^T with W stored as int8 and one scale per word.

    On CPUs a kernel reads the int8 values for few tokens; otherwise blocks of W are widened to the
    dtype of x.

    Args:
        weight: (V, D) float, which is rounded.

    Attributes:
        weight: (V, D) int8.
        row_scale: (V,) float32.
    """

    large = ("weight",)
    scales = ("row_scale",)
    weight: Tensor
    row_scale: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        small, scale = quantise(weight.detach())
        self.register_buffer("weight", small)
        self.register_buffer("row_scale", scale)
        self.use_large_pages()

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to logits (..., V) of the same dtype.

        Raises:
            ValueError: the model is in training mode.
        """
        if self.training:
            raise ValueError(
                "--output-storage int8 is for inference; train the checkpoint that evomoe-export "
                "made it from"
            )
        rows = x.reshape(-1, x.size(-1))
        if not few_rows.unsupported_int8(rows):
            logits = few_rows.int8_linear(rows, self.weight, self.row_scale)
        else:
            parts = zip(self.weight.split(WIDENED), self.row_scale.split(WIDENED), strict=True)
            logits = torch.cat([F.linear(rows, widened(w, s, x.dtype)) for w, s in parts], 1)
        return logits.view(*x.shape[:-1], -1)

    def extra_repr(self) -> str:
        words, width = self.weight.shape
        return f"width={width}, words={words}"


def widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The float matrix of int8 rows (V, D) with scales (V,)."""
    return (weight * scale[:, None]).to(dtype)


def int8_output_layer(projection: nn.Module) -> Int8OutputLayer:
    """Store a decoder's output layer in int8.

    Raises:
        ValueError: it is not one matrix without a bias.
    """
    if type(projection) is not nn.Linear or projection.bias is not None:
        raise ValueError(
            "--output-storage int8: the output layer must be one matrix without a bias, and not an "
            "adaptive softmax; leave the flag out"
        )
    return Int8OutputLayer(projection.weight)
