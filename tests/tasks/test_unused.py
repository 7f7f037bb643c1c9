"""tasks/unused.py: a flag without effect in the model that is trained is said."""

import logging

import pytest
from conftest import build

from fairseq_evomoe.config import EvolutionConfig, MoEConfig
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.tasks import unused

DENSE = ("--moe-freq", "0")
MOE = ("--moe-freq", "2", "--moe-expert-count", "4")
SPAWN = ("--evo-spawn-update", "4", "--max-update", "20")
SWITCH = (*MOE, "--moe-gate", "switch")


def said(toy, caplog, *flags, family="translation", criterion=True):
    """What is logged about flags without effect when a model and its criterion are built."""
    with caplog.at_level(logging.WARNING):
        cfg, task, _ = build(toy, *flags, family=family)
        if criterion:
            task.build_criterion(cfg.criterion)
    return [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((*DENSE, "--moe-gate", "switch"), "--moe-gate switch has no effect: it needs MoE layers"),
        ((*DENSE, "--dts-noise", "none"), "--dts-noise none has no effect: it needs MoE layers"),
        ((*DENSE, *SPAWN), "--evo-spawn-update 4 has no effect: it needs MoE layers"),
        ((*DENSE, "--moe-shared-expert"), "--moe-shared-expert has no effect: it needs MoE"),
        ((*DENSE, "--moe-gate-loss-wt", "0.5"), "--moe-gate-loss-wt 0.5 has no effect: it needs"),
        ((*DENSE, "--memory-bits", "4"), "--memory-bits 4 has no effect: it needs look-ups"),
        ((*SWITCH, "--evo-diversify", "copy"), "--evo-diversify copy has no effect: it needs a"),
        ((*SWITCH, "--dts-anneal-updates", "9"), "--dts-anneal-updates 9 has no effect: it needs"),
        ((*SWITCH, "--dts-threshold", "0.5"), "--dts-threshold 0.5 has no effect with --moe-gate"),
        ((*SWITCH, "--stable-freeze-update", "9"), "--stable-freeze-update 9 has no effect"),
        ((*SWITCH, "--stable-distill-loss-wt", "0.5"), "it needs --moe-gate stable"),
        ((*SWITCH, "--expert-parallel-save", "sharded"), "it needs --expert-parallel"),
        ((*MOE, *SPAWN, "--evo-diversify-noise", "1"), "it needs --evo-diversify noise"),
        (
            (*MOE, *SPAWN, "--evo-diversify", "copy", "--evo-diversify-ratio", "1"),
            "it needs --evo-diversify drop or mask",
        ),
        ((*MOE, "--moe-gate", "hash", "--moe-z-loss-wt", "1"), "it needs a gate with a router"),
        ((*MOE, "--moe-gate", "base", "--moe-gate-loss-wt", "1"), "that is balanced by a loss"),
        ((*MOE, "--encoder-moe-freq", "1"), "--encoder-moe-freq 1 has no effect: it needs to be"),
        (
            ("--moe-freq", "1", "--moe-expert-count", "4", "--memory-ffn"),
            "--memory-ffn has no effect: it needs a layer that is no MoE layer",
        ),
        (
            (*DENSE, "--memory-attention", "--memory-delta", "1"),
            "--memory-delta 1 has no effect: it needs --memory-ffn",
        ),
        ((*DENSE, "--memory-ffn", "--memory-out-proj", "dense"), "it needs --memory-attention"),
        (
            (*MOE, "--moe-expert-type", "memory", "--memory-layers", "0"),
            "--memory-layers 0 has no effect: it needs --memory-ffn or --memory-attention",
        ),
        (
            (*DENSE, "--memory-ffn", "--memory-score", "l1", "--memory-temperature", "2"),
            "it needs --memory-score prob or abs_prob",
        ),
    ],
)
def test_a_flag_without_effect_is_said(toy, caplog, flags, line):
    """The line names the flag with its value, and what it needs; it is the only such line."""
    (found,) = said(toy, caplog, *flags)
    assert line in found


@pytest.mark.parametrize(
    "flags",
    [
        DENSE,
        (*MOE, *SPAWN, "--evo-diversify", "noise", "--evo-diversify-noise", "1"),
        (*SWITCH, *SPAWN, "--evo-diversify", "copy", "--moe-gate-loss-wt", "0.1"),
        (*MOE, "--dts-anneal-updates", "9", "--dts-temperature-end", "0.5"),
        (*MOE, "--moe-gate", "stable", "--stable-freeze-update", "9"),
        (*MOE, "--moe-gate", "hash", "--moe-gate-loss-wt", "0"),
        ("--moe-freq", "0", "--encoder-moe-freq", "1", "--moe-expert-count", "4"),
        (*DENSE, "--memory-ffn", "--memory-delta", "1", "--memory-bits", "4"),
        (*MOE, "--moe-expert-type", "memory", "--memory-bits", "4", "--memory-delta", "1"),
    ],
)
def test_nothing_is_said_of_flags_that_act(toy, caplog, flags):
    """Flags with an effect, and flags at their defaults, raise no false alarm."""
    assert said(toy, caplog, *flags) == []


@pytest.mark.parametrize("family", ["lm", "mlm"])
def test_defaults_of_other_families_are_silent(toy, caplog, family):
    assert said(toy, caplog, family=family) == []
    assert said(toy, caplog, *DENSE, family=family) == []


def test_every_flag_has_a_rule():
    """A new flag of model or task cannot be forgotten: a rule, or a gate's list, must name it."""
    from fairseq_evomoe.modules.gates import GATES

    ruled = {name for rule in unused.RULES for name in rule.flags}
    ruled |= {f[2:].replace("-", "_") for gate in GATES.values() for f in gate.flags}
    # these make the layers or tables, or are refused in training; memory attention and
    # --expert-parallel always act, or say so
    ruled |= {"moe_freq", "moe_expert_count", "expert_parallel_size", "memory_ngram"}
    ruled |= {"output_storage"}
    for config in (MoEConfig, MemoryConfig, EvolutionConfig):
        for name, field in config.__dataclass_fields__.items():
            if name != "_name" and not str(field.default).startswith("${"):
                assert name in ruled, name


def test_memory_layers_beyond_the_last_are_refused(toy):
    """A number beyond the layers would leave them dense without a word."""
    with pytest.raises(ValueError, match="--memory-layers 0,7: there are 2 encoder layers"):
        build(toy, *DENSE, "--memory-ffn", "--memory-layers", "0,7")


def test_fp16_on_a_cpu(toy, caplog):
    """Flattened masters are refused with the flag to use; without them a warning is given."""
    with pytest.raises(ValueError, match="on a CPU give --amp or --bf16 instead, or add"):
        build(toy, *DENSE, "--cpu", "--fp16")
    build(toy, *DENSE, "--cpu", "--fp16", "--fp16-no-flatten-grads")
    assert "CPUs have no fast fp16 products" in caplog.text
