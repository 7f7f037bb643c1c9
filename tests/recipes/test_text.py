"""recipes/steps: what a line, text and a file are; scores that cannot lie."""

import ast
import bz2
import gzip
import importlib
import io
import json
import lzma
import sys
import tarfile
import unicodedata
import zipfile

import numpy as np
import pytest
import zstandard
from conftest import ROOT
from hypothesis import given, note, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

sys.path.insert(0, str(ROOT / "recipes/steps"))
import score
import text_files
import vocabulary

from fairseq_evomoe.tools.text import read_lines

STEPS = ROOT / "recipes/steps"


def step(name, *args, monkeypatch, capsys, code=None):
    """Run a step in this process; return what it printed, or why it stopped if `code` is given."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    module = importlib.import_module(name)
    if code is None:
        module.main()
        return capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code not in (0, None)
    assert "\n" not in str(end.value).strip(), "more than a line"
    return str(end.value)


@pytest.fixture
def do(monkeypatch, capsys):
    return lambda name, *args, code=None: step(
        name, *args, monkeypatch=monkeypatch, capsys=capsys, code=code
    )


TEXT = "eins\r\nzw\rei\nd\x0brei\u2028vier\x85\n\n\ufefffünf"
LINES = ["eins", "zw\rei", "d\x0brei\u2028vier\x85", "", "\ufefffünf"]
PACKED = {
    "": lambda b: b,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", PACKED)
def test_a_line_ends_at_a_line_feed(tmp_path, suffix, bom):
    """No other separator ends a line, whatever the file is packed in and whatever it is called."""
    data = bom + TEXT.encode()
    path = tmp_path / f"t{suffix}"
    path.write_bytes(PACKED[suffix](data))
    assert text_files.read(path) == LINES
    assert text_files.read(tmp_path / "t") == LINES, "the name without the suffix finds it as well"
    path.rename(tmp_path / "other")
    assert text_files.read(tmp_path / "other") == LINES
    twice = tmp_path / "twice"
    twice.write_bytes(2 * PACKED[suffix](b"one\ntwo\n"))
    assert text_files.read(twice) == ["one", "two"] * 2
    if not suffix:
        assert read_lines(tmp_path / "other") == LINES, "the tools' own reader agrees"


def test_members_of_archives(tmp_path):
    """Members are read from zip and tar, packed ones too; an archive itself is refused."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("in/t", TEXT)
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        data = lzma.compress(TEXT.encode())
        info = tarfile.TarInfo("in/t.xz")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    assert text_files.read(f"{tmp_path}/a.zip!in/t") == LINES
    assert text_files.read(f"{tmp_path}/a.tgz!in/t.xz") == LINES
    for name in ("a.zip", "a.tgz"):
        with pytest.raises(SystemExit, match="--train: .* is an archive; name the file in it"):
            text_files.read(tmp_path / name, "--train")
        with pytest.raises(SystemExit, match="a.* does not exist in its archive"):
            text_files.read(f"{tmp_path}/{name}!gone")


