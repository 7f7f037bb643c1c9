"""Feed-forward networks of experts on GPUs: Triton's dispatch and one of two matrix products.

Letters: T tokens, D model width, F expert hidden width, E experts, A active (token, expert) pairs.

torch's grouped product has a kernel for bfloat16 on compute capabilities 9 and 10; for anything
else it copies the experts' loads to the host and multiplies one expert after another. In those
cases our own products serve (`products_triton`), which gather tokens and compute activations
themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend, self_check
from fairseq_evomoe.kernels.experts import eager
from fairseq_evomoe.kernels.experts.pairs import sparse_pairs
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing

Activation = Callable[[Tensor], Tensor]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PRODUCTS = ("grouped_mm", "fused")

_FORCED_PRODUCT: ContextVar[str] = ContextVar("forced_product", default="")


@contextmanager
def use_product(name: str) -> Iterator[None]:
    """Force one of `PRODUCTS` within a `with` block, for tests and benchmarks.

    Raises:
        ValueError: there is no product of that name.
    """
    if name not in PRODUCTS:
        raise ValueError(f"product {name!r}: choose one of {', '.join(PRODUCTS)}")
    token = _FORCED_PRODUCT.set(name)
    try:
        yield
    finally:
        _FORCED_PRODUCT.reset(token)


def unsupported(x: Tensor, experts: ExpertWeights, activation: Activation, dropout: float) -> str:
    """Why this path cannot serve a call; "" if it can."""
    reason = backend.triton_unsupported(x.device.type)
    if reason:
        return reason
    if x.dtype not in DTYPES:
        return f"it has no {x.dtype}"
    grouped, fused = unsupported_products(x, experts, activation, dropout).values()
    return f"{grouped}; its other product {fused}" if grouped and fused else ""


def unsupported_products(
    x: Tensor, experts: ExpertWeights, activation: Activation, dropout: float
) -> dict[str, str]:
    """Name of each product -> why it cannot serve a call, or "".

    The first call with a dtype checks the kernels of each product.
    """
    from fairseq_evomoe.kernels.experts.products_triton import activation_id

    lanes = 16 // x.element_size()
    widths = tuple(experts.w1.shape[1:])
    grouped = fused = ""
    if not hasattr(F, "grouped_mm"):
        grouped = "it needs torch 2.10 for its grouped matrix product"
    elif any(n % lanes for n in widths):
        grouped = f"widths {widths} are not multiples of {lanes}"
    if dropout > 0:
        fused = "has no dropout"
    elif activation_id(activation) is None:
        fused = "has ReLU and GELU alone"
    return {
        "grouped_mm": grouped or self_check.failure("experts, grouped_mm", x, _check_grouped),
        "fused": fused or self_check.failure("experts, fused", x, _check_fused),
    }


def _check_grouped(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return _check("grouped_mm", 16, 24, device, dtype)


def _check_fused(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return _check("fused", 13, 21, device, dtype)


def _check(
    product: str, width: int, hidden: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """A product on 37 tokens and 5 experts, of which two have no token, beside torch's path."""
    experts, tokens = 5, 37
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    leaves = [self_check.draw(1, device, dtype, tokens, width)]
    leaves += [self_check.draw(2 + i, device, dtype, experts, *s) for i, s in enumerate(shapes)]
    leaves.append(self_check.draw(7, device, torch.float32, tokens, experts))
    at = torch.arange(tokens, device=device)
    active = torch.zeros(tokens, experts, dtype=torch.bool, device=device)
    active[at, 1 + at % 2 * 3] = True
    active[::3, 2] = True

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        routing = Routing(weights[4] * active, active, 2)
        return sparse_product(
            *(product, x, ExpertWeights(*weights[:4]), routing), max_pairs=2 * tokens,
            activation=F.relu,
        )  # fmt: skip

    have = self_check.with_gradients(run(*leaves), leaves)
    exact = [p.detach().float().requires_grad_() for p in leaves]
    routing = Routing(exact[5] * active, active, 2)
    weights = ExpertWeights(*exact[1:5])
    y = eager.grouped_ffn(exact[0], weights, sparse_pairs(routing), activation=F.relu)
    return have, self_check.with_gradients(y, exact)


def choose_product(
    x: Tensor, experts: ExpertWeights, activation: Activation, dropout: float
) -> str:
    """The product that is forced, or the one that suits device, dtype and activation.

    Raises:
        ValueError: the forced product cannot serve the call.
    """
    reasons = unsupported_products(x, experts, activation, dropout)
    forced = _FORCED_PRODUCT.get()
    if forced:
        if reasons[forced]:
            raise ValueError(f"product {forced!r}: {reasons[forced]}")
        return forced
    if reasons["fused"] or reasons["grouped_mm"]:
        return "grouped_mm" if reasons["fused"] else "fused"
    major = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0
    has_kernel = major in (9, 10) and len(experts.w1) < 1024
    # In float32 there are no tensor cores to gain, and a wait for the host costs less.
    grouped = x.dtype == torch.float32 or (has_kernel and x.dtype == torch.bfloat16)
    return "grouped_mm" if grouped else "fused"


def sparse_ffn(
    x: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    *,
    max_pairs: int,
    activation: Activation,
    dropout: float = 0.0,
) -> Tensor:
    """y_t = sum over the active pairs (t, e) of weight * FFN_e(x_t), (T, D).

    Args:
        x: (T, D), of the experts' dtype.
        routing: combine weights and active pairs, (T, E).
        max_pairs: number of rows to make room for, A or more. A bound that is known beforehand
            spares the device a wait for the host. Rows beyond the last expert's reach no result.
        activation, dropout: as for `moe_ffn.moe_ffn`.
    """
    product = choose_product(x, experts, activation, dropout)
    return sparse_product(
        product, x, experts, routing, max_pairs=max_pairs, activation=activation, dropout=dropout
    )


def sparse_product(
    product: str,
    x: Tensor,
    experts: ExpertWeights,
    routing: Routing,
    *,
    max_pairs: int,
    activation: Activation,
    dropout: float = 0.0,
) -> Tensor:
    """`sparse_ffn` by one of `PRODUCTS`."""
    from fairseq_evomoe.kernels.experts.dispatch_triton import add_bias, combine, dispatch
    from fairseq_evomoe.kernels.experts.pairs_triton import sort_pairs
    from fairseq_evomoe.kernels.experts.products_triton import activation_id, fused_ffn

    pairs = sort_pairs(routing.active, max_pairs)
    number = activation_id(activation)
    if product == "fused" and number is not None:
        return fused_ffn(x, experts, routing.weights, pairs, activation=number)
    w1, b1, w2, b2 = experts
    h = F.grouped_mm(dispatch(x, pairs.place, max_pairs), w1.transpose(1, 2), offs=pairs.ends)
    h = activation(add_bias(h, b1, pairs.expert, pairs.ends))
    h = F.dropout(h, dropout, training=dropout > 0)
    out = F.grouped_mm(h, w2.transpose(1, 2), offs=pairs.ends)
    # The second bias needs no row of its own: it is weighed and added token by token.
    return combine(out, routing.weights, pairs.place) + routing.weights.to(b2.dtype) @ b2
