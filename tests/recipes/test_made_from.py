"""recipes/steps/made_from.py: a work folder knows what it was made from."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "recipes/steps"))
import made_from


@pytest.fixture
def work(tmp_path, monkeypatch, capsys):
    """Return a function that runs the step on a folder with one data file and one result."""
    (tmp_path / "train.en").write_text("one\n")

    def step(*values, part="data", remake=False, flags=()):
        command = ["made_from", "--work", tmp_path, "--part", part, "--values", *values]
        command += ["--files", f"train.en={tmp_path / 'train.en'}", "--versions", "torch"]
        command += ["--results", tmp_path / "bin", tmp_path / "gone", *["--remake"] * remake]
        monkeypatch.setattr(
            sys, "argv", [*map(str, command), *(("--flags", *flags) if flags else ())]
        )
        try:
            made_from.main()
        except SystemExit as end:
            return str(end.code)
        return capsys.readouterr()

    step.folder = tmp_path
    return step


def result(work):
    (work.folder / "bin").mkdir(exist_ok=True)
    (work.folder / "bin/x").write_text("made")


def test_the_same_again_is_silent(work):
    """Equal values, files and flags let the recipe go on, also when the file was only touched."""
    assert work("vocab=10").out == ""
    result(work)
    (work.folder / "train.en").touch()
    assert work("vocab=10") == ("", "")
    assert (work.folder / "bin/x").exists()


def test_a_difference_stops_and_is_named(work):
    """Values, contents and flags are compared; all differences are listed, and nothing is lost."""
    work("vocab=10", "seed=1", flags=("--lr", "5e-3", "--fp16"))
    result(work)
    (work.folder / "train.en").write_text("two\n")
    said = work("vocab=20", "seed=1", flags=("--lr", "3e-3"))
    assert "vocab: 10 -> 20" in said and "--lr: 5e-3 -> 3e-3" in said and "seed" not in said
    assert "--fp16: on -> not given" in said and "train.en: other contents (sha256 " in said
    assert "--out" in said and "--remake" in said and f"{work.folder}/bin" in said
    assert "gone" not in said
    assert (work.folder / "bin/x").exists()
    assert "vocab: 10 -> 20" in work("vocab=20", "seed=1"), "a refusal changes no record"


def test_remake_deletes_what_depends_on_it(work):
    """--remake deletes the results of the part, and the folder then knows the new origin."""
    work("vocab=10")
    result(work)
    assert "deletes" in work("vocab=20", remake=True).out
    assert not (work.folder / "bin").exists()
    result(work)
    assert work("vocab=20").out == ""
    assert work("vocab=20", remake=True).out == "" and (work.folder / "bin/x").exists()


def test_results_of_unknown_origin(work):
    """Results without a record are not used, since nothing tells what they were made from."""
    result(work)
    assert "nothing is known of how its results were made" in work("vocab=10")


def test_parts_are_kept_apart(work):
    """Another part has its own record; nothing is refused while it has no result."""
    work("vocab=10")
    result(work)
    assert "nothing is known" in work("vocab=10", part="model")
    assert set(json.loads((work.folder / "made_from.json").read_text())) == {"data"}


def test_versions_are_reported(work, monkeypatch):
    """Another version of a package is said and does not stop the recipe."""
    work("vocab=10")
    result(work)
    monkeypatch.setattr(made_from, "version", lambda package: "99")
    assert "made with torch" in work("vocab=10").err
