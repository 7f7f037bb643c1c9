"""Flags that were given but have no effect in the model that is trained, each with the reason.

Flags of gates that were not chosen are reported by the gates themselves
(`modules.gates.base.Gate.check`), and flags that contradict each other are refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from fairseq_evomoe.config import EvolutionConfig, MoEConfig, ParallelConfig, SplitConfig
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.layer import MemoryBesideFFN, MemoryFFN
from fairseq_evomoe.modules.gates import Gate
from fairseq_evomoe.modules.gates.dense_to_sparse import DenseToSparseGate
from fairseq_evomoe.modules.gates.stable import StableGate
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tasks.checks import on_cpu


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is trained, and the flags that say how.

    Attributes:
        moe, memory, task: the flags of the model and of the task.
        gate: of the MoE layers; None in a dense model.
        splits: whether the base expert splits during training.
        looks_up_ffn: whether the FFN of some layer is a look-up layer.
    """

    moe: MoEConfig
    memory: MemoryConfig
    task: EvolutionConfig
    gate: Gate | None
    splits: bool
    looks_up_ffn: bool

    @property
    def memory_experts(self) -> bool:
        return self.gate is not None and self.moe.moe_expert_type == "memory"

    @property
    def looks_up(self) -> bool:
        memory = self.memory
        return memory.memory_ffn or memory.memory_attention or self.memory_experts


@dataclass(frozen=True)
class Rule:
    """Flags that all need the same thing.

    Attributes:
        flags: their names as fields.
        acts: whether they have an effect.
        needs: what they need, for the message.
    """

    flags: tuple[str, ...]
    acts: Callable[[Setting], bool]
    needs: str


def _names(config: type, *without: str) -> tuple[str, ...]:
    return tuple(f.name for f in fields(config) if f.name not in ("_name", *without))


FREQUENCIES = ("moe_freq", "encoder_moe_freq", "decoder_moe_freq")
SPLIT = _names(SplitConfig)
DTS_TIMES = tuple(n for n in _names(EvolutionConfig) if n.startswith("dts_"))

NGRAMS = ("memory_ngram", "memory_ngram_rows", "memory_ngram_mapped")

RULES = (
    Rule(
        (
            # architectures give a number of experts, also to those who ask for --moe-freq 0
            *_names(MoEConfig, *FREQUENCIES, "moe_expert_count", "output_storage"),
            *("evo_spawn_update", "stable_freeze_update", "expert_parallel"),
            *(*SPLIT, *DTS_TIMES),
        ),
        lambda s: s.gate is not None,
        "MoE layers: give --moe-freq",
    ),
    Rule(
        ("encoder_moe_freq", "decoder_moe_freq"),
        lambda s: all(
            s.moe.freq(side) == s.moe.given(f"--{side}-moe-freq") or not _given(s.moe, side)
            for side in ("encoder", "decoder")
        ),
        "to be larger than --moe-freq, since the larger of the two applies",
    ),
    Rule(SPLIT, lambda s: s.splits, "a base expert that splits: give --evo-spawn-update"),
    Rule(
        ("evo_diversify_ratio",),
        lambda s: s.task.evo_diversify in ("drop", "mask"),
        "--evo-diversify drop or mask",
    ),
    Rule(
        ("evo_diversify_noise",),
        lambda s: s.task.evo_diversify == "noise",
        "--evo-diversify noise",
    ),
    Rule(
        DTS_TIMES,
        # a gate from outside may read them in a schedule of its own
        lambda s: isinstance(s.gate, DenseToSparseGate) or _own_schedule(s.gate),
        "--moe-gate dts",
    ),
    Rule(
        ("stable_freeze_update",),
        lambda s: isinstance(s.gate, StableGate) or _own_schedule(s.gate),
        "--moe-gate stable",
    ),
    Rule(
        _names(ParallelConfig, "expert_parallel", "expert_parallel_size"),
        lambda s: s.task.expert_parallel,
        "--expert-parallel",
    ),
    Rule(("cpu_matmul",), lambda s: on_cpu(s.task), "a CPU: give --cpu"),
    Rule(
        ("memory_ngram_rows", "memory_ngram_mapped"),
        lambda s: s.memory.memory_ngram > 0,
        "--memory-ngram",
    ),
    Rule(
        ("memory_tables", "memory_weight_decay"),
        lambda s: s.looks_up or s.memory.memory_ngram > 0,
        "tables: give --memory-ffn, --memory-attention, --memory-ngram or --moe-expert-type memory",
    ),
    Rule(
        _names(MemoryConfig, *NGRAMS, "memory_tables", "memory_weight_decay"),
        lambda s: s.looks_up,
        "look-ups: give --memory-ffn, --memory-attention or --moe-expert-type memory",
    ),
    Rule(
        ("memory_ffn", "memory_parallel"),
        lambda s: s.looks_up_ffn,
        "a layer that is no MoE layer: give a larger --moe-freq, or --moe-expert-type memory",
    ),
    Rule(
        ("memory_layers", "memory_spawn_update"),
        lambda s: s.memory.memory_ffn or s.memory.memory_attention,
        "--memory-ffn or --memory-attention",
    ),
    Rule(
        ("memory_delta", "memory_ffn_embed_dim", "memory_norm"),
        lambda s: (s.looks_up_ffn and not s.memory.memory_parallel) or s.memory_experts,
        "--memory-ffn without --memory-parallel, or --moe-expert-type memory",
    ),
    Rule(
        ("memory_out_proj",),
        lambda s: s.memory.memory_attention,
        "--memory-attention",
    ),
    Rule(
        ("memory_temperature",),
        lambda s: s.memory.memory_score != "l1",
        "--memory-score prob or abs_prob",
    ),
)
"""Of the rules about one flag, the first that applies is reported."""


