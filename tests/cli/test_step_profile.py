"""benchmarks/speed/step_profile.py: the parts of an update are found and add up to it."""

import csv
import itertools
import sys

import pytest

from benchmarks.speed import step_profile

OF_ALL = {"data", "embedding", "attention", "norms and residuals", "loss", "optimizer", "fairseq"}
OWN = {
    "stock": {"FFN"},
    "dense": {"FFN"},
    "switch": {"FFN", "gate", "experts", "dispatch"},
    "n-grams": {"FFN", "n-grams"},
    "memoryformer": {"look-ups"},
}


@pytest.fixture(scope="module")
def rows(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("profile") / "rows.csv"
    cases = [case for case in OWN if case != "stock"]
    sizes = ("--width", "32", "--layers", "2", "--max-tokens", "60", "--batches", "1")
    before = sys.argv
    sys.argv = [
        *("step_profile", "--task", "translation", "--data", str(toy / "bin")),
        *("--rounds", "2", "--csv", str(out), *sizes, "--cases", *cases),
    ]
    try:
        step_profile.main()
    finally:
        sys.argv = before
    with out.open(encoding="utf-8") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("case", OWN)
def test_every_part_is_found(rows, case):
    """A model has the parts that it consists of, in both passes, and no others."""
    mine = {r["part"]: r for r in rows if r["case"] == case}
    assert {part for part, r in mine.items() if float(r["ms"]) > 0} == OF_ALL | OWN[case]
    assert sum(float(r["share_of_update"]) for r in mine.values()) == pytest.approx(1, abs=0.01)


def test_parts_within_parts():
    """An inner part's time is not the outer's; a part without an end ends with the next one."""
    # every interval is known by its length
    seconds = itertools.count()
    clock = step_profile.Clock(lambda: 2 ** next(seconds))
    clock.enter("outer")
    clock.enter("inner")
    clock.leave("inner")
    clock.enter("open", ends=False)
    clock.enter("inner")
    clock.leave("inner")
    clock.leave("outer")
    assert clock.read() == {"fairseq": 1 + 128, "outer": 2 + 8 + 64, "inner": 4 + 32, "open": 16}
    assert clock.read() == {"fairseq": 256}
