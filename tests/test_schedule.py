"""schedule.py: stages and temperatures as pure functions of the number of updates."""

import pytest

from fairseq_evomoe.schedule import SHAPES, EvolutionSchedule, Stage, resolve

FLAGS = dict(spawn=10, anneal=20, hard=-1, start=2.0, end=0.5, shape="linear", max_update=100)


def test_stages_follow_each_other():
    """Diversify below spawn, sparsify from it, hard from `hard` on; without `hard`, never."""
    schedule = EvolutionSchedule(spawn=10, anneal=20, hard=35)
    stages = [schedule.stage(n) for n in (0, 9, 10, 34, 35, 1000)]
    assert stages == [0, 0, 1, 1, 2, 2]
    assert EvolutionSchedule(spawn=10).stage(10**9) == Stage.SPARSIFY


@pytest.mark.parametrize("shape", SHAPES)
def test_temperature_falls_from_start_to_end(shape):
    """Exact at both ends, constant outside, never rising in between."""
    schedule = EvolutionSchedule(spawn=10, anneal=20, start=2.0, end=0.5, shape=shape)
    values = [schedule.temperature(n) for n in range(50)]
    assert values[:11] == [2.0] * 11 and values[30:] == [0.5] * 20
    assert all(a > b for a, b in zip(values[10:30], values[11:31], strict=True))
    assert schedule.warmth(10) == 1 and schedule.warmth(30) == 0


def test_temperature_shapes():
    """The middle of each shape: arithmetic mean, geometric mean, and cosine's quarter point."""
    at = lambda shape, n: EvolutionSchedule(0, 8, None, 2.0, 0.5, shape).temperature(n)
    assert at("linear", 4) == pytest.approx(1.25)
    assert at("exponential", 4) == pytest.approx(1.0)
    assert at("cosine", 2) == pytest.approx(0.5 + 1.5 * (1 + 0.5**0.5) / 2)


def test_constant_temperature_has_no_warmth_left_after_annealing():
    schedule = EvolutionSchedule(spawn=2, anneal=4, start=1.0, end=1.0)
    assert [schedule.warmth(n) for n in (0, 5, 6)] == [1, 1, 0]


def test_automatic_values_follow_max_update():
    """-1 means a twentieth of --max-update, a tenth of it, and the end of annealing."""
    schedule = resolve(**{**FLAGS, "spawn": -1, "anneal": -1, "max_update": 1000})
    assert (schedule.spawn, schedule.anneal, schedule.hard) == (50, 100, 150)
    assert resolve(**{**FLAGS, "hard": 0}).hard is None
    assert resolve(**{**FLAGS, "hard": 50}).hard == 50


@pytest.mark.parametrize(
    "change, flag",
    [
        (dict(spawn=-1, max_update=0), "--evo-spawn-update"),
        (dict(anneal=-1, max_update=0), "--dts-anneal-updates"),
        (dict(spawn=-2), "--evo-spawn-update"),
        (dict(anneal=-7), "--dts-anneal-updates"),
        (dict(spawn=100), "--evo-spawn-update"),
        (dict(hard=5), "--dts-hard-update"),
        (dict(hard=-3), "--dts-hard-update"),
        (dict(start=0.0), "--dts-temperature-start"),
        (dict(end=-1.0), "--dts-temperature-end"),
        (dict(end=float("nan")), "--dts-temperature-end"),
        (dict(start=float("inf")), "--dts-temperature-start"),
        (dict(end=3.0), "--dts-temperature-end"),
        (dict(shape="cliff"), "--dts-temperature-schedule"),
    ],
    ids=str,
)
def test_bad_flags_name_themselves(change, flag):
    """Each impossible value is refused with the flag's name in the message."""
    with pytest.raises(ValueError, match=flag):
        resolve(**{**FLAGS, **change})
