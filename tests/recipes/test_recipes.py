"""recipes: the grammar's promises, text preparation, scoring, and the quickstart end to end."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, run

from recipes.quickstart import grammar

sys.path.insert(0, str(ROOT / "recipes"))
import prepare_text  # noqa: E402
import score  # noqa: E402


@pytest.fixture(scope="module")
def corpus():
    return grammar.corpus(train=3000, valid=100, test=200, seed=3)


def test_corpus_splits_share_no_sentence(corpus):
    """Thousands of distinct sentences; valid and both tests never occur in train."""
    seen = [p.en for pairs in corpus.values() for p in pairs]
    assert len(seen) == len(set(seen)) == 3500
    assert {k: len(v) for k, v in corpus.items()} == {
        **{"train": 3000, "valid": 100, "test": 200, "test_comp": 200}
    }


def test_held_out_combinations_occur_in_test_comp_alone(corpus):
    """Every test_comp sentence needs an unseen combination; no other sentence has one."""
    for split, pairs in corpus.items():
        assert all(p.held_out == (split == "test_comp") for p in pairs)
    words = lambda split: {w for p in corpus[split] for w in p.de.lower().strip(".?").split()}
    assert "einunddreißig" not in words("train") and "einunddreißig" in words("test_comp")


def test_corpus_is_reproducible():
    """Same seed, same text; another seed, another."""
    make = lambda seed: [
        p.en for p in grammar.corpus(train=50, valid=5, test=5, seed=seed)["train"]
    ]
    assert make(1) == make(1) != make(2)


def test_every_phenomenon_occurs(corpus):
    """Each tag marks at least 2 % of the test sentences."""
    count = {}
    for p in corpus["test"]:
        for tag in p.tags:
            count[tag] = count.get(tag, 0) + 1
    assert set(count) == {
        *("agreement", "bracket", "choice", "compound"),
        *("final", "inversion", "number", "separable"),
    }
    assert min(count.values()) >= 4


@pytest.mark.parametrize(
    "n, words",
    [
        (2, ("two", "zwei")),
        (16, ("sixteen", "sechzehn")),
        (21, ("twenty-one", "einundzwanzig")),
        (70, ("seventy", "siebzig")),
        (99, ("ninety-nine", "neunundneunzig")),
    ],
)
def test_numbers(n, words):
    assert grammar.number_words(n) == words


def test_german_word_order():
    """Verb second, verb final and the separable prefix, in sentences made to order."""
    speaker = grammar.Speaker(__import__("random").Random(1))
    verb = next(v for v in grammar.VERBS if v.en == "invite")
    guest = grammar.Phrase("a guest", "einen Gast", False, grammar.NOUNS[0])
    speaker.predicate = lambda: (verb, guest, None)
    speaker.subject = lambda: grammar.Phrase("Anna", "Anna")
    speaker.chance = lambda p: False
    clause = speaker.clause("present")
    assert clause.en == "Anna invites a guest"
    assert clause.main == "Anna lädt einen Gast ein"
    assert clause.subordinate == "Anna einen Gast einlädt"
    assert speaker.clause("past").main == "Anna hat einen Gast eingeladen"
    assert speaker.clause("future").subordinate == "Anna einen Gast einladen wird"


def test_cleaning_counts_what_it_drops():
    """Empty, repeated, untranslated and test pairs go; the rest stays in order."""
    pairs = [
        *(("a b", "c d"), ("", "x"), ("a b", "c d"), ("in test", "im test")),
        *(("one two three four", "one two three four"), ("Tom", "Tom")),
    ]
    kept, dropped = prepare_text.clean(pairs, [("in test", "im test")])
    assert kept == [("a b", "c d"), ("Tom", "Tom")]
    assert dropped == {"empty": 1, "repeated": 1, "in a test set": 1, "source equals target": 1}


def test_unequal_files_are_refused(tmp_path):
    """Two sides of different length would shift every pair: an error with both counts."""
    (tmp_path / "t.en").write_text("a\nb\n")
    (tmp_path / "t.de").write_text("a\n")
    with pytest.raises(SystemExit, match="2 en lines but 1 de lines"):
        prepare_text.read_pairs(str(tmp_path / "t"), "en", "de")
    with pytest.raises(SystemExit, match="no such file"):
        prepare_text.read_pairs(str(tmp_path / "u"), "en", "de")


def test_score_refuses_lost_sentences(tmp_path):
    """A hypothesis file with a line too few gives no score."""
    for name, lines in (("s", 3), ("r", 3), ("h", 2)):
        (tmp_path / name).write_text("word\n" * lines)
    command = [sys.executable, ROOT / "recipes/score.py", "--source", tmp_path / "s"]
    command += ["--reference", tmp_path / "r", "--hypothesis", tmp_path / "h"]
    assert "sentences were lost" in run(*command, ok=False)
    (tmp_path / "h").write_text("word\n" * 3)
    out = run(*command, "--json", tmp_path / "o")
    result = json.loads((tmp_path / "o").read_text())
    assert "nrefs:1" in out and result["exact"] == 100 and result["lines"] == 3


def test_frequency_baseline():
    """Each word becomes the target word that goes with it most exclusively."""
    table = score.frequency_table(
        ["the dog", "the cat", "a dog"], ["der Hund", "der Kater", "ein Hund"]
    )
    assert score.word_by_word(["the dog runs"], table) == ["der Hund runs"]


def recipe(name, *args, cwd=ROOT):
    """Run a recipe in this environment: set-up sees it as up to date."""
    home = sys.prefix
    wanted = subprocess.run(
        ["bash", "-c", "cat setup.py constraints.txt | cksum"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.strip()
    stamp = f"{home}/.evomoe-plots"
    with open(stamp, "w") as f:
        f.write(wanted + "\n")
    return run("bash", ROOT / f"recipes/{name}/run.sh", *args, cwd=cwd, env={"EVOMOE_VENV": home})


def test_quickstart(tmp_path):
    """The whole path at a small size: corpus, model through three stages, BLEU, picture."""
    out = recipe("quickstart", "--updates", 24, "--out", tmp_path / "q", cwd=tmp_path)
    scores = [json.loads(x) for x in (tmp_path / "q/scores.jsonl").read_text().splitlines()]
    assert [s["name"] for s in scores] == ["test", "test_comp"]
    assert all(s["lines"] == 500 and s["bleu_frequency"] > 10 > s["bleu_copy"] for s in scores)
    assert "nrefs:1|case:mixed" in out
    assert (tmp_path / "q/evolution.png").read_bytes()[:4] == b"\x89PNG"


def test_quickstart_on_own_files(tmp_path):
    """--data with other language names and one's own plain text."""
    data = tmp_path / "data"
    data.mkdir()
    for split, pairs in grammar.corpus(train=300, valid=20, test=21, seed=8).items():
        for side, lang in ((0, "yy"), (1, "xx")):
            text = "".join(p[side] + "\n" for p in pairs)
            (data / f"{split}.{lang}").write_text(text, encoding="utf-8")
    recipe(
        *("quickstart", "--data", data, "--source-lang", "xx", "--target-lang", "yy"),
        *("--updates", 20, "--vocab", 300, "--out", tmp_path / "q"),
    )
    (result,) = map(json.loads, (tmp_path / "q/scores.jsonl").read_text().splitlines())
    assert result["lines"] == 21


