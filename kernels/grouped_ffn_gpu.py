"""Feed-forward networks of experts on GPUs: Triton's dispatch, and one of two matrix products.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.

torch's grouped product has a kernel for bfloat16 on compute capabilities 9 and 10; for anything
else it copies the experts' loads to the host and multiplies one after another. There our own
products serve, which gather tokens and work out activations themselves (`fused_ffn_triton`).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
product = ""
"""`grouped_mm` or `fused` for tests and benchmarks; "": by `choose_product`."""


def why_not(x: Tensor, w1: Tensor, activation: Callable[[Tensor], Tensor], dropout: float) -> str:
    """What keeps this path from serving a call; "" where nothing does."""
    why = backend.without_triton(x.device.type)
    if why:
        return why
    if x.dtype not in DTYPES:
        return f"it has no {x.dtype}"
    grouped, fused = unfit(x, w1, activation, dropout).values()
    return f"{grouped}; its other product {fused}" if grouped and fused else ""


def unfit(
    x: Tensor, w1: Tensor, activation: Callable[[Tensor], Tensor], dropout: float
) -> dict[str, str]:
    """Product -> what keeps it from serving; "" where nothing does."""
    from fairseq_evomoe.kernels.fused_ffn_triton import kind

    lanes = 16 // x.element_size()
    grouped = fused = ""
    if not hasattr(F, "grouped_mm"):
        grouped = "it needs torch 2.10 for its grouped matrix product"
    elif any(n % lanes for n in w1.shape[1:]):
        grouped = f"widths {tuple(w1.shape[1:])} are not multiples of {lanes}"
    if dropout > 0:
        fused = "has no dropout"
    elif kind(activation) is None:
        fused = "has ReLU and GELU alone"
    return {"grouped_mm": grouped, "fused": fused}


def choose_product(
    x: Tensor, w1: Tensor, activation: Callable[[Tensor], Tensor], dropout: float
) -> str:
    """The product that is told, or that suits device, dtype and activation.

    Raises:
        ValueError: the one that is told cannot serve.
    """
    why = unfit(x, w1, activation, dropout)
    if product:
        if why[product]:
            raise ValueError(f"product {product!r}: {why[product]}")
        return product
    if why["fused"] or why["grouped_mm"]:
        return "grouped_mm" if why["fused"] else "fused"
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    quick = major in (9, 10) and len(w1) < 1024
    # in float32 there are no tensor cores to win: a wait for the host costs less
    suits = x.dtype == torch.float32 or (quick and x.dtype == torch.bfloat16)
    return "grouped_mm" if suits else "fused"


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
        pairs: A or more: rows to make room for. A limit that is known beforehand spares the device
            a wait for the host; what lies beyond the last expert's rows reaches no result.
        activation, dropout: as there.
    """
    from fairseq_evomoe.kernels.dispatch_triton import add_bias, combine, dispatch
    from fairseq_evomoe.kernels.fused_ffn_triton import fused_ffn, kind
    from fairseq_evomoe.kernels.routing_triton import sort_pairs

    found = sort_pairs(active, pairs)
    number = kind(activation)
    if choose_product(x, w1, activation, dropout) == "fused" and number is not None:
        return fused_ffn(x, w1, b1, w2, b2, weight=weight, pairs=found, activation=number)
    ends = found.ends
    h = F.grouped_mm(dispatch(x, found.place, pairs), w1.transpose(1, 2), offs=ends)
    h = activation(add_bias(h, b1, found.expert, ends))
    h = F.dropout(h, dropout, training=dropout > 0)
    out = F.grouped_mm(h, w2.transpose(1, 2), offs=ends)
    # the second bias needs no row of its own: it is weighed and added token by token
    return combine(out, weight, found.place) + weight.to(b2.dtype) @ b2
