"""Cost per token of a model and its dense counterpart: parameters, MACs, bytes of weights read.

Letters: s context length, D width, F hidden width of the dense FFN, t bits per table (tau).

One MAC is one multiplication and one addition. It is 2 FLOPs in a strict count and 1 FLOP in the
tables of the MemoryFormer paper (arXiv 2411.12992). As in that paper, norms, softmax, hashing and
embeddings, n-gram tables among them, are not counted. Attention is counted over s positions,
whether it is causal or not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from torch import nn

from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.experts import MemoryBank
from fairseq_evomoe.memory.layer import MemoryBesideFFN, MemoryFFN, MemoryLayer
from fairseq_evomoe.modules.gates import ScoreGate
from fairseq_evomoe.modules.moe_layer import EvoMoELayer
from fairseq_evomoe.modules.output_layer import Int8OutputLayer
from fairseq_evomoe.old_names import read_flag
from fairseq_evomoe.schedule import Stage

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
"""Bytes per weight for each dtype."""


@dataclass(frozen=True)
class Cost:
    """Cost of one part of a model, per token.

    Attributes:
        kind: what the part is: attention, ffn, experts, gate or output.
        macs: number of multiply-accumulates.
        reads: number of weights read for a single token, as in decoding at batch size 1.
        parameters: number of weights stored.
        dense_macs, dense_parameters: `macs` and `parameters` of its dense counterpart, 0 for a
        gate.
    """

    kind: str
    macs: float
    reads: float
    parameters: float
    dense_macs: float
    dense_parameters: float


def paper_block(s: int, d: int, bits: int | None = None) -> float:
    """Return the MACs of one block over s positions by the paper's formulas (section 2.4).

    A dense block has 2 s^2 d + 12 s d^2. With look-ups of t = `bits` bits per table it has
    2 s^2 d + (6 / t) s d^2, where 6 is the paper's rounding of 5.25.
    """
    return 2 * s * s * d + (12 if bits is None else 6 / bits) * s * d * d


def _size(module: nn.Module) -> int:
    """Number of weights; those converted for inference are buffers of int8 or three dimensions."""
    stored = sum(b.numel() for b in module.buffers() if b.dim() == 3 or b.dtype == torch.int8)
    return stored + sum(p.numel() for p in module.parameters())


def _linear(module: nn.Linear | Int8OutputLayer) -> int:
    return module.weight.numel()


def _look_up(layer: MemoryLayer) -> int:
    if layer.is_dense:
        return layer.dense_weight().numel()
    return layer.tables.size(0) * layer.tables.size(2)


def _look_up_ffn(ffn: MemoryFFN | MemoryBesideFFN) -> int:
    """Multiplications of what replaces a feed-forward network, as it is now."""
    if isinstance(ffn, MemoryFFN):
        if ffn.is_dense:
            return _linear(ffn.fc1) + _linear(ffn.fc2)
        return _look_up(ffn.first) + _look_up(ffn.second)
    return _linear(ffn.fc1) + _linear(ffn.fc2) + _look_up(ffn.beside)


def active_experts(layer: EvoMoELayer) -> float:
    """Routed experts that a token uses in evaluation, or the largest possible number of them."""
    return layer.gate.experts_per_token(layer.cfg, layer.phase.stage)


def _attention(module: MultiheadAttention, context: int) -> Cost:
    d = module.embed_dim
    scores = 2 * context * d
    dense = 2 * d * d + d * (module.kdim + module.vdim)
    if isinstance(module, MemoryAttention):
        macs = sum(_look_up(m) for m in module.modules() if isinstance(m, MemoryLayer))
        macs += sum(_linear(m) for m in module.modules() if isinstance(m, nn.Linear))
    else:
        macs = dense
    biases = 4 * d
    return Cost("attention", macs + scores, macs, _size(module), dense + scores, dense + biases)


def _experts(layer: EvoMoELayer, hidden: int) -> list[Cost]:
    bank, cfg = layer.experts, layer.cfg
    if isinstance(bank, MemoryBank):
        d = bank.bias2.size(1)
        one = bank.tables1.size(1) * bank.hidden + bank.tables2.size(1) * d
    else:
        d = bank.b2.size(1)  # type: ignore[union-attr, operator]
        one = 2 * d * bank.hidden
    used = 1 if layer.phase.stage == Stage.DIVERSIFY else active_experts(layer) + bank.shared
    dense = 2 * d * hidden
    routed = isinstance(layer.gate, ScoreGate) and layer.phase.stage != Stage.DIVERSIFY
    gate = d * cfg.moe_expert_count if routed else 0
    return [
        Cost("experts", used * one, used * one, _size(bank), dense, dense + d + hidden),
        Cost("gate", gate, gate, _size(layer.gate), 0, 0),
    ]


def costs(model: nn.Module, *, context: int, hidden: dict[str, int]) -> Iterator[Cost]:
    """Yield the cost of each part of a built Transformer.

    Args:
        model: a Transformer of this package or of fairseq.
        context: s, the number of positions that a token attends to.
        hidden: F of the dense counterpart, {"encoder": F, "decoder": F}.
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
            macs = _look_up_ffn(module)
            last = module.beside if isinstance(module, MemoryBesideFFN) else module.second
            d, f = last.tables.size(2), hidden[side]
            yield Cost("ffn", macs, macs, _size(module), 2 * d * f, 2 * d * f + d + f)
        elif isinstance(module, nn.Linear | Int8OutputLayer):
            macs = _linear(module)
            kind = "ffn" if name.endswith(("fc1", "fc2")) else "output"
            yield Cost(kind, macs, macs, _size(module), macs, _size(module))
        else:
            continue
        seen.update(id(m) for m in module.modules())


_SUMMED = ("macs", "reads", "parameters", "dense_macs", "dense_parameters")


def total(parts: list[Cost]) -> dict[str, dict[str, float]]:
    """Sum the costs of each kind, and those of all parts under the key "total"."""
    made: dict[str, dict[str, float]] = {}
    for part in parts:
        for kind in (part.kind, "total"):
            row = made.setdefault(kind, dict.fromkeys(_SUMMED, 0.0))
            for name in _SUMMED:
                row[name] += getattr(part, name)
    return made


def per_token(model: nn.Module, flags: Any, *, context: int, dtype: str) -> dict[str, dict]:
    """Return a model's costs by kind, with the bytes of weights that a token reads.

    Args:
        model: a Transformer of this package or of fairseq.
        flags: the model's flags, from which the FFN width of the dense counterpart is read.
        context: number of positions that a token attends to.
        dtype: dtype of the weights, a key of `BYTES`.
    """
    hidden = {s: read_flag(flags, f"{s}_ffn_embed_dim") for s in ("encoder", "decoder")}
    # as in fairseq, a decoder for which no width is given has the encoder's
    hidden["decoder"] = hidden["decoder"] or hidden["encoder"]
    rows = total(list(costs(model, context=context, hidden=hidden)))
    for row in rows.values():
        row["bytes"] = row["reads"] * BYTES[dtype]
        row["dense_bytes"] = (row["dense_macs"] - (row["macs"] - row["reads"])) * BYTES[dtype]
    return rows
