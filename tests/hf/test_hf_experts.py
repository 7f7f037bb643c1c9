"""`experts_implementation="evomoe"`: transformers' own MoE models on this package's kernels."""

import fairseq_evomoe.hf  # noqa: F401  # before transformers; see there

# isort: split

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fairseq_evomoe.hf import experts

SIZES = {
    **{"vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16},
    **{"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **SIZES, intermediate_size=24, moe_intermediate_size=12, num_experts=6
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES,
        intermediate_size=24,
        moe_intermediate_size=12,
        num_experts=6,
        num_experts_per_tok=3,
        head_dim=8,
    ),
    "olmoe": lambda: OlmoeConfig(**SIZES, intermediate_size=12, num_experts=9),
}


def run(model, name, ids):
    """Logits and all gradients with an implementation of experts."""
    model.set_experts_implementation(name)
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_the_eager_experts(name, monkeypatch):
    """And the kernel computed them."""
    calls = []
    kernel = experts.gated_ffn
    monkeypatch.setattr(experts, "gated_ffn", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    ids = torch.randint(3, 50, (2, 7))
    want, gradients = run(model, "eager", ids)
    assert not calls
    have, found = run(model, "evomoe", ids)
    assert len(calls) == 2
    torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)
    for key, grad in gradients.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6)


def test_it_is_chosen_when_a_model_is_loaded(tmp_path):
    """By the argument of from_pretrained, and generation runs."""
    AutoModelForCausalLM.from_config(CONFIGS["mixtral"]()).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="evomoe")
    assert model.config._experts_implementation == "evomoe"
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4).size(1) > 3


def test_what_the_kernel_cannot_compute_is_left_to_transformers(monkeypatch):
    """gpt-oss has another gate and layout; the log says so, and the values are right."""
    config = GptOssConfig(**SIZES, head_dim=8, intermediate_size=16, num_local_experts=4)
    model = AutoModelForCausalLM.from_config(config)
    layer = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    assert "layout" in experts.unsupported(layer, torch.randn(3, 16))
    warned = []
    monkeypatch.setattr(experts.logger, "warning_once", warned.append)
    ids = torch.randint(3, 50, (2, 7))
    want, _ = run(model, "eager", ids)
    torch.testing.assert_close(run(model, "evomoe", ids)[0], want, rtol=1e-4, atol=1e-5)
    assert "grouped_mm takes over" in warned[0]


def test_other_dtypes_are_left_to_transformers():
    """States and weights of two dtypes, as under autocast."""
    model = AutoModelForCausalLM.from_config(CONFIGS["olmoe"]())
    layer = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    assert experts.unsupported(layer, torch.randn(3, 16)) == ""
    assert "dtypes" in experts.unsupported(layer, torch.randn(3, 16).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert "dtypes" in experts.unsupported(layer, torch.randn(3, 16))