BAD = {
    "latin1": ("Grüße\n".encode("latin1"), "line 1, is not UTF-8 text"),
    "later": (b"good\n" * 70000 + b"\xff\n", "line 70001, is not UTF-8 text"),
    "utf16": ("Grüße\n".encode("utf-16"), "is UTF-16; convert it"),
    "utf16 without a mark": ("Haus\n".encode("utf-16-le"), "line 1, is not UTF-8 text"),
    "nul": (b"a\nb\0\n", "line 2, is not UTF-8 text"),
    "empty": (b"", "is empty"),
    "cut.gz": (gzip.compress(TEXT.encode() * 99)[:-9], "is cut or damaged"),
    "cut.xz": (lzma.compress(TEXT.encode() * 99)[:-9], "is cut or damaged"),
    "cut.bz2": (bz2.compress(TEXT.encode() * 99)[:-9], "is cut or damaged"),
    "cut.zst": (PACKED[".zst"](TEXT.encode() * 99)[:-9], "is cut or damaged"),
    "none.gz": (b"plain text\n", "is not a .gz file"),
    "empty.xz": (lzma.compress(b""), "is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_text_is_refused(tmp_path, name):
    """The message has one line and names the flag, the file and, for a wrong byte, the line."""
    data, said = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SystemExit) as end:
        text_files.read(tmp_path / name, "--valid")
    assert str(end.value).startswith(f"--valid: {tmp_path / name}")
    assert said in str(end.value) and "\n" not in str(end.value)
    if name in ("latin1", "empty"):
        with pytest.raises(ValueError, match=said):
            read_lines(tmp_path / name)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(SystemExit, match="--valid: .*/t does not exist"):
        text_files.read(tmp_path / "t", "--valid")
    with pytest.raises(SystemExit, match="--valid: .* is a folder, not a file"):
        text_files.read(tmp_path, "--valid")


def test_no_other_step_opens_text():
    """text_files.py is the only step that opens text files; others may open bytes."""
    for path in sorted(STEPS.glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or path.name == "text_files.py":
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            modes = [n.value for a in call.args for n in ast.walk(a) if isinstance(n, ast.Constant)]
            opens = name == "open" and not any("b" in str(m) for m in modes)
            where = f"{path.name}, line {call.lineno}"
            assert not opens and name not in ("read_text", "write_text", "TextIOWrapper"), where


SPELLING = {
    "Wör\u00adter": "Wörter",
    "\u0645\u06cc\u200c\u062e": "\u0645\u06cc\u200c\u062e",
    "न\u094d\u200dय": "न\u094d\u200dय",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467": "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f": "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "Auf\u200clage": "Auflage",
    "ន\u200bន": "ន\u200bន",
    "a\u2060b\ufeffc\u200ed": "abcd",
    "\u06dd\u0622\u064a": "\u06dd\u0622\u064a",
    "a\u2581b": "a b",
    "\U0001fae8": "\U0001fae8",
    "e\u00ad\u0301": "é",
}


@pytest.mark.parametrize("text", SPELLING)
def test_characters_that_belong_to_the_spelling_stay(text):
    """Joiners stay where a script needs them; soft hyphens go without leaving a space."""
    assert text_files.normalise(text) == SPELLING[text]


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """A sentencepiece model with byte fallback, learned on a little English."""
    out = tmp_path_factory.mktemp("spm")
    text = [f"the dog number {i} runs over the hill" for i in range(200)]
    return vocabulary.learn(out, text, size=320, sample=1000, byte_fallback=True)


@settings(max_examples=300, deadline=None, print_blob=True)
@given(
    # sentencepiece's table is newer than Python's, and maps characters that Python does not know
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)
    | st.sampled_from([*SPELLING, "<s> <unk> <0x41>", "<0x41>", "<0x", "▁"])
)
def test_what_goes_in_comes_out(processor, text):
    """normalise() is idempotent, and pieces of any normalised text spell that text again."""
    once = text_files.normalise(text)
    note(ascii(once))
    assert text_files.normalise(once) == once
    assert unicodedata.is_normalized("NFKC", once) and "\n" not in once
    pieces = processor.encode(once, out_type=str)
    assert processor.decode(" ".join(pieces).split(" ")) == once


@settings(max_examples=200, deadline=None, print_blob=True)
@given(
    st.lists(
        st.text(st.characters(exclude_characters="\n\0", exclude_categories=["Cs"]), max_size=20),
        min_size=1,
    ),
    st.booleans(),
)
def test_lines_survive_a_file(tmp_path_factory, rows, final):
    """Whatever is written as lines is read as those lines, apart from carriage returns at ends."""
    path = tmp_path_factory.mktemp("t") / "t"
    text = "\n".join(rows) + "\n" * final
    path.write_text(text, encoding="utf-8", newline="\n")
    wanted = [r.rstrip("\r") for r in rows]
    wanted[0] = wanted[0].removeprefix("\ufeff") if rows[0].startswith("\ufeff") else wanted[0]
    if not text:
        return
    if not final and not rows[-1]:
        wanted.pop()
    assert text_files.read(path) == wanted


def test_hypotheses_are_decoded_by_the_model(processor, tmp_path, do):
    """Byte pieces become the characters that they spell; a lost sentence is named."""
    texts = ["hi 😀", "", "the dög", "<0x41> runs"]
    rows = [
        f"H-{i}\t-0.5\t{' '.join(processor.encode(t, out_type=str))}" for i, t in enumerate(texts)
    ]
    generated = tmp_path / "gen"
    generated.write_text("\n".join(["noise", *rows[::-1]]) + "\n", encoding="utf-8")
    (tmp_path / "source").write_text("x\n" * 4)
    model = tmp_path / "spm.model"
    model.write_bytes(processor.serialized_model_proto())
    flags = ("--generated", generated, "--spm", model, "--lines", tmp_path / "source")
    do("hypotheses", *flags, "--out", tmp_path / "hyp")
    assert (tmp_path / "hyp").read_text(encoding="utf-8") == "\n".join(texts) + "\n"
    generated.write_text("\n".join(rows[:1] + rows[2:]) + "\n", encoding="utf-8")
    said = do("hypotheses", *flags, "--out", tmp_path / "hyp2", code=1)
    assert "3 translations for 4 lines" in said and "that of line 2" in said


def write(folder, **files):
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_text(text, encoding="utf-8", newline="\n")


def test_a_lone_carriage_return_is_not_a_line(tmp_path, do):
    write(tmp_path, r="a\rb\nc\n", h="x\ny\n")
    paths = ("--reference", tmp_path / "r", "--hypothesis", tmp_path / "h")
    assert "(2 lines)" in do("score", "--source", tmp_path / "h", *paths)


@pytest.mark.parametrize(
    "text", ["Hallo Welt.\nWie geht es dir heute?\n", "völlig falsch\nebenso\n"]
)
def test_equal_systems_have_p_1(tmp_path, do, text):
    """Also where both score 0. sacreBLEU itself says 0.001."""
    write(tmp_path, r="Hallo Welt.\nWie geht es dir heute?\n", h=text)
    files = ("--source", "--reference", "--hypothesis", "--baseline")
    names = ("r", "r", "h", "h")
    out = do("score", *(x for f, n in zip(files, names, strict=True) for x in (f, tmp_path / n)))
    assert out.count("p = 1.000") == 2


@pytest.fixture(scope="module")
def systems():
    """A reference and two systems that drop a word in some of the 200 lines."""
    rng = np.random.default_rng(3)
    words = [f"w{i}" for i in range(40)]
    reference = [" ".join(rng.choice(words, 12)) for _ in range(200)]
    hurt = lambda p: [
        " ".join(w for w in r.split() if rng.random() > p) if rng.random() < 0.5 else r
        for r in reference
    ]
    return reference, hurt(0.10), hurt(0.12)


def test_scores_against_sacrebleus_paired_test(systems):
    """The scores are sacreBLEU's own; its p-value is smaller than a two-sided one may be."""
    reference, one, two = systems
    metrics = {"BLEU": BLEU(references=[reference]), "chrF": CHRF(references=[reference])}
    test = PairedTest([("b", one), ("t", two)], metrics, None, test_type="bs", n_samples=1000)
    results = test()[1]
    ours = score.compare(two, one, reference)
    for name, (theirs, this) in zip(ours, list(results.values())[1:], strict=True):
        assert ours[name]["baseline"] == pytest.approx(theirs.score)
        assert ours[name]["this"] == pytest.approx(this.score)
        assert ours[name]["p"] > this.p_value


def test_p_value_against_a_bootstrap_of_its_own(systems):
    """An independent paired bootstrap, on n-gram counts made here, finds the same p-value."""
    reference, one, two = systems

    def counts(hypothesis):
        rows = []
        for h, r in zip(hypothesis, reference, strict=True):
            h, r, row = h.split(), r.split(), []
            for n in (1, 2, 3, 4):
                grams = lambda s, n=n: [tuple(s[i : i + n]) for i in range(len(s) - n + 1)]
                left, hit = grams(r), 0
                for g in grams(h):
                    if g in left:
                        left.remove(g)
                        hit += 1
                row += [hit, len(grams(h))]
            rows.append([*row, len(h), len(r)])
        return np.array(rows, float)

    def bleu(c):
        precision = np.log(c[..., 0:8:2] / c[..., 1:8:2]).mean(-1)
        return 100 * np.exp(precision + np.minimum(0, 1 - c[..., 9] / c[..., 8]))

    a, b = counts(one), counts(two)
    rng = np.random.default_rng(5)
    draws = rng.integers(0, len(reference), (4000, len(reference)))
    real = bleu(b.sum(0)) - bleu(a.sum(0))
    made = bleu(b[draws].sum(1)) - bleu(a[draws].sum(1))
    p = (np.abs(made - made.mean()) >= abs(real)).mean()
    low, high = np.quantile(made, (0.025, 0.975))
    found = score.compare(two, one, reference)["BLEU"]
    assert found["this"] == pytest.approx(float(bleu(b.sum(0))), abs=1e-6)
    assert 0.02 < p < 0.98
    # the standard error of a p-value of 1000 resamples is at most 0.016
    assert found["p"] == pytest.approx(p, abs=0.06)
    assert [found["low"], found["high"]] == pytest.approx([low, high], abs=0.15)


def test_scores_have_intervals(systems, tmp_path, do):
    """The interval of a score is in the line, and in the JSON."""
    reference, one, _ = systems
    write(tmp_path, r="\n".join(reference), h="\n".join(one))
    flags = ("--source", tmp_path / "r", "--reference", tmp_path / "r", "--hypothesis")
    out = do("score", *flags, tmp_path / "h", "--json", tmp_path / "o")
    row = json.loads((tmp_path / "o").read_text())
    low, high = row["bleu_interval"]
    exact = BLEU().corpus_score(one, [reference]).score
    assert low < exact < high and f"({low:.2f} to {high:.2f})" in out


@pytest.mark.parametrize("side", ["--source", "--reference", "--hypothesis"])
@pytest.mark.parametrize(
    ("data", "said"),
    [(None, "does not exist"), (b"", "is empty"), (b"a\n\xe4\n", "line 2, is not UTF-8")],
)
def test_scores_of_bad_files(tmp_path, do, side, data, said):
    write(tmp_path, good="a\nb\n")
    if data is not None:
        (tmp_path / "bad").write_bytes(data)
    flags = dict.fromkeys(("--source", "--reference", "--hypothesis"), tmp_path / "good")
    flags[side] = tmp_path / "bad"
    out = do("score", *(x for pair in flags.items() for x in pair), code=1)
    assert out.startswith(f"{side}: ") and said in out


def pairs(folder, n=60, **splits):
    """Write a little corpus; splits give lines in place of the usual ones."""
    usual = [f"number {i} runs over hill {i % 7}" for i in range(n)]
    for split in ("train", "valid", "test"):
        for side in ("en", "de"):
            rows = splits.get(f"{split}_{side}", usual if split == "train" else usual[:5])
            (folder / f"{split}.{side}").write_text("\n".join(rows) + "\n", encoding="utf-8")
    sets = {"--train": folder / "train", "--valid": folder / "valid", "--test": folder / "test"}
    languages = ("--source-lang", "en", "--target-lang", "de")
    return [*languages, "--out", folder / "out", *(x for pair in sets.items() for x in pair)]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_line_that_is_too_long_is_found_before_training(tmp_path, do, split):
    """The message names file and line; --long-lines cut keeps the number of lines."""
    long = ["short", "a b " * 300, "short"]
    flags = [*pairs(tmp_path, **{f"{split}_de": long, f"{split}_en": ["x y"] * 3}), "--vocab", 60]
    said = do("pieces", *flags, "--max-pieces", 99, code=1)
    assert said.startswith(f"--{split}: {tmp_path}/{split}.de, line 2, has 1,200 pieces")
    assert "the model takes 99" in said
    out = do("pieces", *flags, "--max-pieces", 99, "--long-lines", "cut")
    assert f"1 cut in {split}" in out
    rows = (tmp_path / f"out/{split}{0 if split == 'test' else ''}.de").read_text().split("\n")
    assert [len(r.split()) <= 99 for r in rows] == [True] * 4


def test_bad_vocabularies_and_texts(tmp_path, do):
    """Too few pieces, and text without a word, end in a line that names the flag."""
    flags = pairs(tmp_path)
    said = do("pieces", *flags, "--vocab", 10, code=1)
    assert "--vocab 10 is too small: the characters of this text need at least" in said
    blank = pairs(tmp_path, train_en=["", ""], train_de=["", ""])
    assert "empty lines only" in do("pieces", *blank, "--vocab", 100, code=1)
    write(tmp_path, t="some words\n", blank="\n\n")
    sets = ("--valid", tmp_path / "t", "--test", tmp_path / "t", "--out", tmp_path / "lm")
    language = lambda train, size: do(
        "language_text", "--vocab", size, "--train", tmp_path / train, *sets, code=1
    )
    assert "--vocab 10 is too small" in language("t", 10)
    assert "empty lines only" in language("blank", 500)
    assert "--train: " in language("gone", 500) and "does not exist" in language("gone", 500)


def test_packed_language_text_is_text(tmp_path, do):
    """.xz text is read as what it holds; once its bytes were the text."""
    text = "".join(f"the dog number {i} runs\n" for i in range(90))
    (tmp_path / "v.xz").write_bytes(lzma.compress(text.encode()))
    sets = [x for s in ("train", "valid", "test") for x in (f"--{s}", tmp_path / "v.xz")]
    do("language_text", "--out", tmp_path / "o", "--vocab", 300, *sets)
    model = vocabulary.learn(tmp_path / "o", [], size=0, sample=0, byte_fallback=True)
    found = [model.decode(r.split(" ")) for r in (tmp_path / "o/test").read_text().split("\n")]
    assert "\n".join(found) == text


def test_labels_with_spaces(tmp_path, do, processor, monkeypatch):
    """A label of two words is one class; what cannot be one is refused by file and line."""
    monkeypatch.setenv("PATH", f"{sys.prefix}/bin", prepend=":")
    (tmp_path / "spm.model").write_bytes(processor.serialized_model_proto())
    write(tmp_path, dict_txt="▁the 1\n")
    flags = ("--data", tmp_path, "--spm", tmp_path / "spm.model", "--dict", tmp_path / "dict.txt")
    table = "sentence\tlabel\ngood\r\tvery positive\nbad\tvery negative\n"
    write(tmp_path, train_tsv=table, dev_tsv=table)
    assert "2 rows, 2 classes" in do("classes", *flags, "--out", tmp_path / "o")
    assert json.loads((tmp_path / "o/classes.json").read_text()) == [
        *("very_negative", "very_positive")
    ]
    words = [x.split()[0] for x in (tmp_path / "o/label/dict.txt").read_text().splitlines()]
    assert {w for w in words if not w.startswith("madeup")} == {"very_positive", "very_negative"}
    for bad, said in (
        ("a\t\n", "line 4: '' cannot be a label"),
        ("a\t<unk>\n", "line 4: '<unk>' cannot be a label"),
        ("a\tvery_positive\n", "differ in spaces alone"),
    ):
        write(tmp_path, train_tsv=table + bad)
        assert said in do("classes", *flags, "--out", tmp_path / "p", code=1)
    write(tmp_path, train_tsv=table, dev_tsv=table + "a\tnew\n")
    assert "has the label 'new', which train.tsv" in do(
        "classes", *flags, "--out", tmp_path / "p", code=1
    )


def test_training_lines_that_are_not_text(tmp_path, do):
    """Extraction stops at an undecodable line, or leaves its pair out where that is asked for."""
    (tmp_path / "m").mkdir()
    write(tmp_path, c_toml='\n'.join((
        'source = "en"', 'target = "de"', "vocab = 100",
        *('[[train]]', 'source = "t.en"', 'target = "t.de"'),
        *("[valid]", 'name = "valid"', 'source = "t.en"'),
        *("[[test]]", 'name = "test"', 'source = "t.en"'),
    )))  # fmt: skip
    write(tmp_path / "m", t_en="one\ntwo\nthree\n")
    (tmp_path / "m/t.de").write_bytes(b"eins\nzw\xe4i\ndrei\n")
    flags = (tmp_path / "c.toml", "--archives", tmp_path / "m", "--out", tmp_path / "out")
    said = do("extract", *flags, code=1)
    assert "t.de, line 2, is not UTF-8 text" in said and "--drop-broken-lines" in said
    out = do("extract", *flags, "--drop-broken-lines")
    assert "train: 3 pairs from t.en, 1 of them left out" in out
    assert (tmp_path / "out/train.de").read_text() == "eins\ndrei\n"
    (tmp_path / "m/t.de").write_bytes(b"eins\nzwei\n")
    (tmp_path / "out/train.de").unlink()
    assert "the en side has more lines" in do("extract", *flags, code=1)
