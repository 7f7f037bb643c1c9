"""What an exported model's layers have for feed-forward networks: dense ones and experts.

Parameters have the names that they have in fairseq's checkpoint. `OPERATIONS` says what computes
the experts; see `look_up_evomoe`. Letters: T tokens, D model width, F hidden width, E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configuration_evomoe import EvoMoEConfig
from .look_up_evomoe import OPERATIONS, HashRule, KeepsScales, LookUp, hidden_width
from .routing_evomoe import Router, Routing

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "swish": F.silu,
}
"""fairseq's names of activations."""


def widened(
    matrix: Tensor, scale: Tensor | None, experts: int | slice, dtype: torch.dtype
) -> Tensor:
    """The matrices of one expert or of several; int8 ones as numbers of `dtype`."""
    if scale is None:
        return matrix[experts]
    return (matrix[experts] * scale[experts][..., None]).to(dtype)


def run_experts(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    routing: Routing,
    *,
    activation: Callable[[Tensor], Tensor],
    dropout: float = 0.0,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return sum_e weight_te FFN_e(x_t) over the active pairs: x (T, D) -> (T, D).

    Args:
        weights: w1 (E, F, D), b1 (E, F), w2 (E, D, F), b2 (E, D).
        scales: of the rows of int8 matrices, (E, F) and (E, D) float32, or None.
    """
    w1, b1, w2, b2 = weights
    first, second = scales or (None, None)
    y = torch.zeros_like(x)
    for e in range(len(w1)):
        rows = routing.active[:, e].nonzero().squeeze(1)
        h = activation(F.linear(x[rows], widened(w1, first, e, x.dtype), b1[e]))
        h = F.dropout(h, dropout, training=dropout > 0)
        out = F.linear(h, widened(w2, second, e, x.dtype), b2[e]) * routing.weights[
            rows, e, None
        ].to(x.dtype)
        y = y.index_add(0, rows, out.to(y.dtype))
    return y


OPERATIONS["experts"] = run_experts


class DenseFFN(nn.Module):
    """fc2(act(fc1 x)), with a look-up beside it if `beside` is set."""

    def __init__(self, config: EvoMoEConfig, width: int, hidden: int, *, beside: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = config.activation_dropout
        self.beside = None
        if beside:
            bits = config.memory["bits"]
            self.beside = LookUp(config.memory, width, width, bits, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        h = F.dropout(self.activation(self.fc1(x)), self.dropout, training=self.training)
        y = self.fc2(h)
        return y if self.beside is None else y + self.beside(x)


class Experts(KeepsScales):
    """E feed-forward networks with stacked weights, which may be int8 with a scale per row."""

    scales = ("scale1", "scale2")
    scale1: Tensor
    scale2: Tensor

    def __init__(self, config: EvoMoEConfig, width: int, hidden: int, count: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = config.activation_dropout
        self.is_int8 = config.moe["storage"] == "int8"
        for number, (out, into) in enumerate(((hidden, width), (width, hidden)), 1):
            shape = (count, out, into)
            if self.is_int8:
                self.register_buffer(f"w{number}", torch.zeros(shape, dtype=torch.int8))
                self.register_buffer(f"scale{number}", torch.zeros(shape[:2]))
            else:
                setattr(self, f"w{number}", nn.Parameter(torch.zeros(shape)))
            setattr(self, f"b{number}", nn.Parameter(torch.zeros(shape[:2])))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, D) -> (T, D)."""
        return OPERATIONS["experts"](
            x,
            (self.w1, self.b1, self.w2, self.b2),
            routing,
            activation=self.activation,
            dropout=self.dropout if self.training else 0.0,
            scales=(self.scale1, self.scale2) if self.is_int8 else None,
        )


class LookUpExperts(nn.Module):
    """E feed-forward networks of two look-ups each, with stacked tables."""

    def __init__(self, config: EvoMoEConfig, width: int, count: int) -> None:
        super().__init__()
        memory, wide = config.memory, hidden_width(config.memory, width)
        bits = (memory["bits"], memory["bits"] + memory["delta"])
        self.rms, self.dropout = memory["norm"] == "rms", config.activation_dropout
        self.rules = []
        for number, (into, out) in enumerate(((width, wide), (wide, width)), 1):
            t = bits[number - 1]
            rule = HashRule(memory, into, t, memory["gain"][str(t)])
            self.rules.append(rule)
            tables = torch.zeros(count, rule.count, 2**t, out)
            setattr(self, f"tables{number}", nn.Parameter(tables))
            linear = nn.Parameter(torch.zeros(count, rule.count, t, out))
            setattr(self, f"linear{number}", linear if memory["linear"] else None)
            setattr(self, f"bias{number}", nn.Parameter(torch.zeros(count, out)))
        self.norm_weight = nn.Parameter(torch.ones(count, wide))
        self.norm_bias = None if self.rms else nn.Parameter(torch.zeros(count, wide))

    def _part(self, name: str, expert: int) -> Any:
        stacked = getattr(self, name)
        return None if stacked is None else stacked[expert]

    def _run(self, e: int, x: Tensor) -> Tensor:
        first, second = (
            (self._part(f"tables{n}", e), self._part(f"bias{n}", e), self._part(f"linear{n}", e))
            for n in (1, 2)
        )
        h = self.rules[0](x, *first)
        weight, bias = self._part("norm_weight", e), self._part("norm_bias", e)
        norm = F.rms_norm(h, h.shape[-1:], weight) if self.rms else None
        h = F.layer_norm(h, h.shape[-1:], weight, bias) if norm is None else norm
        return self.rules[1](F.dropout(h, self.dropout, training=self.training), *second)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, D) -> (T, D)."""
        y = torch.zeros_like(x)
        for e in range(len(self.norm_weight)):
            rows = routing.active[:, e].nonzero().squeeze(1)
            out = self._run(e, x[rows]) * routing.weights[rows, e, None].to(x.dtype)
            y = y.index_add(0, rows, out)
        return y


class MoELayer(nn.Module):
    """A gate and its experts. Padding is not routed; its output is 0."""

    def __init__(self, config: EvoMoEConfig, width: int, hidden: int, vocabulary: int) -> None:
        super().__init__()
        moe = config.moe
        self.gate = Router(moe, width, vocabulary)
        self.shared = moe["shared"]
        count = moe["experts"] + int(self.shared)
        if moe["expert_type"] == "memory":
            self.experts: nn.Module = LookUpExperts(config, width, count)
        else:
            self.experts = Experts(config, width, hidden, count)

    def forward(self, x: Tensor, real: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Routing]:
        """x (B, L, D) -> (B, L, D) and the routing of the real tokens.

        Args:
            real: which positions are no padding, (B, L) bool, or None if all are real.
            ids: token ids, (B, L), or None.
        """
        flat = x.reshape(-1, x.size(-1))
        sentence = torch.arange(x.size(0), device=x.device).repeat_interleave(x.size(1))
        token = None if ids is None else ids.reshape(-1)
        rows = None if real is None else real.reshape(-1).nonzero().squeeze(1)
        states = flat
        if rows is not None:
            states, sentence = flat[rows], sentence[rows]
            token = None if token is None else token[rows]
        routing = self.gate(states, token, sentence)
        y = self.experts(states, self._with_shared(routing)).to(x.dtype)
        if rows is not None:
            y = torch.zeros_like(flat).index_copy(0, rows, y)
        return y.view_as(x), routing

    def _with_shared(self, routing: Routing) -> Routing:
        """The shared expert as first column, with half of the weight."""
        if not self.shared:
            return routing
        half = torch.full_like(routing.weights[:, :1], 0.5)
        most = routing.max_active
        return Routing(
            torch.cat([half, routing.weights * 0.5], 1),
            torch.cat([torch.ones_like(half, dtype=torch.bool), routing.active], 1),
            routing.logits,
            None if most is None else most + 1,
        )
