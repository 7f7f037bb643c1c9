"""tools/page.py: logs, experts and scores on one self-contained page."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from conftest import run, tool, train_args

from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tools import checkpoint, page, report
from fairseq_evomoe.tools.run_log import read_log
from fairseq_evomoe.tools.specialists import activity, similarity, specialists, watch

STAGES = ("--evo-spawn-update", 4, "--dts-anneal-updates", 4, "--max-update", 12)


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """Folder of a run with a checkpoint and a log that includes validation."""
    folder = tmp_path_factory.mktemp("paged")
    args = train_args(toy, folder, *STAGES, "--save-interval-updates", 6)
    args.remove("--disable-validation")
    (folder / "train.log").write_text(run(tool("fairseq-train"), *args))
    return folder


class Reader(HTMLParser):
    """Checks that each tag that opens is closed; collects headings and references."""

    def __init__(self):
        super().__init__()
        self.open, self.headings, self.references = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br") and not tag.startswith("svg:"):
            self.open.append(tag)
        self.references += [v for k, v in attrs if k in ("src", "href") and not v.startswith("#")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def line(kind, **row):
    return f"2026 | INFO | {kind} | " + json.dumps({k: str(v) for k, v in row.items()}) + "\n"


def test_a_resumed_log_counts_each_update_once(tmp_path):
    """Lines of repeated updates replace earlier ones; tokens include updates between lines."""
    log = tmp_path / "train.log"
    rows = [(25, 9.0), (50, 8.0), (75, 7.5), (50, 8.1), (75, 7.6)]
    text = "".join(line("train_inner", num_updates=n, loss=x, wpb=100, wall=n) for n, x in rows)
    log.write_text("noise\n" + text + line("valid", valid_num_updates=50, valid_loss=8.5))
    found = read_log(log, "a")
    assert [r["num_updates"] for r in found.train] == [25, 50, 75]
    assert [r["loss"] for r in found.train] == [9.0, 8.1, 7.6]
    assert [r["tokens"] for r in found.train] == [2500, 5000, 7500]
    assert found.valid == [{"num_updates": 50, "loss": 8.5, "tokens": 5000, "wall": 50}]
    log.write_text("nothing of use")
    with pytest.raises(ValueError, match="--log-format json"):
        read_log(log)


def test_specialists_add_up(trained, toy):
    """The experts' shares of a layer sum to 1, and a word is counted as often as it occurs."""
    model, _, task = checkpoint.build(trained / "checkpoint_last.pt", str(toy / "bin"))
    task.load_dataset("valid")
    seen = watch(model, task, subset="valid", max_tokens=500)
    found = specialists(task, seen, most=10**6)
    assert list(found) == ["encoder.1", "decoder.1"]
    for experts in found.values():
        assert sum(e.share for e in experts) == pytest.approx(1)
        for expert in experts:
            assert all(0 < share <= 1 and n > 0 for _, n, share in expert.words)
    every = {w: n / share for e in found["encoder.1"] for w, n, share in e.words}
    text = (toy / "valid.en").read_text().split()
    word = max((w for w in every if w in text), key=text.count)
    assert round(every[word]) == text.count(word)


def test_activity_adds_up(trained, toy):
    """Classes of words by frequency and by place contain all tokens and have the same total mean.

    If each token has two experts, every mean is 2. Places are counted without padding.
    """
    model, _, task = checkpoint.build(trained / "checkpoint_last.pt", str(toy / "bin"))
    task.load_dataset("valid")
    (layer, *_) = [m for _, m in moe_layers(model)]
    layer.gate.register_forward_hook(
        lambda gate, args, plan: replace(plan, active=plan.probs >= plan.probs.topk(2)[0][:, 1:])
    )
    seen = watch(model, task, subset="valid", max_tokens=500)
    lines = [x.split() for x in (toy / "valid.en").read_text().splitlines()]
    text = sum(len(x) + 1 for x in lines)
    for name, layer_seen in seen.items():
        found = activity(layer_seen)
        assert len(found.by_frequency) <= 5
        for classes in ([x[1:] for x in found.by_frequency], [x[2:] for x in found.by_place]):
            tokens = sum(n for n, _ in classes)
            assert sum(n * mean for n, mean in classes) == pytest.approx(found.mean * tokens)
            if name == layer.name:
                assert tokens == text and all(mean == 2 for _, mean in classes)
        first = found.by_place[0]
        assert first[:2] == (1, 1) and first[2] == len(lines)
    usual = [n for _, n, _ in activity(seen[layer.name]).by_frequency]
    assert max(usual) < 2 * text / 5