@pytest.mark.parametrize("model", ["dense", "evomoe"])
def test_multi30k_on_local_files(tmp_path, model):
    """Both models from one script, on local files in the place of the download."""
    data = tmp_path / "data"
    data.mkdir()
    splits = grammar.corpus(train=300, valid=20, test=21, seed=8)
    names = {"train": "train", "valid": "valid", "test": "test2016", "test_comp": "test2017"}
    for split, name in names.items():
        for side, lang in ((0, "en"), (1, "de")):
            text = "".join(p[side] + "\n" for p in splits[split])
            (data / f"{name}.{lang}").write_text(text, encoding="utf-8")
    out = recipe(
        *("multi30k", "--data", data, "--model", model, "--updates", 20, "--out", tmp_path / "m"),
        *("--", "--max-tokens", 600, "--log-interval", 5),
    )
    assert out.count("nrefs:1|case:mixed") == 2
    names = [json.loads(x)["name"] for x in (tmp_path / "m/scores.jsonl").read_text().splitlines()]
    assert names == [f"{model}-20-seed1 test2016", f"{model}-20-seed1 test2017"]


def test_recipes_refuse_unknown_options():
    """A mistyped option stops with the usage, before any set-up."""
    out = run("bash", ROOT / "recipes/quickstart/run.sh", "--bogus", "1", ok=False)
    assert "unknown option: --bogus" in out and "--source-lang" in out
