"""torch.compile(fullgraph=True) of a whole MoE layer: one graph, the same numbers."""

import pytest
import torch
from conftest import DEVICE
from test_gpu_path import GATES as PATHS
from test_moe_layer import B, D, L, layer
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.compiled_ffn import compiled_moe_ffn, name_of
from fairseq_evomoe.kernels.grouped_ffn import moe_ffn
from fairseq_evomoe.modules.records import recording

# BASE solves its assignment on the host, which no graph can hold
GATES = {k: v for k, v in PATHS.items() if k != "base"}
GATES["diversify"] = dict(moe_gate="dts", n=0, spawned=False)


def gradients(call, made, x):
    """Output and every gradient, of x and of the parameters, routing losses included."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    (y * torch.arange(1.0, D + 1, device=DEVICE)).sum().backward()
    grads = [x.grad, *(p.grad for p in made.parameters())]
    return y.detach(), [None if g is None else g.clone() for g in grads]


@pytest.mark.parametrize("serving", ["torch", "triton"])
@pytest.mark.parametrize("name", GATES)
def test_one_graph_the_same_numbers(name, serving, triton_can, monkeypatch):
    """In training: output and every gradient, by torch's path and by that of GPUs."""
    monkeypatch.setattr(backend, "forced", serving)
    torch._dynamo.reset()
    made = layer(**GATES[name]).to(DEVICE).train()
    x = torch.randn(L, B, D, device=DEVICE)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    want, grads = gradients(made, made, x)
    have, own = gradients(compiled, made, x)
    assert torch.allclose(have, want, atol=1e-5)
    for a, b in zip(grads, own, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-4))


def test_routing_losses_are_not_lost_in_silence():
    """Where a criterion asks a compiled layer for its losses, there is an error."""
    torch._dynamo.reset()
    made = layer(moe_gate="switch", schedule=None).to(DEVICE).train()
    with recording(made), pytest.raises(Exception, match="do not pass through a compiled MoE"):
        torch.compile(made, fullgraph=True, backend="eager")(torch.randn(L, B, D, device=DEVICE))


def test_inductor_compiles_it():
    """The default backend, in evaluation."""
    torch._dynamo.reset()
    made = layer(moe_gate="switch", schedule=None).to(DEVICE).eval()
    x = torch.randn(L, B, D, device=DEVICE)
    with torch.no_grad():
        assert torch.allclose(torch.compile(made, fullgraph=True)(x), made(x), atol=1e-5)


def arguments(dropout=0.0):
    g = torch.Generator().manual_seed(2)
    t, d, f, e = 7, 4, 6, 3
    shapes = ((t, d), (e, f, d), (e, f), (e, d, f), (e, d))
    tensors = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    active = torch.rand(t, e, generator=g) < 0.6
    weights = (torch.rand(t, e, generator=g) * active).requires_grad_()
    return [*tensors, weights, active, torch.tensor(5), "torch.nn.functional:relu", dropout]


def test_the_op_keeps_its_promises():
    """torch's own checks: schema, fake tensors, autograd."""
    torch.library.opcheck(compiled_moe_ffn, arguments())


@pytest.mark.parametrize("activation", ["torch.nn.functional:relu", "torch.nn.functional:gelu"])
def test_every_gradient_of_the_op(activation):
    """As of the function that it wraps, transposed inputs too."""
    args = arguments()
    args[5] = args[5].detach().t().contiguous().t().requires_grad_()
    args[8] = activation
    direction = torch.randn(args[0].shape)
    have = torch.autograd.grad((compiled_moe_ffn(*args) * direction).sum(), args[:6])
    function = getattr(F, activation.partition(":")[2])
    y = moe_ffn(*args[:5], weights=args[5], active=args[6], activation=function)
    want = torch.autograd.grad((y * direction).sum(), args[:6])
    for a, b in zip(have, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_dropout_is_the_same_in_both_passes():
    """The gradient is that of the units which the forward pass kept; the seed decides them."""
    args = arguments(0.5)
    y = compiled_moe_ffn(*args)
    assert torch.equal(y, compiled_moe_ffn(*args))
    assert not torch.equal(y, compiled_moe_ffn(*args[:7], torch.tensor(6), *args[8:]))
    (dw2,) = torch.autograd.grad(y.sum(), args[3])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        again = moe_ffn(*args[:5], weights=args[5], active=args[6], activation=F.relu, dropout=0.5)
    assert torch.equal(y, again)
    assert torch.allclose(torch.autograd.grad(again.sum(), args[3])[0], dw2)


def test_an_activation_without_a_name_is_refused():
    """A lambda cannot be told to an op."""
    assert name_of(F.gelu).endswith("gelu")
    with pytest.raises(ValueError, match="with a name of its own"):
        name_of(lambda x: x)
