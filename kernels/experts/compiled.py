"""`moe_ffn` as one opaque op for torch.compile.

A graph cannot hold shapes that follow a routing, so all of them stay inside the op.

Letters: T tokens, D model width, F expert hidden width, E experts.

The compiled graph keeps the op's inputs alone, and the backward pass computes the hidden values
again. Dropout is drawn from a seed of the graph, so that both passes drop the same units.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.kernels.experts.serve import run_experts
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing


def name_of(activation: Callable[[Tensor], Tensor]) -> str:
    """A function's name as "module:name", which is how an op can be handed a function.

    Raises:
        ValueError: the function cannot be found by its name: a lambda, or one defined in another.
    """
    name = f"{activation.__module__}:{activation.__qualname__}"
    if "<" in name:
        raise ValueError(f"torch.compile needs an activation with a name of its own, not {name}")
    return name


def _function(name: str) -> Callable[[Tensor], Tensor]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _run(
    x: Tensor, experts: ExpertWeights, routing: Routing, seed: Tensor, name: str, dropout: float
) -> Tensor:
    with torch.random.fork_rng(devices=[], enabled=dropout > 0):
        if dropout > 0:
            torch.manual_seed(int(seed))
        return run_experts(x, experts, routing, activation=_function(name), dropout=dropout)


# torch reads an op's schema from its signature, so the tensors are spelled out here.


@torch.library.custom_op("evomoe::moe_ffn", mutates_args=())
def compiled_moe_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    weights: Tensor,
    active: Tensor,
    seed: Tensor,
    max_active: int | None,
    activation: str,
    dropout: float,
) -> Tensor:
    """y = sum over the active pairs of weight * FFN_e(x), (T, D); see `moe_ffn.moe_ffn`.

    Args:
        seed: seed of the dropout, int64 scalar on the CPU.
        activation: a name as `name_of` gives it.
    """
    experts, routing = ExpertWeights(w1, b1, w2, b2), Routing(weights, active, max_active)
    with torch.no_grad():
        return _run(x, experts, routing, seed, activation, dropout)


@compiled_moe_ffn.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("evomoe::moe_ffn_backward", mutates_args=())
def compiled_moe_ffn_backward(
    dy: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    weights: Tensor,
    active: Tensor,
    seed: Tensor,
    max_active: int | None,
    activation: str,
    dropout: float,
) -> list[Tensor]:
    """Gradients of x, w1, b1, w2, b2 and weights from that of y."""
    inputs = [t.detach().requires_grad_() for t in (x, w1, b1, w2, b2, weights)]
    states, experts = inputs[0], ExpertWeights(*inputs[1:5])
    routing = Routing(inputs[5], active, max_active)
    # Within an op torch records no graph unless this key is included again.
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        y = _run(states, experts, routing, seed, activation, dropout)
        gradients = torch.autograd.grad(y, inputs, dy)
    # The graph was promised gradients in the inputs' own layout.
    return [torch.empty_like(t).copy_(g) for t, g in zip(inputs, gradients, strict=True)]


@compiled_moe_ffn_backward.register_fake
def _(
    dy: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, weights: Tensor, *o: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, w1, b1, w2, b2, weights)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.max_active, ctx.activation, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gradients = compiled_moe_ffn_backward(
        dy, *ctx.saved_tensors, ctx.max_active, ctx.activation, ctx.dropout
    )
    return *gradients, None, None, None, None, None


compiled_moe_ffn.register_autograd(_backward, setup_context=_save)
