"""recipes/wikitext103, openwebtext: causal and masked models on archives or text, fine-tuning."""

import json
import sys
import zipfile

import pytest
from conftest import ROOT, run
from recipe_kit import recipe

from recipes.quickstart import grammar

sys.path.insert(0, str(ROOT / "recipes/steps"))
import classes


@pytest.fixture(scope="module")
def texts():
    """split -> text with an empty line after every fifth sentence, as in running text."""
    made = grammar.corpus(train=600, valid=40, test=41, seed=5)
    return {
        split: "".join(p.en + ("\n\n" if i % 5 == 4 else "\n") for i, p in enumerate(made[split]))
        for split in ("train", "valid", "test")
    }


def scores(folder):
    return [json.loads(x) for x in (folder / "scores.jsonl").read_text().splitlines()]


def test_causal_model_from_the_archive(texts, tmp_path):
    """From a local copy of the published zip, the recipe trains and reports perplexity per word."""
    (tmp_path / "mirror").mkdir()
    with zipfile.ZipFile(tmp_path / "mirror/wikitext-103-raw-v1.zip", "w") as z:
        for split, text in texts.items():
            z.writestr(f"wikitext-103-raw/wiki.{split}.raw", text)
    flags = ("--task", "lm", "--size", "tiny", "--vocab", 400, "--updates", 12)
    out = recipe("wikitext103", *flags, "--data", tmp_path / "mirror", "--out", tmp_path / "w")
    (score,) = scores(tmp_path / "w")
    # the words count, and so does the end of every line, also of an empty one
    assert score["words"] == len(texts["test"].split()) + texts["test"].count("\n")
    bits = score["bits"] * score["tokens"] / score["words"]
    assert score["word_perplexity"] == pytest.approx(2**bits, rel=1e-3)
    assert "perplexity" in out
    again = recipe("wikitext103", *flags, "--data", tmp_path / "mirror", "--out", tmp_path / "w")
    assert "train lm" not in again and len(scores(tmp_path / "w")) == 2


def test_masked_model_and_classes(texts, tmp_path):
    """A MemoryFormer trains on plain text and is fine-tuned on sentence pairs in GLUE's columns."""
    data, glue = tmp_path / "data", tmp_path / "RTE"
    data.mkdir(), glue.mkdir()
    for split, text in texts.items():
        (data / f"{split}.txt").write_text(text, encoding="utf-8")
    lines = [x for x in texts["train"].splitlines() if x]
    for name, rows in (("train", range(64)), ("dev", range(64, 96))):
        table = ["index\tsentence1\tsentence2\tlabel"]
        table += [f"{i}\t{lines[i]}\t{lines[i + i % 2]}\t{'no' if i % 2 else 'yes'}" for i in rows]
        (glue / f"{name}.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    out = recipe(
        *("wikitext103", "--task", "mlm", "--model", "memoryformer", "--data", data),
        *("--size", "tiny", "--vocab", 400, "--updates", 12, "--out", tmp_path / "w"),
        *("--classes", glue, "--text", "sentence1 sentence2"),
    )
    masked, tuned = scores(tmp_path / "w")
    assert masked["bits"] > 1 and "bits a masked piece" in out
    assert tuned["epochs"] == 10 and 40 <= tuned["accuracy"] <= 100
    assert (tmp_path / "w/classes-RTE/input1/dict.txt").exists()


def test_documents_become_text(texts, tmp_path):
    """Documents that `datasets` loads are split into three sets, on which the recipe trains."""
    folder = tmp_path / "documents"
    folder.mkdir()
    found = [x for x in texts["train"].split("\n\n") if x]
    rows = [json.dumps({"text": x.replace("\n", "\n\n \n")}) for x in found]
    (folder / "part.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    command = [sys.executable, ROOT / "recipes/steps/documents.py", "--dataset", folder]
    home = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    run(*command, "--out", tmp_path / "out", "--every", 10, env=home)
    read = lambda split: (tmp_path / f"out/{split}.txt").read_text(encoding="utf-8")
    assert read("valid").split("\n\n")[:-1] == found[::10]
    assert read("test").split("\n\n")[:-1] == found[1::10]
    assert sum(read(s).count("\n\n") for s in ("train", "valid", "test")) == len(found)
    said = run(*command, "--out", tmp_path / "o", "--column", "body", env=home, ok=False)
    assert "no column body; it has text" in said
    said = run(*command, "--out", tmp_path / "o", "--every", 10**6, env=home)
    assert "train: 118 documents" in said
    sizes = ("--size", "tiny", "--vocab", 400, "--updates", 6, "--task", "lm")
    command = ("openwebtext", *sizes, "--data", tmp_path / "out", "--out", tmp_path / "w")
    said = recipe(*command, "--devices", 2)
    assert "perplexity" in said
    log = (tmp_path / "w/lm-evomoe-tiny-6-seed1/train.log").read_text()
    assert "training on 2 devices" in log
    said = recipe(*command, "--updates", 8, "--resume")
    assert "goes on from" in said and "perplexity" in said


def test_columns_that_are_not_there(tmp_path):
    """The error names the column and those that the file has."""
    (tmp_path / "train.tsv").write_text("sentence\tlabel\na\t1\n")
    with pytest.raises(SystemExit, match="no column text; it has sentence, label"):
        classes.table(tmp_path / "train.tsv", ["text"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("--task", "mt"), "choose lm or mlm"), (("--classes", "."), "fine-tunes --task mlm")],
)
def test_wrong_options_stop_at_once(flags, said):
    """A wrong option stops the recipe before any set-up."""
    out = run("bash", ROOT / "recipes/wikitext103/run.sh", *flags, ok=False, cwd=ROOT)
    assert said in out
