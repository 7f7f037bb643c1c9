"""Experts that are look-ups: MemoryFormer's feed-forward networks under EvoMoE's gates.

Letters: T tokens, D model width, W hidden width (tau + delta) K, E experts, K, N tables and rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.kernels.experts.pairs import expert_order
from fairseq_evomoe.kernels.experts.values import Routing
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.layer import MemoryFFN
from fairseq_evomoe.memory.rule import Tables
from fairseq_evomoe.memory.storage import mark_param_group
from fairseq_evomoe.modules.experts import Bank, Part


class ExpertTables(NamedTuple):
    """The parameters of one expert: tables (K, N, W) and (K', N', D), biases, norm (W,)."""

    tables1: Tensor
    linear1: Tensor | None
    bias1: Tensor
    norm_weight: Tensor
    norm_bias: Tensor | None
    tables2: Tensor
    linear2: Tensor | None
    bias2: Tensor


class MemoryBank(Bank):
    """E memory FFNs with stacked tables, for `--moe-expert-type memory`. Neither paper has them.

    Expert 0 is the `MemoryFFN` that a model without experts would have here, drawn from the same
    random numbers, so before the split both agree bitwise. A hidden unit is a value between the two
    look-ups, that is, a column of the first tables.

    Args:
        width: D.
        cfg: the flags of look-ups.
        num_experts: E.
        dropout: dropout probability of hidden values during training.
        generator: random generator that draws experts 1 to E-1.
        shared: see `Bank`.
    """

    parts = {
        "tables1": Part("fc1", 3),
        "linear1": Part("fc1", 3),
        "bias1": Part("fc1", 1),
        "norm_weight": Part(None),
        "norm_bias": Part(None),
        "tables2": Part("fc2"),
        "linear2": Part("fc2"),
        "bias2": Part("fc2"),
    }
    # a unit whose column of the first tables is 0 is a constant bit after the norm, yet it learns
    mask_side = "fc1"

    def __init__(
        self,
        width: int,
        cfg: MemoryConfig,
        *,
        num_experts: int,
        dropout: float,
        generator: torch.Generator,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.shared = shared
        base = MemoryFFN(width, cfg, dropout=dropout)
        self.dropout = dropout
        self.first, self.second = base.first.rule, base.second.rule
        self.rms = isinstance(base.norm, nn.RMSNorm)
        values = dict(base.named_parameters())

        def stack(name: str) -> nn.Parameter:
            base = values[name]
            others = torch.randn(num_experts - 1, *base.shape, generator=generator)
            std = base.std() if base.dim() == 3 else 0.0
            start = base[None] if base.dim() == 1 else torch.zeros_like(base)[None]
            return nn.Parameter(torch.cat([base.detach()[None], start + others * std]))

        self.tables1 = stack("first.tables")
        self.linear1 = stack("first.linear") if cfg.memory_linear else None
        self.bias1 = stack("first.bias")
        self.norm_weight = stack("norm.weight")
        self.norm_bias = stack("norm.bias") if not self.rms else None
        self.tables2 = stack("second.tables")
        self.linear2 = stack("second.linear") if cfg.memory_linear else None
        self.bias2 = stack("second.bias")
        for tables in (self.tables1, self.tables2):
            mark_param_group(tables, cfg)

    @property
    def hidden(self) -> int:
        """W."""
        return self.bias1.size(1)

    def extra_repr(self) -> str:
        e, k, n, w = self.tables1.shape
        return f"experts={e}, tables={k}, rows={n} and {self.tables2.size(2)}, hidden={w}"

    def _run(self, expert: ExpertTables, x: Tensor) -> Tensor:
        """One memory FFN with its own tables, on x (..., D); see `MemoryFFN`."""
        first = Tables(expert.tables1, expert.bias1, expert.linear1)
        h = self.first.look_up(x, first, training=self.training)
        shape = h.shape[-1:]
        if self.rms:
            h = F.rms_norm(h, shape, expert.norm_weight)
        else:
            h = F.layer_norm(h, shape, expert.norm_weight, expert.norm_bias)
        h = F.dropout(h, self.dropout, training=self.training)
        second = Tables(expert.tables2, expert.bias2, expert.linear2)
        return self.second.look_up(h, second, training=self.training)

    def _experts(self) -> list[ExpertTables]:
        """The parameters of every expert that this worker holds."""
        # in backward one unbind stacks E gradients, whereas E slices would each make a full one
        none = (None,) * self.count
        columns = (
            none if p is None else p.unbind(0)
            for p in (
                *(self.tables1, self.linear1, self.bias1, self.norm_weight, self.norm_bias),
                *(self.tables2, self.linear2, self.bias2),
            )
        )
        return [ExpertTables(*values) for values in zip(*columns, strict=True)]

    def run_expert(self, expert: int, x: Tensor) -> Tensor:
        return self._run(self._experts()[expert], x)

    def run_local(self, x: Tensor, routing: Routing) -> Tensor:
        """See `Bank.run_local`."""
        active = routing.active
        token, counts = expert_order(active)
        weight = routing.weights.t().masked_select(active.t()).to(x.dtype)
        rows = x.index_select(0, token).split(counts)
        # an expert without rows runs on none of them, so that its parameters get a gradient of 0
        out = [self._run(e, r) for e, r in zip(self._experts(), rows, strict=True)]
        return torch.zeros_like(x).index_add(0, token, torch.cat(out) * weight[:, None])
