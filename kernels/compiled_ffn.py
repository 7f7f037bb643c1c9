"""`moe_ffn` as one opaque op, for torch.compile: inside, shapes follow a plan that no graph knows.

Letters: T tokens, D model width, F expert hidden width, E experts.

The compiled graph keeps the op's inputs alone; backward computes the hidden values again. Dropout
is drawn from a seed of the graph, so that both passes see the same units.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

Expert = tuple[Tensor, Tensor, Tensor, Tensor]


def name_of(activation: Callable[[Tensor], Tensor]) -> str:
    """A function as "module:name", which is how an op is told of it.

    Raises:
        ValueError: it is not found under that name: a lambda, or a function within another.
    """
    name = f"{activation.__module__}:{activation.__qualname__}"
    if "<" in name:
        raise ValueError(f"torch.compile needs an activation with a name of its own, not {name}")
    return name


def _function(name: str) -> Callable[[Tensor], Tensor]:
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


def _run(
    x: Tensor, expert: Expert, weights: Tensor, active: Tensor, seed: Tensor, name: str, drop: float
) -> Tensor:
    from fairseq_evomoe.kernels.grouped_ffn import moe_ffn

    with torch.random.fork_rng(devices=[], enabled=drop > 0):
        if drop > 0:
            torch.manual_seed(int(seed))
        return moe_ffn(
            x, *expert, weights=weights, active=active, activation=_function(name), dropout=drop
        )


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
    activation: str,
    dropout: float,
) -> Tensor:
    """y = sum over the active pairs of weight * FFN_e(x): (T, D); see `grouped_ffn.moe_ffn`.

    Args:
        seed: of the dropout, int64 scalar on the CPU.
        activation: as `name_of` says it.
    """
    with torch.no_grad():
        return _run(x, (w1, b1, w2, b2), weights, active, seed, activation, dropout)


@compiled_moe_ffn.register_fake
def _(x, w1, b1, w2, b2, weights, active, seed, activation, dropout):
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
    activation: str,
    dropout: float,
) -> list[Tensor]:
    """Gradients of x, w1, b1, w2, b2 and weights from that of y."""
    inputs = [t.detach().requires_grad_() for t in (x, w1, b1, w2, b2, weights)]
    own, (a, b, c, d), mix = inputs[0], inputs[1:5], inputs[5]
    # within an op torch records nothing, unless told so
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        y = _run(own, (a, b, c, d), mix, active, seed, activation, dropout)
        found = torch.autograd.grad(y, inputs, dy)
    # the graph was promised the inputs' own layout
    return [torch.empty_like(t).copy_(g) for t, g in zip(inputs, found, strict=True)]


@compiled_moe_ffn_backward.register_fake
def _(dy, x, w1, b1, w2, b2, weights, active, seed, activation, dropout):
    return [torch.empty_like(t) for t in (x, w1, b1, w2, b2, weights)]


def _save(ctx, inputs, output):
    *tensors, ctx.activation, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    found = compiled_moe_ffn_backward(dy, *ctx.saved_tensors, ctx.activation, ctx.dropout)
    return *found, None, None, None, None


compiled_moe_ffn.register_autograd(_backward, setup_context=_save)
