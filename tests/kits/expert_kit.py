"""Problems for the expert kernels, and their solution by loops over tokens and experts."""

import torch

from fairseq_evomoe.kernels.experts.pairs import expert_order
from fairseq_evomoe.kernels.experts.serve import run_pairs
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Pairs


def problem(T, E, D, F_, density, dtype=torch.float64, empty=()):
    """Random states, weights and active pairs; experts in `empty` get no token."""
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    w = [
        torch.randn(shape, dtype=dtype).mul(0.3).requires_grad_()
        for shape in ((E, F_, D), (E, F_), (E, D, F_), (E, D))
    ]
    active = torch.rand(T, E) < density
    active[:, list(empty)] = False
    gate = torch.rand(T, E, dtype=dtype, requires_grad=True)
    return x, w, active, gate


def by_loops(x, w, active, gate, activation):
    """The layer's output, computed one token and one expert at a time."""
    w1, b1, w2, b2 = w
    rows = []
    for t in range(x.size(0)):
        y = x[t] * 0
        for e in range(w1.size(0)):
            if active[t, e]:
                y = y + gate[t, e] * (w2[e] @ activation(w1[e] @ x[t] + b1[e]) + b2[e])
        rows.append(y)
    return torch.stack(rows) if rows else x * 1


def grouped(x, w, active, gate, activation, dropout=0.0):
    """The op on the active pairs, whatever their density."""
    token, counts = expert_order(active)
    pairs = Pairs(gate.t().masked_select(active.t()), token, counts)
    return run_pairs(x, ExpertWeights(*w), pairs, activation=activation, dropout=dropout)
