"""Experts that are look-ups: MemoryFormer's feed-forward networks under EvoMoE's gates.

Letters: T tokens, D model width, W hidden width (tau + delta) K, E experts, K, N tables and rows.
"""

import torch
from torch import Tensor, nn

from fairseq_evomoe.kernels import routing
from fairseq_evomoe.memory_config import MemoryConfig
from fairseq_evomoe.modules.experts import Bank, Part
from fairseq_evomoe.modules.memory_layer import MemoryFFN, own_group


class MemoryBank(Bank):
    """E memory FFNs with stacked tables, `--expert-type memory`; neither paper has them.

    Expert 0 is the `MemoryFFN` that a model without experts would have here, drawn from the same
    random numbers: before the split both agree to the bit. A hidden unit is a value between the
    two look-ups: a column of the first tables.

    Args:
        width: D.
        cfg: the flags of look-ups.
        num_experts: E.
        dropout: on hidden values, while training.
        generator: draws experts 1 to E-1.
        shared: as for `Bank`.
    """

    parts = {
        "tables1": Part("fc1", 3),
        "bias1": Part("fc1", 1),
        "norm_weight": Part(None),
        "norm_bias": Part(None),
        "tables2": Part("fc2"),
        "bias2": Part("fc2"),
    }
    # a column of 0 in the first tables is a constant bit after the norm, and goes on learning
    silence = "fc1"
    form: MemoryFFN

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
        # keeps no parameters of its own: each expert's are handed to it
        form = MemoryFFN(width, cfg, dropout=dropout)

        def stack(base: Tensor) -> nn.Parameter:
            others = torch.randn(num_experts - 1, *base.shape, generator=generator)
            std = base.std() if base.dim() == 3 else 0.0
            start = base[None] if base.dim() == 1 else torch.zeros_like(base)[None]
            return nn.Parameter(torch.cat([base.detach()[None], start + others * std]))

        own = dict(form.named_parameters())
        self.tables1 = stack(own["first.tables"])
        self.bias1 = stack(own["first.bias"])
        self.norm_weight = stack(own["norm.weight"])
        self.norm_bias = stack(own["norm.bias"]) if "norm.bias" in own else None
        self.tables2 = stack(own["second.tables"])
        self.bias2 = stack(own["second.bias"])
        for tables in (self.tables1, self.tables2):
            own_group(tables, cfg)
        object.__setattr__(self, "form", form.to("meta"))

    @property
    def hidden(self) -> int:
        """W."""
        return self.bias1.size(1)

    def extra_repr(self) -> str:
        e, k, n, w = self.tables1.shape
        return f"experts={e}, tables={k}, rows={n} and {self.tables2.size(2)}, hidden={w}"

    def _apply_expert(self, own: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(self.form.train(self.training), own, (x,))

    def _unbound(self) -> list[dict[str, Tensor]]:
        names = {
            "first.tables": self.tables1,
            "first.bias": self.bias1,
            "norm.weight": self.norm_weight,
            "norm.bias": self.norm_bias,
            "second.tables": self.tables2,
            "second.bias": self.bias2,
        }
        # one unbind: its backward stacks E gradients, where E slices would each make a full one
        split = {n: p.unbind(0) for n, p in names.items() if p is not None}
        return [{n: rows[e] for n, rows in split.items()} for e in range(self.count)]

    def one(self, expert: int, x: Tensor) -> Tensor:
        return self._apply_expert(self._unbound()[expert], x)

    def compute(
        self, x: Tensor, active: Tensor, weights: Tensor, at_most: int | None = None
    ) -> Tensor:
        token, counts = routing.sort_pairs(active)
        weight = weights.t().masked_select(active.t()).to(x.dtype)
        rows = x.index_select(0, token).split(counts)
        # an expert without rows runs on none of them, so that its parameters get a gradient of 0
        out = [self._apply_expert(own, r) for own, r in zip(self._unbound(), rows, strict=True)]
        return torch.zeros_like(x).index_add(0, token, torch.cat(out) * weight[:, None])