def _given(moe: MoEConfig, side: str) -> bool:
    return moe.given(f"--{side}-moe-freq") != 0


def _own_schedule(gate: Gate | None) -> bool:
    from_here = (DenseToSparseGate, StableGate)
    plain = gate is None or type(gate).schedule.__func__ is Gate.schedule.__func__  # type: ignore[attr-defined]
    return not plain and not isinstance(gate, from_here)


def unused(setting: Setting) -> Iterator[str]:
    """Yield a line for each flag that was given a value and has no effect."""
    said = set()
    for rule in RULES:
        if rule.acts(setting):
            continue
        for name in rule.flags:
            for flags, usual in (
                (setting.moe, MoEConfig()),
                (setting.memory, MemoryConfig()),
                (setting.task, EvolutionConfig()),
            ):
                value = getattr(flags, name, None)
                if name in said or value in (None, getattr(usual, name, value)):
                    continue
                said.add(name)
                flag = "--" + name.replace("_", "-")
                shown = flag if value is True else f"{flag} {value}"
                yield f"{shown} has no effect: it needs {rule.needs}"


def unused_losses(flags: Any, gate: Gate | None) -> Iterator[str]:
    """Yield a line for each flag of a criterion's routing losses that has no effect.

    Args:
        flags: anything with the fields `moe_gate_loss_wt` and so on.
        gate: of the MoE layers; None in a dense model.
    """
    needs = {
        "moe_gate_loss_wt": (
            gate is not None and gate.balanced_by_loss,
            "a gate that is balanced by a loss",
        ),
        "moe_z_loss_wt": (gate is not None and gate.has_router, "a gate with a router"),
        "moe_entropy_loss_wt": (gate is not None and gate.has_router, "a gate with a router"),
        "stable_distill_loss_wt": (
            gate is not None and "distill" in gate.needs_losses,
            "--moe-gate stable",
        ),
    }
    usual = {"moe_gate_loss_wt": 0.01, "stable_distill_loss_wt": 0.3}
    for name, (acts, what) in needs.items():
        value = getattr(flags, name, None)
        if value and not acts and value != usual.get(name):
            what = "MoE layers: give --moe-freq" if gate is None else what
            yield f"--{name.replace('_', '-')} {value} has no effect: it needs {what}"


def setting_of(model: nn.Module, args: Any, task: EvolutionConfig, spawn: int) -> Setting:
    """Describe a model that was built for training.

    Args:
        args: the flags that it was built from.
        spawn: update at which the base expert splits, 0 if it does not.
    """
    layers = moe_layers(model)
    in_experts = {m for _, layer in layers for m in layer.modules()}
    return Setting(
        moe=MoEConfig.from_args(args),
        memory=MemoryConfig.from_args(args),
        task=task,
        gate=layers[0][1].gate if layers else None,
        splits=spawn > 0,
        looks_up_ffn=any(
            isinstance(m, MemoryFFN | MemoryBesideFFN) and m not in in_experts
            for m in model.modules()
        ),
    )