def test_similarity(trained, toy):
    """For experts that are copies of one, every cosine is 1."""
    model, _, _ = checkpoint.build(trained / "checkpoint_last.pt", str(toy / "bin"))
    for _, layer in moe_layers(model):
        for p in layer.experts.parameters():
            p.data[:] = p.data[:1]
    for cosines in similarity(model).values():
        assert torch.allclose(cosines, torch.ones_like(cosines), atol=1e-5)


@pytest.fixture(scope="module")
def made(trained, toy, tmp_path_factory):
    """Folder of a page with every section at once, and of its pictures."""
    out = tmp_path_factory.mktemp("page")
    hypothesis = out / "h.de"
    lines = (toy / "test.de").read_text().splitlines()
    hypothesis.write_text("\n".join(lines[:-3] + ["x"] * 3) + "\n")
    report.main(
        [
            *("page", "--log", f"a<b={trained / 'train.log'}", "--log", str(trained / "train.log")),
            *("--checkpoint", str(trained / "checkpoint_last.pt"), "--data", str(toy / "bin")),
            *("--reference", str(toy / "test.de"), "--hypothesis", f"model={hypothesis}"),
            *("--output", str(out / "page.html"), "--png", str(out / "png")),
        ]
    )
    return out


def test_the_page_is_whole(made):
    """The page is well-formed and complete, escapes names and loads nothing; PNGs are written."""
    text = (made / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert not reader.open and not reader.references
    headings = "Runs, Loss, Evolution, Load of the experts: a<b, What a token costs, "
    headings += "How alike the experts are, Which words go where, Translation"
    for heading in headings.split(", "):
        assert heading in "".join(reader.headings), heading
    assert "a&lt;b" in text and "<script" not in text and "url(http" not in text
    score = re.search(r"<td>model</td><td>([\d.]+)</td><td>([\d.]+) ± ([\d.]+)</td>", text)
    assert 50 < float(score[1]) < 100 and float(score[3]) > 0
    assert {p.stem for p in (made / "png").glob("*.png")} >= {"losses", "evolution", "likeness"}
    assert not list(made.glob("*.partial"))


def test_a_browser_shows_it(made):
    """A headless browser renders the page, and the screenshot is not blank."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={made / 'profile'}"]
    url = f"file://{made / 'page.html'}"
    shot = made / "shot.png"
    sized = ["--window-size=1300,3000", f"--screenshot={shot}"]
    subprocess.run([browser, *flags, *sized, url], check=True, capture_output=True, timeout=120)
    from matplotlib.image import imread

    pixels = imread(shot)[..., :3].mean(-1)
    assert pixels.shape == (3000, 1300)
    inked = (pixels < 0.9).any(1)
    assert inked[:2000].mean() > 0.5, "most rows of the page show something"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "there is nothing to report on"),
        (("--hypothesis", "x"), "go together"),
    ],
)
def test_what_is_missing_is_named(tmp_path, flags, said):
    """A missing argument is named before anything is read."""
    args = report.parser().parse_args(["page", *flags, "--output", str(tmp_path / "x.html")])
    with pytest.raises(ValueError, match=said):
        page.run(args)


def test_a_log_that_is_cut(trained, tmp_path):
    """A last line that is cut is left out; a broken line before it is named."""
    log = (trained / "train.log").read_bytes()
    at = log.rindex(b"| train_inner | {")
    (tmp_path / "cut.log").write_bytes(log[: at + 40])
    whole, cut = read_log(trained / "train.log"), read_log(tmp_path / "cut.log")
    assert cut.train == whole.train[: len(cut.train)] and len(cut.train) == len(whole.train) - 1
    (tmp_path / "cut.log").write_bytes(log[: at + 40] + b"\n" + log[at:])
    line = log[:at].count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"cut.log, line {line}: "):
        read_log(tmp_path / "cut.log")


def test_hypotheses_are_lines(tmp_path):
    """Separators other than a line feed end no line; a file that is not text is named."""
    for name in ("reference", "hypothesis"):
        (tmp_path / name).write_bytes("ein\x0b Haus\u2028 steht\r\nda\n".encode())
    html = page.bleu_rows(tmp_path / "reference", [("x", tmp_path / "hypothesis")])
    assert "100.00" in html
    (tmp_path / "hypothesis").write_bytes(b"ein\nH\xe4user\n")
    with pytest.raises(ValueError, match="hypothesis, line 2, is not UTF-8 text"):
        page.bleu_rows(tmp_path / "reference", [("x", tmp_path / "hypothesis")])
