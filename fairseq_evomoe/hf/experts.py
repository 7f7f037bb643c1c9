"""The experts of transformers' own MoE models, computed by this package's kernels on CPUs.

    import fairseq_evomoe.hf
    model = AutoModelForCausalLM.from_pretrained(NAME, experts_implementation="evomoe")

A model whose experts the kernel cannot compute goes on with transformers' `grouped_mm`, and one
line in the log says why.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe
from transformers.utils import logging

from fairseq_evomoe.kernels.experts.gated import GatedWeights, gated_ffn
from fairseq_evomoe.kernels.experts.values import Pairs

logger = logging.get_logger(__name__)
NAME = "evomoe"


def unsupported(experts: nn.Module, x: Tensor) -> str:
    """Why the kernel cannot compute the experts of a model on states x, or "" if it can."""
    if x.device.type != "cpu":
        return f"the kernel runs on CPUs, and the states are on {x.device.type}"
    if torch.compiler.is_compiling():
        return "torch.compile cannot look into the kernel"
    if not experts.has_gate:
        return "its experts have no gate"
    if experts.is_transposed or not experts.is_concatenated:
        return "its experts' weights have another layout"
    if getattr(type(experts), "_apply_gate", None) is not moe._default_apply_gate:
        return "its gate is not act(gate) * up"
    if experts.has_post_expert_norm:
        return "its experts end in a normalisation"
    if experts._is_expert_parallel:
        return "its experts are spread over processes"
    if x.dtype != experts.gate_up_proj.dtype or torch.is_autocast_enabled("cpu"):
        return "states and weights have different dtypes"
    return ""


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute the chosen experts of each token, with the interface of transformers.

    Args:
        self: the model's module of experts.
        hidden_states: (T, D).
        top_k_index: experts of each token, (T, k) int64.
        top_k_weights: their weights, (T, k).

    Returns:
        (T, D), dtype of the states.
    """
    reason = unsupported(self, hidden_states)
    if reason:
        logger.warning_once(f"experts_implementation {NAME}: {reason}; grouped_mm takes over")
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=self.num_experts).tolist()
    pairs = Pairs(
        top_k_weights.reshape(-1).index_select(0, order), order // top_k_index.size(1), counts
    )
    biases = (self.gate_up_proj_bias, self.down_proj_bias) if self.has_bias else (None, None)
    weights = GatedWeights(self.gate_up_proj, biases[0], self.down_proj, biases[1])
    return gated_ffn(hidden_states, weights, pairs, activation=self.act_fn)


def register() -> None:
    """Make `experts_implementation="evomoe"` known to transformers."""
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
