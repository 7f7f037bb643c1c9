"""Feed-forward networks of experts on GPUs: Triton dispatch around torch's grouped matrix products.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def why_not(x: Tensor, w1: Tensor) -> str:
    """What keeps this path from serving a call; "" where nothing does."""
    why = backend.without_triton(x.device.type)
    if why:
        return why
    if x.dtype not in DTYPES:
        return f"it has no {x.dtype}"
    if not hasattr(F, "grouped_mm"):
        return "it needs torch 2.10 for its grouped matrix product"
    lanes = 16 // x.element_size()
    if any(n % lanes for n in w1.shape[1:]):
        return f"widths {tuple(w1.shape[1:])} are not multiples of {lanes}"
    return ""


def sparse_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    weight: Tensor,
    active: Tensor,
    pairs: int,
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the pairs (t, e) of weight * FFN_e(x_t); see `grouped_ffn.grouped_ffn`.

    Args:
        x: (T, D). w1: (E, F, D). b1: (E, F). w2: (E, D, F). b2: (E, D), of one dtype.
        weight: (T, E), 0 where inactive. active: (T, E) bool.
        pairs: A, exactly; known beforehand, it spares the device a wait for the host.
        activation, dropout: as there.
    """
    from fairseq_evomoe.kernels.dispatch_triton import (
        add_bias,
        combine,
        dispatch,
        expert_of_rows,
        places,
    )

    place, ends = places(active)
    rows, expert = dispatch(x, place, pairs), expert_of_rows(ends, pairs)
    h = F.grouped_mm(rows, w1.transpose(1, 2), offs=ends)
    h = activation(add_bias(h, b1, expert, ends))
    h = F.dropout(h, dropout, training=dropout > 0)
    out = F.grouped_mm(h, w2.transpose(1, 2), offs=ends)
    # the second bias needs no row of its own: it is weighed and added token by token
    return combine(out, weight, place) + weight.to(b2.dtype) @ b2
