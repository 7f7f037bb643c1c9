"""Helpers for the tests of gates: a gate of any kind, token ids, softmax in plain Python."""

import math

import torch

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates import GATES, GateContext
from fairseq_evomoe.modules.plan import TokenBatch
from fairseq_evomoe.schedule import Stage

E, D = 6, 8
SOFT, HARD = Stage.SPARSIFY, Stage.HARD


class Words:
    """The part of a fairseq dictionary that gates read, with 20 words of falling frequency."""

    symbols = [f"w{i}" for i in range(20)]
    indices = {s: i for i, s in enumerate(symbols)}
    count = [1000 // (i + 1) for i in range(20)]
    eos_word = "</s>"

    def __len__(self):
        return len(self.symbols)


def gate(name, training=False, **flags):
    cfg = MoEConfig(moe_freq=1, moe_expert_count=E, moe_gate=name, **flags).check(GATES)
    context = GateContext(
        dim=D,
        name="encoder.0",
        generator=torch.Generator().manual_seed(1),
        dictionary=Words(),
    )
    made = GATES[name](cfg, context)
    if hasattr(made, "weight"):
        with torch.no_grad():
            made.weight.mul_(40)
    return made.train(training)


def batch(rows, length):
    """Token ids of `rows` sentences without padding."""
    return TokenBatch(torch.randint(20, (rows, length)), pad=99)


def softmax(row):
    top = max(row)
    powers = [math.exp(v - top) for v in row]
    return [v / sum(powers) for v in powers]
