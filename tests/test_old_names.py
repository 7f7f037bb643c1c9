"""old_names.py: flags and values of version 0.1.0 still work on the command line and say so."""

import pytest
from conftest import build

from fairseq_evomoe.modules.moe_layer import moe_layers


@pytest.mark.parametrize(
    "flags, field, value, message",
    [
        (
            ("--memory-bits", 4, "--expert-type", "memory"),
            *("moe_expert_type", "memory"),
            "--expert-type is the old name of --moe-expert-type",
        ),
        (
            ("--moe-gate", "stable", "--moe-distill-dim", 7),
            *("stable_distill_dim", 7),
            "--moe-distill-dim is the old name of --stable-distill-dim",
        ),
        (("--moe-capacity-factor", 0), "moe_capacity_factor", None, "--moe-capacity-factor 0.0"),
        (
            (
                "--moe-gate",
                "expert_choice",
                "--moe-freq",
                0,
                "--encoder-moe-freq",
                1,
                "--moe-capacity-factor",
                2,
            ),
            *("moe_choice_experts", 2.0),
            "is --moe-choice-experts today",
        ),
        (("--dts-max-experts", 0), "dts_max_experts", None, "--dts-max-experts 0"),
        (("--moe-expert-ffn-dim", 0), "moe_expert_ffn_dim", None, "--moe-expert-ffn-dim 0"),
    ],
    ids=str,
)
def test_old_flags_of_the_model(toy, caplog, flags, field, value, message):
    """An old name, or an old value that meant automatic, has today's meaning and a warning."""
    with caplog.at_level("WARNING"):
        _, _, model = build(toy, *flags)
    (_, layer), *_ = moe_layers(model)
    assert getattr(layer.cfg, field) == value
    assert message in caplog.text


def test_old_flags_of_the_task_and_the_criterion(toy, caplog):
    """-1 is the automatic update, 0 never comes, and a loss weight keeps its value."""
    with caplog.at_level("WARNING"):
        cfg, _task, model = build(
            toy,
            *("--evo-spawn-update", -1, "--dts-hard-update", 0, "--max-update", 40),
            *("--moe-distill-loss-wt", 0.7),
        )
    (_, layer), *_ = moe_layers(model)
    assert layer.timeline.schedule.spawn == 2 and layer.timeline.schedule.hard > 10**6
    assert cfg.criterion.stable_distill_loss_wt == 0.7
    for said in (
        "--evo-spawn-update -1",
        "--dts-hard-update 0: this value of version 0.1.0 meant never",
        "--moe-distill-loss-wt is the old name of --stable-distill-loss-wt",
    ):
        assert said in caplog.text


def test_names_of_today_are_not_warned_of(toy, caplog):
    """A command line of today logs nothing about version 0.1.0."""
    with caplog.at_level("WARNING"):
        build(toy, "--moe-expert-type", "ffn", "--stable-distill-dim", 7, "--dts-hard-update", 25)
    assert "0.1.0" not in caplog.text and "old name" not in caplog.text
