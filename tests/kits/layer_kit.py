"""Helpers for the tests of MoE layers: a layer of any kind at any time, and padded token ids."""

import torch
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.models.ffn import DenseFFN, build_moe_layer
from fairseq_evomoe.schedule import EvolutionSchedule

L, B, D, H, E = 5, 3, 8, 16, 4
SCHEDULE = EvolutionSchedule(spawn=4, anneal=4, hard=12, start=2.0, end=0.5)
PAD = 1


def layer(schedule=SCHEDULE, n=0, has_split=None, name="encoder.1", dictionary=None, **flags):
    """An MoE layer of width D with E experts after n updates."""
    torch.manual_seed(2)
    cfg = MoEConfig(moe_freq=1, moe_expert_count=E, **flags)
    dense = DenseFFN(fc1=nn.Linear(D, H), fc2=nn.Linear(H, D), activation=F.relu)
    made = build_moe_layer(cfg, None, name, dense=dense, dictionary=dictionary)
    if schedule is not None:
        made.set_schedule(schedule)
    made.set_num_updates(n)
    if has_split is not None:
        made.set_split(has_split)
    return made


def ids(lengths):
    """Token ids (B, L) with padding on the left, as fairseq's sources have it."""
    batch = torch.full((len(lengths), L), PAD)
    for row, n in zip(batch, lengths, strict=True):
        row[L - n :] = torch.arange(10, 10 + n)
    return batch


PLANS = {
    "dts soft": {"moe_gate": "dts", "n": 6, "has_split": True, "dts_noise": "none"},
    "dts limited": {
        "moe_gate": "dts",
        "n": 8,
        "has_split": True,
        "dts_noise": "none",
        "dts_max_experts": 2,
        "dts_threshold": 0.3,
    },
    "dts limited to 1": {
        "moe_gate": "dts",
        "n": 8,
        "has_split": True,
        "dts_noise": "none",
        "dts_max_experts": 1,
        "dts_threshold": 0.1,
    },
    "dts hard": {"moe_gate": "dts", "n": 20, "has_split": True, "dts_noise": "none"},
    "dense": {"moe_gate": "dense", "schedule": None},
    "switch": {"moe_gate": "switch", "schedule": None},
    "switch, capacity": {"moe_gate": "switch", "schedule": None, "moe_capacity_factor": 0.5},
    "gshard": {"moe_gate": "gshard", "schedule": None, "moe_second_expert_policy": "all"},
    "topk": {"moe_gate": "topk", "schedule": None, "moe_top_k": 3},
    "base": {"moe_gate": "base", "schedule": None},
    "shared": {"moe_gate": "switch", "schedule": None, "moe_shared_expert": True},
}
"""Name -> flags of a layer for every kind of routing plan."""
