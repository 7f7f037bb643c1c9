"""recipes: properties of the grammar, text preparation, scoring, and whole recipes end to end."""

import gzip
import hashlib
import http.server
import io
import json
import re
import sys
import tarfile
import threading
from collections import Counter

import pytest
from conftest import ROOT, run
from recipe_kit import recipe

from recipes.quickstart import grammar

sys.path.insert(0, str(ROOT / "recipes/steps"))
import clean
import download
import score


@pytest.fixture(scope="module")
def corpus():
    return grammar.corpus(train=3000, valid=100, test=200, seed=3)


def test_corpus_splits_share_no_sentence(corpus):
    """All sentences are distinct, so that those of valid and both tests never occur in train."""
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
    """The same seed gives the same text, and another seed gives another text."""
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
    """A fixed clause has its verb second or final and its separable prefix in the right place."""
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
    """Empty, repeated, untranslated and test pairs are dropped; the rest stays in order."""
    pairs = [
        *(("a b", "c d"), ("", "x"), ("a b", "c d"), ("in test", "im test")),
        *(("one two three four", "one two three four"), ("Tom", "Tom")),
    ]
    dropped = Counter()
    kept = list(clean.clean(pairs, [("in test", "im test")], dropped))
    assert kept == [("a b", "c d"), ("Tom", "Tom")]
    assert dropped == {"empty": 1, "repeated": 1, "in a test set": 1, "source equals target": 1}


def test_unequal_files_are_refused(tmp_path):
    """Two sides of different length would shift every pair; the error names both counts."""
    (tmp_path / "t.en").write_text("a\nb\n")
    (tmp_path / "t.de").write_text("a\n")
    with pytest.raises(SystemExit, match="2 en lines but 1 de lines"):
        list(clean.read_pairs(str(tmp_path / "t"), "en", "de"))
    with pytest.raises(SystemExit, match="does not exist"):
        list(clean.read_pairs(str(tmp_path / "u"), "en", "de"))


def test_the_language_filter_knows_the_other_side():
    """A pair with a German sentence on the English side is dropped; a pair of few words is kept."""
    right = clean.languages_of("en", "de")
    english, german = "we are very glad to be here today", "wir freuen uns sehr heute hier zu sein"
    assert right((english, german)) and right(("OK", "OK"))
    assert not right((german, german)) and not right((english, english))


