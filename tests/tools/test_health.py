"""tools/health.py: what the log says about a training, in words."""

import math

import pytest

from fairseq_evomoe.compat.loggers import DETAIL
from fairseq_evomoe.tools.health import health, summary
from fairseq_evomoe.tools.run_log import RunLog


def run(
    *,
    updates=60,
    spawn=20,
    hard=40,
    loss=None,
    shares=None,
    entropy=0.7,
    rerouted=(0.5, 0.1),
    **more,
):
    """The log of a run with one layer of 4 experts; by default nothing is wrong with it."""
    rows = []
    for n in range(1, updates + 1):
        stage = 0 if n <= spawn else 1 if n <= hard else 2
        row = {"num_updates": n, "loss": 5 - n / 30, "gnorm": 1.0, "moe_stage": stage}
        row |= {"ups": (4, 2, 5)[stage], "moe_temperature": 0.3, "moe_active_experts": 1.0}
        row |= {k: v for k, v in more.items() if n == updates or k != "gnorm"}
        if stage:
            row |= {"moe_load_max_mean": 1.2, "moe_gate_entropy": entropy}
            for e, share in enumerate((shares or (lambda n: (0.25,) * 4))(n)):
                row[f"{DETAIL}decoder.1/e{e}"] = share
        if loss:
            row["loss"] = loss(n)
        rows.append(row | {k: v for k, v in more.items() if k == "moe_load_max_mean" and stage})
    valid = [{"num_updates": n, "loss": 5 - n / 30} for n in (20, 40, 60)]
    for row, share in zip(valid[1:], rerouted, strict=True):
        row["moe_rerouted"] = share
    return RunLog("run", train=rows, valid=valid)


def found(log):
    return {f.question: f for f in health(log)}


def test_a_healthy_run_has_nothing_that_stands_out():
    """Every question has its answer with a figure; stages have their times."""
    findings = health(run())
    assert {f.verdict for f in findings} == {"good"}
    assert summary(findings) == "Nothing stands out."
    said = {f.question: f.answer for f in findings}
    assert said["Stage"].startswith("hard at update 60, temperature 0.3")
    assert said["Time per update"] == "diversify 250 ms, sparsify 500 ms, hard 200 ms"
    assert "2.50 times" in findings[-1].threshold
    assert set(said) == {
        *(
            "Numbers",
            "Stage",
            "Experts",
            "Balance",
            "Drift",
            "Router",
            "Flapping",
            "Split",
            "Hard switch",
        ),
        *("Over-fitting", "Time per update"),
    }


@pytest.mark.parametrize(
    "question, verdict, changes, words",
    [
        ("Numbers", "bad", {"loss": lambda n: math.nan if n == 7 else 4.0}, "first at update 7"),
        ("Numbers", "look", {"gnorm": math.inf}, "first at update 60"),
        ("Experts", "bad", {"shares": lambda n: (0.5, 0.3, 0.19, 0.01)}, "1 of 4"),
        ("Experts", "look", {"shares": lambda n: (0.4, 0.3, 0.25, 0.05)}, "1 less than 25%"),
        ("Balance", "look", {"moe_load_max_mean": 2.5}, "2.50 times"),
        ("Balance", "bad", {"moe_load_max_mean": 4.5}, "4.50 times"),
        (
            "Drift",
            "look",
            {"shares": lambda n: (0.25,) * 4 if n < 51 else (0.4, 0.1, 0.25, 0.25)},
            "15.0%",
        ),
        ("Router", "look", {"entropy": 0.001}, "certain"),
        ("Router", "look", {"entropy": math.log(4)}, "hardly"),
        ("Flapping", "look", {"rerouted": (0.6, 0.4)}, "40.0%"),
        ("Flapping", "bad", {"rerouted": (0.5, 0.6)}, "60.0%"),
        ("Split", "look", {"loss": lambda n: 4.4 if 20 < n < 30 else 4.0}, "after 10 updates"),
        ("Split", "bad", {"loss": lambda n: 6.0 if 20 < n < 30 else 4.0}, "50.0%"),
        ("Hard switch", "look", {"loss": lambda n: 4.0 if n <= 40 else 4.1}, "not yet"),
    ],
)
def test_what_is_wrong_is_said(question, verdict, changes, words):
    """With the verdict, the figure, and in the sentence at the top."""
    log = run(**changes)
    finding = found(log)[question]
    assert finding.verdict == verdict and words in finding.answer
    assert question.lower() in summary(health(log))


def test_over_fitting_is_seen_in_validation():
    """The last loss is compared with the best."""
    log = run()
    log.valid[-1]["loss"] = log.valid[1]["loss"] * 1.03
    finding = found(log)["Over-fitting"]
    assert (
        finding.verdict == "look"
        and "3.0% above its best, which was at update 40" in finding.answer
    )


def test_a_dense_run_is_asked_less():
    """Nothing is said of experts that do not exist."""
    rows = [{"num_updates": n, "loss": 4.0, "gnorm": 1.0} for n in range(1, 9)]
    assert [f.question for f in health(RunLog("dense", train=rows))] == ["Numbers"]
