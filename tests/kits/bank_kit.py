"""A bank of feed-forward experts for tests."""

import torch
from torch import nn
from torch.nn import functional as F

from fairseq_evomoe.modules.experts import ExpertBank

T, D, H, E = 10, 6, 12, 4


def bank(dropout=0.0, seed=1):
    torch.manual_seed(seed)
    return ExpertBank(
        nn.Linear(D, H),
        nn.Linear(H, D),
        num_experts=E,
        activation=F.relu,
        dropout=dropout,
        generator=torch.Generator().manual_seed(3),
    )