class _Server(http.server.BaseHTTPRequestHandler):
    """Serves one file by ranges, and breaks off its first answer in the middle."""

    content, broken = b"", []

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not self.broken:
            self.broken.append(True)
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_a_broken_download_goes_on_where_it_stopped(tmp_path):
    """The second try requests the rest only, and the file gets its name once it is complete."""
    _Server.content, _Server.broken = bytes(range(256)) * 5000, []
    server = http.server.HTTPServer(("localhost", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://localhost:{server.server_port}/x"
    try:
        with pytest.raises(OSError):  # noqa: PT011 (the text is the operating system's)
            download.fetch(url, tmp_path / "x", tries=1)
        assert not (tmp_path / "x").exists()
        assert (tmp_path / "x.partial").stat().st_size == len(_Server.content) // 2
        download.fetch(url, tmp_path / "x", tries=1)
    finally:
        server.shutdown()
    assert (tmp_path / "x").read_bytes() == _Server.content


def archive(path, members):
    """Write a .tgz or .tar with the members {name: text}."""
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as tar:
        for name, text in members.items():
            data = text.encode()
            data = gzip.compress(data) if name.endswith(".gz") else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def text_of(pairs, side):
    return "".join(p[side] + "\n" for p in pairs)


def wmt_mirror(folder, pairs, src, tgt, files):
    """Write the archives of a WMT year, each with a part of the training pairs, into `folder`."""
    folder.mkdir()
    shares = [pairs["train"][i :: len(files)] for i in range(len(files))]
    for (name, members), share in zip(files.items(), shares, strict=True):
        archive(folder / name, {members[lang]: text_of(share, lang != "en") for lang in (src, tgt)})
    return folder


WMT = {
    "wmt14_en_de": {
        "training-parallel-europarl-v7.tgz": "training/europarl-v7.de-en.{}",
        "training-parallel-commoncrawl.tgz": "commoncrawl.de-en.{}",
        "training-parallel-nc-v9.tgz": "training/news-commentary-v9.de-en.{}",
    },
    "wmt17_en_de": {
        "training-parallel-europarl-v7.tgz": "training/europarl-v7.de-en.{}",
        "training-parallel-commoncrawl.tgz": "commoncrawl.de-en.{}",
        "training-parallel-nc-v12.tgz": "training/news-commentary-v12.de-en.{}",
        "rapid2016.tgz": "rapid2016.de-en.{}",
    },
    "wmt14_en_fr": {
        "training-parallel-europarl-v7.tgz": "training/europarl-v7.fr-en.{}",
        "training-parallel-commoncrawl.tgz": "commoncrawl.fr-en.{}",
        "training-parallel-un.tgz": "un/undoc.2000.fr-en.{}",
        "training-parallel-nc-v9.tgz": "training/news-commentary-v9.fr-en.{}",
        "training-giga-fren.tar": "giga-fren.release2.fixed.{}.gz",
    },
}
TESTS = {
    "wmt14_en_de": "newstest2014",
    "wmt14_en_fr": "newstest2014",
    "wmt17_en_de": "newstest2017",
}


@pytest.mark.parametrize("name", WMT)
def test_wmt_from_archives(tmp_path, name):
    """Archives in the corpora's own formats become clean text in pieces without losing a pair."""
    src, tgt = name.split("_")[1:]
    pairs = grammar.corpus(train=400, valid=30, test=31, seed=8)
    files = {f: {lang: m.format(lang) for lang in (src, tgt)} for f, m in WMT[name].items()}
    mirror = wmt_mirror(tmp_path / "mirror", pairs, src, tgt, files)
    for split, own in (("valid", "valid"), ("test", TESTS[name])):
        for side, lang in enumerate((src, tgt)):
            (mirror / f"{own}.{lang}").write_text(text_of(pairs[split], side), encoding="utf-8")
    steps = ("--steps", "download,extract,clean,pieces", "--any-lines")
    out = recipe(name, "--data", mirror, *steps, "--out", tmp_path / "w")
    sides = ((tmp_path / f"w/text/train.{x}").read_text().splitlines() for x in (src, tgt))
    found = list(zip(*sides, strict=True))
    assert sorted(found) == sorted((p.en, p.de) for p in pairs["train"])
    assert "clean: 400 pairs read" in out
    sums = (tmp_path / "w/archives/SHA256SUMS").read_text().splitlines()
    assert len(sums) == len(files)
    sha, file = sums[0].split()
    assert sha == hashlib.sha256((mirror / file).read_bytes()).hexdigest()

    # a wrong number of lines is noticed, and so is a damaged archive
    (tmp_path / "w/text").rename(tmp_path / "w/gone")
    wrong = recipe(name, "--data", mirror, "--steps", "extract", "--out", tmp_path / "w", ok=False)
    assert "lines instead of" in wrong
    (tmp_path / "w/archives" / file).write_bytes(b"damaged")
    damaged = recipe(name, "--data", mirror, *steps, "--out", tmp_path / "w", ok=False)
    assert "damaged or changed; delete it" in damaged


def test_iwslt_from_its_archive(tmp_path):
    """The recipe runs on tagged talks and XML test sets, and every 23rd pair is for validation."""
    pairs = grammar.corpus(train=300, valid=20, test=25, seed=8)
    members = {}
    for side, lang in ((1, "de"), (0, "en")):
        talk = "<url>http://x</url>\n<title>A talk</title>\n" + text_of(pairs["train"], side)
        members[f"de-en/train.tags.de-en.{lang}"] = talk
        for i, test in enumerate(
            ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
        ):
            rows = [p[side].replace("&", "&amp;") for p in pairs["test"][5 * i : 5 * i + 5]]
            segments = "\n".join(f'<seg id="{n}"> {r} </seg>' for n, r in enumerate(rows, 1))
            xml = f'<?xml version="1.0"?>\n<doc docid="1">\n{segments}\n</doc>\n'
            members[f"de-en/IWSLT14.{test}.de-en.{lang}.xml"] = xml
    (tmp_path / "mirror").mkdir()
    archive(tmp_path / "mirror/de-en.tgz", members)
    out = recipe(
        *("iwslt14_de_en", "--data", tmp_path / "mirror", "--any-lines", "--size", "tiny"),
        *("--model", "memoryformer", "--updates", 20, "--out", tmp_path / "w"),
    )
    text = tmp_path / "w/text"
    assert (text / "tests2010to2012.de").read_text() == text_of(pairs["test"], 1)
    assert len((text / "valid.de").read_text().splitlines()) == -(-300 // 23)
    assert "BLEU" in out and "(25 lines)" in out
    again = recipe(
        *("iwslt14_de_en", "--data", tmp_path / "mirror", "--any-lines", "--size", "tiny"),
        *("--model", "dense", "--updates", 20, "--out", tmp_path / "w"),
        *("--baseline", "memoryformer-tiny-20-seed1"),
    )
    assert "download" not in again.split("train")[0] and "against the baseline: BLEU" in again


def test_print_gives_the_command_that_trains(tmp_path):
    """--print gives one line of flags for torchrun and Slurm; models differ in their own flags
    only."""
    lines = {
        model: recipe("wmt14_en_de", "--model", model, "--print", "--out", tmp_path / "w")
        for model in ("dense", "evomoe")
    }
    said = recipe("wmt14_en_de", "--devices", 2, "--print", "--out", tmp_path / "w")
    assert "--distributed-world-size 2" in said
    for line in lines.values():
        assert "--distributed-world-size" not in line
        assert "--arch transformer_evomoe_wmt_en_de " in line and "--max-update 100000" in line
    assert "--moe-expert-count 8" in lines["evomoe"] and "--moe-freq 0" in lines["dense"]


def test_score_refuses_lost_sentences(tmp_path):
    """A hypothesis file with one line too few is refused and gets no score."""
    for name, lines in (("s", 3), ("r", 3), ("h", 2)):
        (tmp_path / name).write_text("word\n" * lines)
    command = [sys.executable, ROOT / "recipes/steps/score.py", "--source", tmp_path / "s"]
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


def test_quickstart(tmp_path):
    """The quickstart runs to its end at a small size: corpus, training, BLEU and picture."""
    out = recipe("quickstart", "--updates", 24, "--out", tmp_path / "q", cwd=tmp_path)
    scores = [json.loads(x) for x in (tmp_path / "q/scores.jsonl").read_text().splitlines()]
    assert [s["name"] for s in scores] == ["test", "test_comp"]
    assert all(s["lines"] == 500 and s["bleu_frequency"] > 10 > s["bleu_copy"] for s in scores)
    assert "nrefs:1|bs:1000|seed:12345|case:mixed" in out
    assert (tmp_path / "q/evolution.png").read_bytes()[:4] == b"\x89PNG"


def test_quickstart_on_own_files(tmp_path):
    """--data accepts the user's own plain text under other language names."""
    data = tmp_path / "data"
    data.mkdir()
    for split, pairs in grammar.corpus(train=300, valid=20, test=21, seed=8).items():
        for side, lang in ((0, "yy"), (1, "xx")):
            text = "".join(p[side] + "\n" for p in pairs)
            (data / f"{split}.{lang}").write_text(text, encoding="utf-8")
    command = ("quickstart", "--data", data, "--source-lang", "xx", "--target-lang", "yy")
    command += ("--vocab", 300, "--out", tmp_path / "q")
    recipe(*command, "--updates", 20)
    (result,) = map(json.loads, (tmp_path / "q/scores.jsonl").read_text().splitlines())
    assert result["lines"] == 21
    model = (tmp_path / "q/model/averaged.pt").read_bytes()

    # other options or other data in the same folder stop at once; nothing is lost
    assert "--max-update: 20 -> 30" in recipe(*command, "--updates", 30, ok=False)
    (data / "valid.xx").write_text("other\n" * 20)
    said = recipe(*command, "--updates", 20, ok=False)
    assert "valid.xx: other contents" in said and "--remake" in said
    said = recipe("quickstart", "--updates", 20, "--out", tmp_path / "q", ok=False)
    assert "source: xx -> en" in said and "vocab: 300 -> 1000" in said
    assert (tmp_path / "q/model/averaged.pt").read_bytes() == model


def test_multi30k_on_local_files(tmp_path):
    """The recipe trains on local files, scores other test sets, and goes on to more updates."""
    data = tmp_path / "data"
    data.mkdir()
    splits = grammar.corpus(train=300, valid=20, test=21, seed=8)
    names = {"train": "train", "valid": "valid", "test": "test2017", "test_comp": "mine"}
    for split, name in names.items():
        for side, lang in ((0, "en"), (1, "de")):
            text = "".join(p[side] + "\n" for p in splits[split])
            (data / f"{name}.{lang}").write_text(text, encoding="utf-8")
    command = ("multi30k", "--data", data, "--tests", "test2017,mine", "--vocab", 300)
    command += ("--model", "evomoe", "--out", tmp_path / "m")
    flags = ("--", "--max-tokens", 600)
    out = recipe(*command, "--updates", 40, *flags)
    assert out.count("nrefs:1|bs:1000|seed:12345|case:mixed") == 2
    names = [json.loads(x)["name"] for x in (tmp_path / "m/scores.jsonl").read_text().splitlines()]
    assert names == [f"evomoe-small-40-seed1 {t}" for t in ("test2017", "mine")]
    assert len((tmp_path / "m/pieces/spm.vocab").read_text(encoding="utf-8").splitlines()) == 300
    said = recipe(*command, "--vocab", 400, "--updates", 40, *flags, ok=False)
    assert "vocab: 300 -> 400" in said

    # more updates go on from these, with the schedule that these had
    out = recipe(*command, "--steps", "train", "--updates", 50, "--resume", *flags)
    assert f"goes on from {tmp_path}/m/evomoe-small-40-seed1" in out
    log = (tmp_path / "m/evomoe-small-50-seed1/train.log").read_text()
    updates = re.findall(r'train_inner .*"num_updates": "(\d+)"', log)
    assert list(map(int, updates)) == sorted(set(map(int, updates))) and updates[-1] == "50"
    (flags_of_run,) = re.findall(r"'evo_spawn_update': 2, .*'dts_anneal_updates': 4,", log)
    assert flags_of_run
    assert recipe(*command, "--steps", "train", "--updates", 50, "--resume", *flags)


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--tests", "mine"), "--tests mine: these test sets are read from --data"),
        (("--devices", "two"), "--devices two: give a whole number above 0"),
        (("--vocab", "0"), "--vocab 0: give a whole number above 0"),
        (("--resume",), "has no evomoe-small-<fewer updates>-seed1/checkpoint_last.pt to go on"),
    ],
)
def test_wrong_options_of_a_corpus_recipe(tmp_path, flags, said):
    """They stop the recipe before anything is downloaded, and nothing is written."""
    out = recipe("multi30k", "--out", tmp_path / "w", *flags, ok=False)
    assert said in out and not (tmp_path / "w").exists()


def test_recipes_refuse_unknown_options():
    """A mistyped option stops with the usage, before any set-up."""
    out = run("bash", ROOT / "recipes/quickstart/run.sh", "--bogus", "1", ok=False)
    assert "unknown option: --bogus" in out and "--source-lang" in out
