"""Experts of transformers' own MoE models: our implementation over transformers' ones, on a CPU.

    python -m benchmarks.speed.hf_experts --csv benchmarks/results/hf_experts.csv

The models are tiny and have random weights: one layer of Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE
each, of width 512. `experts_implementation` is switched between `evomoe` and transformers' `eager`,
`grouped_mm` and (up to 16 tokens) `batched_mm`. Values are compared in the same run, and for
training also all gradients.
"""

import argparse
import functools
import itertools
import logging
from pathlib import Path
from typing import Any

import fairseq_evomoe.hf  # noqa: F401  # before transformers; see there

# isort: split

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from benchmarks.speed.timing import append, interleave, machine, milliseconds, ratios

FIELDS = (
    "model experts top_k tokens mode other ratio_p50 ratio_p20 ratio_p80 ms dtype threads device "
    "torch date"
).split()
SIZES = {
    **{"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8, "hidden_size": 512},
    **{"num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
MODELS = {
    "Mixtral": lambda: MixtralConfig(
        **SIZES, intermediate_size=1024, num_local_experts=8, num_experts_per_tok=2
    ),
    "Qwen2-MoE": lambda: Qwen2MoeConfig(
        **SIZES,
        intermediate_size=512,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
        num_experts=16,
        num_experts_per_tok=4,
    ),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(
        **SIZES,
        intermediate_size=512,
        moe_intermediate_size=384,
        num_experts=32,
        num_experts_per_tok=8,
        head_dim=64,
    ),
    "OLMoE": lambda: OlmoeConfig(
        **SIZES, intermediate_size=512, num_experts=16, num_experts_per_tok=4
    ),
}
OURS = "evomoe"


class Case:
    """The experts of one model on one batch."""

    def __init__(self, name: str, tokens: int) -> None:
        torch.manual_seed(1)
        self.model = AutoModelForCausalLM.from_config(MODELS[name]())
        self.experts: Any = next(m for m in self.model.modules() if hasattr(m, "gate_up_proj"))
        self.top_k = self.model.config.num_experts_per_tok
        self.x = torch.randn(tokens, SIZES["hidden_size"])
        scores = torch.randn(tokens, self.experts.num_experts).softmax(-1)
        self.weights, self.index = scores.topk(self.top_k)

    def run(self, name: str, train: bool) -> list[Any]:
        """Run once with an implementation; the output and, for training, all gradients."""
        self.model.set_experts_implementation(name)
        if not train:
            with torch.no_grad():
                return [self.experts(self.x, self.index, self.weights)]
        leaves = [self.x.detach().requires_grad_(), *self.experts.parameters()]
        y = self.experts(leaves[0], self.index, self.weights)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]


def measure(name: str, tokens: int, train: bool, rounds: int) -> list[dict[str, Any]]:
    """The rows of one case: our time over that of each other implementation."""
    case = Case(name, tokens)
    for one, other in zip(case.run(OURS, train), case.run("eager", train), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    others = ["grouped_mm", "eager", *(["batched_mm"] if tokens <= 16 else [])]
    functions = {n: functools.partial(case.run, n, train) for n in (OURS, *others)}
    times = interleave(functions, rounds)
    return [
        {
            **{"model": name, "experts": case.experts.num_experts, "top_k": case.top_k},
            **{"tokens": tokens, "mode": "forward+backward" if train else "forward"},
            **{"other": other, **ratios(times, OURS, other)},
            **{"ms": milliseconds(times[OURS]), "dtype": "float32", **machine()},
        }
        for other in others
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 2048])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for name, tokens, train in itertools.product(args.models, args.tokens, (False, True)):
        rows = measure(name, tokens, train, args.rounds)
        for row in rows:
            print({k: row[k] for k in FIELDS[:7]}, flush=True)
        append(args.csv, FIELDS, rows)


if __name__ == "__main__":
    main()
