"""schedule.py: stages and temperatures as pure functions of the number of updates."""

import itertools

import pytest

from fairseq_evomoe.schedule import SHAPES, EvolutionSchedule, Stage, resolve_schedule

FLAGS = {
    "spawn": 10,
    "anneal": 20,
    "hard": None,
    "start": 2.0,
    "end": 0.5,
    "shape": "linear",
    "max_update": 100,
}


def test_stages_follow_each_other():
    """The stage is diversify before `spawn`, then sparsify, and hard from `hard` on if given."""
    schedule = EvolutionSchedule(spawn=10, anneal=20, hard=35)
    stages = [schedule.stage(n) for n in (0, 9, 10, 34, 35, 1000)]
    assert stages == [0, 0, 1, 1, 2, 2]
    assert EvolutionSchedule(spawn=10).stage(10**9) == Stage.SPARSIFY


@pytest.mark.parametrize("shape", SHAPES)
def test_temperature_falls_from_start_to_end(shape):
    """The temperature is exact at both ends, constant outside and strictly falling in between."""
    schedule = EvolutionSchedule(spawn=10, anneal=20, start=2.0, end=0.5, shape=shape)
    values = [schedule.temperature(n) for n in range(50)]
    assert values[:11] == [2.0] * 11 and values[30:] == [0.5] * 20
    assert all(a > b for a, b in itertools.pairwise(values[10:31]))
    assert schedule.anneal_left(10) == 1 and schedule.anneal_left(30) == 0


def test_temperature_shapes():
    """Linear and exponential pass halfway through the arithmetic and the geometric mean of both
    ends; cosine is checked a quarter of the way."""
    at = lambda shape, n: EvolutionSchedule(anneal=8, start=2.0, end=0.5, shape=shape).temperature(
        n
    )
    assert at("linear", 4) == pytest.approx(1.25)
    assert at("exponential", 4) == pytest.approx(1.0)
    assert at("cosine", 2) == pytest.approx(0.5 + 1.5 * (1 + 0.5**0.5) / 2)


def test_constant_temperature_has_nothing_left_after_annealing():
    schedule = EvolutionSchedule(spawn=2, anneal=4, start=1.0, end=1.0)
    assert [schedule.anneal_left(n) for n in (0, 5, 6)] == [1, 1, 0]


def test_automatic_values_follow_max_update():
    """Unset means a twentieth of --max-update (spawn), a tenth of it (anneal) or the end of
    annealing (hard); a gate without a hard stage never has one."""
    schedule = resolve_schedule(**{**FLAGS, "spawn": None, "anneal": None, "max_update": 1000})
    assert (schedule.spawn, schedule.anneal, schedule.hard) == (50, 100, 150)
    stable = {"anneal": 0, "hard": None, "hard_follows_anneal": False, "max_update": 1000}
    assert resolve_schedule(**{**FLAGS, **stable}).hard == FLAGS["spawn"] + 100
    assert resolve_schedule(**{**FLAGS, "hard": 50}, has_hard_stage=False).hard is None
    assert resolve_schedule(**{**FLAGS, "hard": 50}).hard == 50


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"spawn": None, "max_update": 0}, "--evo-spawn-update"),
        ({"anneal": None, "max_update": 0}, "--dts-anneal-updates"),
        ({"spawn": -2}, "--evo-spawn-update"),
        ({"anneal": -7}, "--dts-anneal-updates"),
        ({"spawn": 100}, "--evo-spawn-update"),
        ({"hard": 5}, "--dts-hard-update"),
        ({"hard": -3}, "--dts-hard-update"),
        ({"start": 0.0}, "--dts-temperature-start"),
        ({"end": -1.0}, "--dts-temperature-end"),
        ({"end": float("nan")}, "--dts-temperature-end"),
        ({"start": float("inf")}, "--dts-temperature-start"),
        ({"end": 3.0}, "--dts-temperature-end"),
        ({"shape": "cliff"}, "--dts-temperature-schedule"),
    ],
    ids=str,
)
def test_bad_flags_name_themselves(change, flag):
    """Each impossible value is refused with the flag's name in the message."""
    with pytest.raises(ValueError, match=flag):
        resolve_schedule(**{**FLAGS, **change})
