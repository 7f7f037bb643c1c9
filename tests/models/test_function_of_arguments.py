"""A model is a function of its arguments: no call leaves anything behind that another one reads."""

import threading

import pytest
import torch
from conftest import build, valid_batch
from torch import nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig, RoutingLosses
from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.models.ffn import DenseFFN, build_moe_layer
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.records import recording

QUIET = ("--moe-gate", "switch", "--moe-freq", 1, "--dropout", 0, "--attention-dropout", 0)
IDS = (
    torch.tensor([[1, 1, 9, 8, 2], [7, 6, 5, 4, 2]]),
    torch.tensor([[1, 9, 2], [7, 6, 2], [5, 4, 2]]),
)
LOSSES = RoutingLosses(RoutingLossConfig(moe_gate_loss_wt=0.5))


def in_threads(function, arguments):
    """The results of calls in threads that run at the same time; an error appears as itself."""
    found = [None] * len(arguments)

    def work(i):
        try:
            found[i] = function(arguments[i])
        except Exception as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def switch_layer():
    return build_moe_layer(
        MoEConfig(moe_freq=1, moe_gate="switch", moe_expert_count=4),
        None,
        "encoder.0",
        dense=DenseFFN(fc1=nn.Linear(8, 16), fc2=nn.Linear(16, 8), activation=torch.relu),
    ).train()


def loss_of(layer, x, *, size):
    """The layer's output squared, plus its routing losses as a criterion adds them."""
    with recording() as log:
        task_loss = layer(x).square().sum()
    return LOSSES.add(task_loss, log, [layer], sample_size=size, training=True)[0]


def gradient(layer, loss, **kwargs):
    """The gradient of the gate's weight after a whole backward pass."""
    layer.zero_grad()
    loss.backward(**kwargs)
    return layer.gate.weight.grad.clone()


def test_threads_share_an_moe_model(toy):
    """Two threads translate different batches with one model, each past the other's layers."""
    _, _, model = build(toy, *QUIET)
    model.eval()

    def encode(ids):
        with torch.no_grad():
            return model.encoder(ids, ids.ne(1).sum(1))["encoder_out"][0]

    alone = [encode(ids) for ids in IDS]
    both_started = threading.Barrier(2, timeout=20)
    first, *_ = model.encoder.layers
    first.register_forward_pre_hook(lambda *_: (both_started.wait(), None)[1])
    found = in_threads(encode, IDS)
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True)), found


def test_threads_share_a_memory_attention():
    """Keys and values belong to the call that projected the queries, not to the layer."""
    attention = MemoryAttention(16, 2, cfg=MemoryConfig(memory_bits=4), self_attention=True).eval()
    inputs = [torch.randn(5, 1, 16), torch.randn(5, 1, 16)]

    def attend(x):
        with torch.no_grad():
            return attention(x, x, x, need_weights=False)[0]

    alone = [attend(x) for x in inputs]
    both_projected = threading.Barrier(2, timeout=20)
    project_keys = attention.k_proj

    def wait_then_project(key):
        both_projected.wait()
        return project_keys(key)

    attention.k_proj = wait_then_project
    found = in_threads(attend, inputs)
    assert all(torch.equal(*pair) for pair in zip(found, alone, strict=True)), found


def test_a_layer_alone_knows_no_earlier_batch(toy):
    """A layer that is called by itself treats every row as a real token."""
    _, task, model = build(toy, *QUIET)
    model.eval()
    (_, layer), *_ = moe_layers(model)
    x = torch.randn(6, 2, 32)
    with torch.no_grad():
        before = layer(x)
        model(**valid_batch(task)["net_input"])
        assert torch.equal(layer(x), before)


@pytest.mark.parametrize("memory", [(), ("--memory-attention", "--memory-bits", 4)], ids=str)
def test_two_forward_passes_before_one_backward(toy, memory):
    """Recomputation reads its own forward pass's batch, also after a pass without gradients."""
    found = []
    for flags in ((), ("--checkpoint-activations",)):
        _, _, model = build(toy, *QUIET, *memory, *flags)
        model.train()
        loss = 0
        for ids in IDS:
            # sources are padded on the left, targets on the right
            logits, _ = model(ids, ids.ne(1).sum(1), ids.flip(1))
            loss = loss + logits.log_softmax(-1)[..., 5].sum()
        with torch.no_grad():
            model(IDS[0][:1], torch.tensor([3]), IDS[0][:1].flip(1))
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append(torch.cat(grads))
    want, got = found
    assert (got - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("flags", [(), ("--checkpoint-activations",)], ids=str)
def test_routing_losses_reach_the_gates_of_a_model(toy, flags):
    """Through fairseq's layers, a gate's gradient is the task's plus weight times its losses'."""
    found = {}
    for weight in (0, 1, 3):
        cfg, task, model = build(toy, *QUIET, *flags, "--moe-gate-loss-wt", weight)
        loss, _, _ = task.build_criterion(cfg.criterion)(model.train(), valid_batch(task))
        loss.backward()
        found[weight] = [layer.gate.weight.grad.double() for _, layer in moe_layers(model)]
    for task_alone, once, thrice in zip(*found.values(), strict=True):
        share = once - task_alone
        assert share.norm() > 1e-3 * task_alone.norm()
        assert torch.allclose(thrice - task_alone, 3 * share, rtol=1e-3, atol=1e-4 * share.norm())


def test_two_criterion_calls_before_one_backward():
    """Each call's routing losses keep the weight of that call's sample size."""
    layer, (x, y) = switch_layer(), torch.randn(2, 7, 2, 8)
    want = gradient(layer, loss_of(layer, x, size=50)) + gradient(layer, loss_of(layer, y, size=5))
    got = gradient(layer, loss_of(layer, x, size=50) + loss_of(layer, y, size=5))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_that_are_asked_for_one_by_one():
    """torch.autograd.grad and backward(inputs=...) include the routing losses."""
    layer, x = switch_layer(), torch.randn(7, 2, 8)
    want = gradient(layer, loss_of(layer, x, size=50))
    without = gradient(layer, layer(x).square().sum())
    assert not torch.allclose(want, without, rtol=1e-3)
    (got,) = torch.autograd.grad(loss_of(layer, x, size=50), [layer.gate.weight])
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    got = gradient(layer, loss_of(layer, x, size=50), inputs=[layer.gate.weight])
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def test_two_backward_passes_over_one_graph():
    """With retain_graph, a routing loss counts as often as the loss it was added to."""
    layer, x = switch_layer(), torch.randn(7, 2, 8)
    want = gradient(layer, loss_of(layer, x, size=50))
    layer.zero_grad()
    whole = loss_of(layer, x, size=50)
    (0.5 * whole).backward(retain_graph=True)
    (0.5 * whole).backward()
    assert torch.allclose(layer.gate.weight.grad, want, rtol=1e-5, atol=1e-6)


def test_a_record_belongs_to_the_call_that_recorded_it():
    """Logs of two threads do not mix, and an inner log also reaches the outer one."""
    layer = switch_layer()
    together = threading.Barrier(2, timeout=20)

    def count(tokens):
        with recording() as log:
            together.wait()
            layer(torch.randn(tokens, 1, 8))
            together.wait()
        return [record.tokens.item() for record in log.records]

    assert in_threads(count, [3, 5]) == [[3], [5]]
    with recording() as outer:
        with recording() as inner:
            layer(torch.randn(4, 1, 8))
        with recording(isolated=True):
            layer(torch.randn(4, 1, 8))
    assert outer.records == inner.records and len(inner.records) == 1
