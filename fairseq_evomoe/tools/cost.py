"""What a model costs per token, beside its dense twin: parameters, MACs, bytes of weights read.

Letters: s context length, D width, F hidden width of the dense FFN, t bits a table (tau).

One MAC is a multiplication and an addition: 2 FLOPs where FLOPs are counted strictly, 1 in the
tables of the MemoryFormer paper (arXiv 2411.12992). Norms, softmax, hashing and embeddings are left
out, as there. Attention is counted over s positions, causal or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fairseq.modules import MultiheadAttention
from torch import nn

from fairseq_evomoe.modules.gates import ScoreGate
from fairseq_evomoe.modules.memory_experts import MemoryBank
from fairseq_evomoe.modules.memory_layer import MemoryAttention, MemoryLayer
from fairseq_evomoe.modules.moe_layer import EvoMoELayer
from fairseq_evomoe.schedule import Stage
from fairseq_evomoe.tools.checkpoint import read_flag

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Of a weight, by its type."""


@dataclass(frozen=True)
class Cost:
    """Of one part, per token.

    Attributes:
        kind: attention, ffn, experts, gate, output.
        macs: multiply-accumulates.
        reads: weights read for one token alone, as in decoding at batch 1.
        parameters: weights stored.
        twin_macs, twin_parameters: of the dense part in its place.
    """

    kind: str
    macs: float
    reads: float
    parameters: float
    twin_macs: float
    twin_parameters: float


def paper_block(s: int, d: int, bits: int | None = None) -> float:
    """MACs of one block over s positions by the paper's formulas (section 2.4).

    Dense 2 s^2 d + 12 s d^2; with look-ups of `bits` a table 2 s^2 d + (6 / t) s d^2, where 6 is
    the paper's rounding of 5.25.
    """
    return 2 * s * s * d + (12 if bits is None else 6 / bits) * s * d * d


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linear(module: nn.Linear) -> int:
    return module.weight.numel()


def _look_up(layer: MemoryLayer) -> int:
    return layer.tables.size(0) * layer.tables.size(2)


def active_experts(layer: EvoMoELayer) -> float:
    """Routed experts a token uses in evaluation where the rule fixes it, else all of them."""
    cfg = layer.cfg
    if cfg.moe_gate == "dts" and layer.clock.stage == Stage.HARD:
        return cfg.dts_top_k
    if cfg.moe_gate == "expert_choice":
        return cfg.moe_capacity_factor or 1
    fixed = {"switch": 1, "base": 1, "hash": 1, "stable": 1, "gshard": 2, "topk": cfg.moe_top_k}
    return fixed.get(cfg.moe_gate, cfg.moe_expert_count)


def _attention(module: MultiheadAttention, context: int) -> Cost:
    d = module.embed_dim
    scores = 2 * context * d
    twin = 2 * d * d + d * (module.kdim + module.vdim)
    if isinstance(module, MemoryAttention):
        macs = sum(_look_up(m) for m in module.modules() if isinstance(m, MemoryLayer))
        macs += sum(_linear(m) for m in module.modules() if isinstance(m, nn.Linear))
    else:
        macs = twin
    biases = 4 * d
    return Cost("attention", macs + scores, macs, _size(module), twin + scores, twin + biases)


def _experts(layer: EvoMoELayer, hidden: int) -> list[Cost]:
    bank, cfg = layer.experts, layer.cfg
    if isinstance(bank, MemoryBank):
        d = bank.bias2.size(1)
        one = bank.tables1.size(1) * bank.hidden + bank.tables2.size(1) * d
    else:
        d = bank.b2.size(1)  # type: ignore[union-attr, operator]
        one = 2 * d * bank.hidden
    used = 1 if layer.clock.stage == Stage.DIVERSIFY else active_experts(layer) + bank.shared
    twin = 2 * d * hidden
    routed = isinstance(layer.gate, ScoreGate) and layer.clock.stage != Stage.DIVERSIFY
    gate = d * cfg.moe_expert_count if routed else 0
    return [
        Cost("experts", used * one, used * one, _size(bank), twin, twin + d + hidden),
        Cost("gate", gate, gate, _size(layer.gate), 0, 0),
    ]


def costs(model: nn.Module, *, context: int, hidden: dict[str, int]) -> Iterator[Cost]:
    """The parts of a built Transformer, one by one.

    Args:
        model: of this package, or of fairseq.
        context: s, positions that a token attends to.
        hidden: F of the dense twin, {"encoder": F, "decoder": F}.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in seen:
            continue
        side = "decoder" if "decoder" in name else "encoder"
        if isinstance(module, MultiheadAttention):
            yield _attention(module, context)
        elif isinstance(module, EvoMoELayer):
            yield from _experts(module, hidden[side])
        elif name.endswith("memory_ffn"):
            macs = sum(_look_up(m) for m in module.modules() if isinstance(m, MemoryLayer))
            d, f = module.second.bias.numel(), hidden[side]
            yield Cost("ffn", macs, macs, _size(module), 2 * d * f, 2 * d * f + d + f)
        elif isinstance(module, nn.Linear):
            macs = _linear(module)
            kind = "ffn" if name.endswith(("fc1", "fc2")) else "output"
            yield Cost(kind, macs, macs, _size(module), macs, _size(module))
        else:
            continue
        seen.update(id(m) for m in module.modules())


_SUMMED = ("macs", "reads", "parameters", "twin_macs", "twin_parameters")


def total(parts: list[Cost]) -> dict[str, dict[str, float]]:
    """Sums by kind, and over all under "total"."""
    made: dict[str, dict[str, float]] = {}
    for part in parts:
        for kind in (part.kind, "total"):
            row = made.setdefault(kind, dict.fromkeys(_SUMMED, 0.0))
            for name in _SUMMED:
                row[name] += getattr(part, name)
    return made


def per_token(model: nn.Module, flags: Any, *, context: int, dtype: str) -> dict[str, dict]:
    """Costs by kind of a model, with the bytes of weights that a token reads.

    Args:
        flags: of the model, which say how wide the dense twin's FFN is.
        context: positions that a token attends to.
        dtype: of the weights, for the bytes: one of `BYTES`.
    """
    hidden = {s: read_flag(flags, f"{s}_ffn_embed_dim") for s in ("encoder", "decoder")}
    # fairseq's rule: a decoder without a width of its own has the encoder's
    hidden["decoder"] = hidden["decoder"] or hidden["encoder"]
    rows = total(list(costs(model, context=context, hidden=hidden)))
    for row in rows.values():
        row["bytes"] = row["reads"] * BYTES[dtype]
        row["twin_bytes"] = (row["twin_macs"] - (row["macs"] - row["reads"])) * BYTES[dtype]
    return rows
