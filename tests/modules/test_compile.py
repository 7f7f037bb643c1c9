"""torch.compile(fullgraph=True) turns a whole MoE layer into one graph with the same results."""

import pytest
import torch
from conftest import DEVICE
from layer_kit import PLANS, B, D, L, layer
from torch.nn import functional as F

from fairseq_evomoe.criterions.routing_metrics import refuse_compiled
from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.experts import gpu
from fairseq_evomoe.kernels.experts.compiled import compiled_moe_ffn, name_of
from fairseq_evomoe.kernels.experts.moe_ffn import moe_ffn
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing
from fairseq_evomoe.modules.records import recording

pytestmark = pytest.mark.slow


# BASE solves its assignment on the host, which a graph cannot contain
GATES = {k: v for k, v in PLANS.items() if k != "base"}
GATES["diversify"] = {"moe_gate": "dts", "n": 0, "has_split": False}


def gradients(call, made, x):
    """Output of the layer and the gradients of x and of every parameter."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    (y * torch.arange(1.0, D + 1, device=DEVICE)).sum().backward()
    grads = [x.grad, *(p.grad for p in made.parameters())]
    return y.detach(), [None if g is None else g.clone() for g in grads]


@pytest.mark.parametrize("serving", ["torch", "triton"])
@pytest.mark.parametrize("name", GATES)
def test_one_graph_the_same_numbers(name, serving, triton_can, force):
    """In training, output and gradients equal the eager layer's, on torch's and the GPU's path."""
    force(backend.use(serving))
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
    """A compiled layer raises an error if a criterion needs its routing losses."""
    torch._dynamo.reset()
    made = layer(moe_gate="switch", schedule=None).to(DEVICE).train()
    x = torch.randn(L, B, D, device=DEVICE)
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    with recording() as log:
        compiled(x)
    with pytest.raises(RuntimeError, match="do not pass through a compiled MoE"):
        refuse_compiled(compiled, [made], log)
    with recording() as log:
        made(x)
    refuse_compiled(compiled, [made], log)


def test_inductor_compiles_it():
    """In evaluation, the default backend gives the same output as the eager layer."""
    torch._dynamo.reset()
    made = layer(moe_gate="switch", schedule=None).to(DEVICE).eval()
    x = torch.randn(L, B, D, device=DEVICE)
    with torch.no_grad():
        assert torch.allclose(torch.compile(made, fullgraph=True)(x), made(x), atol=1e-5)


def arguments(dropout=0.0, max_active=None):
    g = torch.Generator().manual_seed(2)
    t, d, f, e = 7, 4, 6, 3
    shapes = ((t, d), (e, f, d), (e, f), (e, d, f), (e, d))
    tensors = [torch.randn(s, generator=g).requires_grad_() for s in shapes]
    active = torch.rand(t, e, generator=g) < 0.6
    weights = (torch.rand(t, e, generator=g) * active).requires_grad_()
    name = "torch.nn.functional:relu"
    return [*tensors, weights, active, torch.tensor(5), max_active, name, dropout]


def test_the_op_keeps_its_promises():
    """The op passes torch.library.opcheck (schema, fake tensors, autograd)."""
    torch.library.opcheck(compiled_moe_ffn, arguments())


def test_a_compiled_layer_knows_the_bound(triton_can, force, monkeypatch):
    """The bound of active experts per token reaches the kernels, which spares a wait."""
    force(backend.use("triton"))
    torch._dynamo.reset()
    plan = {"dts_noise": "none", "dts_max_experts": 2, "dts_threshold": 1.05}
    made = layer(moe_gate="dts", n=8, has_split=True, **plan).to(DEVICE).eval()
    rooms, real = [], gpu.sparse_ffn
    spy = lambda *args, **kw: rooms.append(kw["max_pairs"]) or real(*args, **kw)
    monkeypatch.setattr(gpu, "sparse_ffn", spy)
    x = torch.randn(L, B, D, device=DEVICE)
    with torch.no_grad():
        torch.compile(made, fullgraph=True, backend="eager")(x)
        plan = made.gate(x.view(-1, D), made.phase)
    assert rooms == [2 * L * B] and plan.active.sum() < 2 * L * B, "the bound, not a count"


@pytest.mark.parametrize("activation", ["torch.nn.functional:relu", "torch.nn.functional:gelu"])
def test_every_gradient_of_the_op(activation):
    """Every gradient equals that of the function that the op wraps, also for transposed inputs."""
    args = arguments()
    args[5] = args[5].detach().t().contiguous().t().requires_grad_()
    args[9] = activation
    direction = torch.randn(args[0].shape)
    have = torch.autograd.grad((compiled_moe_ffn(*args) * direction).sum(), args[:6])
    function = getattr(F, activation.partition(":")[2])
    routing = Routing(args[5], args[6])
    y = moe_ffn(args[0], ExpertWeights(*args[1:5]), routing, activation=function)
    want = torch.autograd.grad((y * direction).sum(), args[:6])
    for a, b in zip(have, want, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_dropout_is_the_same_in_both_passes():
    """The gradient is that of the units that the forward pass kept, which the seed determines."""
    args = arguments(0.5)
    y = compiled_moe_ffn(*args)
    assert torch.equal(y, compiled_moe_ffn(*args))
    assert not torch.equal(y, compiled_moe_ffn(*args[:7], torch.tensor(6), *args[8:]))
    (dw2,) = torch.autograd.grad(y.sum(), args[3])
    with torch.random.fork_rng():
        torch.manual_seed(5)
        experts, routing = ExpertWeights(*args[1:5]), Routing(args[5], args[6])
        again = moe_ffn(args[0], experts, routing, activation=F.relu, dropout=0.5)
    assert torch.equal(y, again)
    assert torch.allclose(torch.autograd.grad(again.sum(), args[3])[0], dw2)


def test_an_activation_without_a_name_is_refused():
    """A lambda is refused, because an op receives its activation by name."""
    assert name_of(F.gelu).endswith("gelu")
    with pytest.raises(ValueError, match="with a name of its own"):
        name_of(lambda x: x)
