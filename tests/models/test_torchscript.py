"""What can be scripted, traced, compiled and exported, and what says that it cannot."""

import pytest
import torch
from conftest import FAMILIES, build, valid_batch
from layer_kit import D, layer
from torch import nn

from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.layer import MemoryFFN

DENSE = ("--moe-freq", 0)
MODELS = {
    "switch": ("--moe-gate", "switch"),
    "dts": (),
    "hash": ("--moe-gate", "hash"),
    "memory ffn": (*DENSE, "--memory-ffn", "--memory-bits", 4),
    "memory attention": (*DENSE, "--memory-attention", "--memory-bits", 4),
    "memory experts": ("--moe-expert-type", "memory", "--memory-bits", 4),
}


class Logits(nn.Module):
    """A model that returns its logits alone, as torch.jit.trace needs it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)[0]


def model_and_inputs(toy, *flags, family="translation"):
    """A model in evaluation, and the tensors of a batch in the order of its forward pass."""
    _, task, model = build(toy, *flags, family=family)
    batch = valid_batch(task)["net_input"]
    names = ("src_tokens", "src_lengths", "prev_output_tokens")
    inputs = [batch[n] for n in names if n in batch]
    return model.eval(), inputs[:1] if family != "translation" else inputs


def test_a_dense_translation_model_is_scripted(toy):
    """As fairseq's own model; the language models of both are not scriptable."""
    model, inputs = model_and_inputs(toy, *DENSE)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        assert torch.allclose(scripted(*inputs)[0], model(*inputs)[0], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_traced(toy, family):
    """The trace gives the logits of another batch as well."""
    model, inputs = model_and_inputs(toy, *DENSE, family=family)
    model = Logits(model).eval()
    with torch.no_grad():
        # fairseq counts its attention's calls, so two traces of one model have other names in them
        traced = torch.jit.trace(model, inputs, check_trace=False)
        others = [x[1:] for x in inputs]
        assert torch.allclose(traced(*others), model(*others), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MODELS)
def test_other_models_say_that_they_cannot(toy, name, family):
    """torch.jit refuses MoE and memory models in one sentence, before it reads any code."""
    model, inputs = model_and_inputs(toy, *MODELS[name], family=family)
    said = r"a model with \w+ layers has no TorchScript form; use torch.compile or torch.export"
    with pytest.raises(RuntimeError, match=rf"torch.jit.script: {said}"):
        torch.jit.script(model)
    with pytest.raises(RuntimeError, match=rf"torch.jit.trace: {said}"):
        torch.jit.trace(Logits(model).eval(), inputs)


@pytest.mark.parametrize("made", [lambda: MemoryFFN(D, MemoryConfig(memory_bits=4)), layer])
def test_single_layers(made):
    """A layer alone refuses torch.jit, and torch.export gives a program with equal results."""
    module, x = made().eval(), torch.randn(5, 2, D)
    for function in (torch.jit.script, lambda m: torch.jit.trace(m, x)):
        with pytest.raises(RuntimeError, match="has no TorchScript form"):
            function(module)
    with torch.no_grad():
        program = torch.export.export(module, (x,)).module()
        assert torch.equal(program(x), module(x))


def test_a_model_compiles_for_inference(toy):
    """torch.compile of a whole model gives its logits; fairseq's own code breaks the graph."""
    flags = ("--moe-gate", "switch", "--memory-attention", "--memory-bits", 4)
    model, inputs = model_and_inputs(toy, *flags, family="lm")
    model = Logits(model).eval()
    with torch.no_grad():
        want = model(*inputs)
        torch._dynamo.reset()
        assert torch.allclose(torch.compile(model, backend="eager")(*inputs), want, atol=1e-5)
