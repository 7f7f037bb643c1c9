"""tools/page.py: logs, experts and scores on one self-contained page."""

import copy
import html
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run, tool, train_args

from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.tools import checkpoint, markup, page, report
from fairseq_evomoe.tools.run_log import read_log
from fairseq_evomoe.tools.samples import samples
from fairseq_evomoe.tools.specialists import activity, similarity, specialists, watch
from fairseq_evomoe.tools.words import words_of

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
        if tag not in ("meta", "br", "input") and not tag.startswith("svg:"):
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
    found = specialists(seen, most=10**6)
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
    """For experts that are copies of one, every cosine is 1; int8 changes it by little."""
    model, _, _ = checkpoint.build(trained / "checkpoint_last.pt", str(toy / "bin"))
    before = similarity(model)
    rounded = copy.deepcopy(model)
    for _, layer in moe_layers(rounded):
        layer.experts.to_int8()
    for name, cosines in similarity(rounded).items():
        assert torch.allclose(cosines, before[name], atol=1e-2)
        assert not torch.equal(cosines, before[name])
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
    headings += "How alike the experts are, Sentences with the experts of their pieces, "
    headings += "Which words go where, Translation"
    for heading in headings.split(", "):
        assert heading in "".join(reader.headings), heading
    assert "a&lt;b" in text and "<script" not in text and "url(http" not in text
    score = re.search(
        r"<th scope=\"row\">model</th><td>([\d.]+)</td><td>([\d.]+) ± ([\d.]+)</td>", text
    )
    assert 50 < float(score[1]) < 100 and float(score[3]) > 0
    assert {p.stem for p in (made / "png").glob("*.png")} >= {"losses", "evolution", "likeness"}
    assert not list(made.glob("*.partial"))


@pytest.fixture
def browser(tmp_path):
    """A function that runs a headless browser with flags and returns what it prints."""
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("chromium is not installed")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]

    def call(*more):
        command = [found, *flags, *map(str, more)]
        return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout.decode()

    return call


def pixels_of(browser, page, shot, width, height):
    """A screenshot of the page as grey values, (height, width)."""
    browser(f"--window-size={width},{height}", f"--screenshot={shot}", f"file://{page}")
    from matplotlib.image import imread

    return imread(shot)[..., :3].mean(-1)


def test_a_browser_shows_it(made, browser):
    """The page is drawn and not blank; a run whose box is not ticked is gone from the figures."""
    pixels = pixels_of(browser, made / "page.html", made / "shot.png", 1300, 3000)
    assert pixels.shape == (3000, 1300)
    inked = (pixels < 0.9).any(1)
    assert inked[:2000].mean() > 0.5, "most rows of the page show something"
    text = (made / "page.html").read_text(encoding="utf-8")
    assert text.count("checked>") == 2
    (made / "off.html").write_text(text.replace(" checked>", ">"), encoding="utf-8")
    off = pixels_of(browser, made / "off.html", made / "off.png", 1300, 3000)
    lost = (pixels < 0.9).sum() - (off < 0.9).sum()
    assert lost > 0, "lines, marks and the runs' own sections are hidden"


AXE = """<script>AXE</script><script>
axe.run(document, {resultTypes: ["violations"]}).then(found => {
  const said = found.violations.map(v => v.id + ": " + v.nodes[0].html.slice(0, 200));
  const shown = document.createElement("pre");
  shown.id = "axe";
  shown.textContent = JSON.stringify({said, passed: found.passes.length, wide:
    document.documentElement.scrollWidth > window.innerWidth});
  document.body.append(shown);
});
</script></body>"""


@pytest.mark.parametrize("width", [1300, 500])
def test_accessibility_checker(made, browser, width):
    """axe-core finds no violation, on a desk and on a phone; the page is not wider than a phone."""
    axe = next(Path(sys.prefix, "beside").glob("axe_*/axe.min.js"), None)
    if axe is None:
        pytest.skip("axe is not installed; tests/run.sh says how")
    text = (made / "page.html").read_text(encoding="utf-8")
    checker = AXE.replace(
        "AXE", axe.read_text(encoding="utf-8").replace("</script", "<\\/script"), 1
    )
    checked = made / "axe.html"
    checked.write_text(text.replace("</body>", checker), encoding="utf-8")
    size = f"--window-size={width},900"
    dom = browser(size, "--virtual-time-budget=60000", "--dump-dom", f"file://{checked}")
    found = json.loads(html.unescape(re.search(r'<pre id="axe">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["said"] == [] and found["passed"] > 10 and not found["wide"]


def test_points_say_their_values(made, trained):
    """Under the pointer each point names its run, update and loss, as the log has them."""
    text = (made / "page.html").read_text(encoding="utf-8")
    log = read_log(trained / "train.log")
    for name in ("a&lt;b", trained.name):
        for row in log.train:
            said = f"{name}: updates {row['num_updates']:,.6g}, {row['loss']:,.4g}"
            assert f"<title>{said}</title>" in text
    assert text.count('class="points of-run-0"') == text.count('class="points of-run-1"') == 8
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    links = re.findall(r' href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert len(links) > 100 and all("".join(pair) in ids for pair in links)
    assert text.count(' href="data:image/png') >= 4, "heat maps, one a layer and run"
    assert "xlink" not in text and "ns0:" not in text and "ns1:" not in text


def test_sentences_are_shown_with_their_experts(trained, toy):
    """Pieces are those that the layers read, each with the experts that the gate chose for it."""
    model, _, task = checkpoint.build(trained / "checkpoint_last.pt", str(toy / "bin"))
    task.load_dataset("valid")
    layers = [layer for _, layer in moe_layers(model)]
    two = lambda gate, args, plan: replace(plan, active=plan.probs >= plan.probs.topk(2)[0][:, 1:])
    layers[0].gate.register_forward_hook(two)
    found = list(samples(model, task, subset="valid", count=2))
    lines = {lang: (toy / f"valid.{lang}").read_text().splitlines() for lang in ("en", "de")}
    for i, sample in enumerate(found):
        at = i * len(lines["en"]) // 2
        for text, line in (("source", lines["en"][at]), ("reference", lines["de"][at])):
            pairs = zip(sample.texts[text].split(), line.split(), strict=True)
            assert all(shown in (word, "<unk>") for shown, word in pairs)
        read = sample.layers["encoder.1"]
        assert [p.text for p in read] == [*sample.texts["source"].split(), "</s>"]
        assert all(len(p.experts) == 2 and p.experts[0][1] >= p.experts[1][1] for p in read)
        written = sample.layers["decoder.1"]
        assert [p.text for p in written][1:] == sample.texts["translation"].split()
        assert all(len(p.experts) == 1 for p in written)
    shown = markup.sample(found[0], 1)
    (expert, weight), _ = found[0].layers["encoder.1"][0].experts
    assert f'class="piece e{expert}" title="expert {expert} with weight {weight:.2f}, ' in shown


def test_looks_of_experts_differ():
    """Each of 32 experts has another pair of colour and pattern, and neighbours differ in both."""
    rules = re.findall(r"background:(.*?);border-bottom-style:(.*?)}", markup.expert_rules(32))
    assert len(rules) == len(set(rules)) == 32
    for (colour, line), (other, next_line) in pairwise(rules):
        assert colour != other and line != next_line


@pytest.mark.parametrize(
    "pieces, words",
    [
        ("▁das ▁Haus meister </s>", "das Hausmeister Hausmeister </s>"),
        ("das Haus@@ meister </s>", "das Hausmeister Hausmeister </s>"),
        ("</s> ▁ <0xC3> <0xA4> h", "</s> äh äh äh äh"),
        ("das Haus", "das Haus"),
        ("ung ▁da", "ung da"),
    ],
)
def test_pieces_are_put_together(pieces, words):
    """Each piece is counted for the whole word, whichever marks the pieces have."""
    split = pieces.split()
    assert words_of(split, [p == "</s>" for p in split]) == words.split()


def test_watching_a_training(trained, tmp_path):
    """The page is written while the training runs and once more at its end; a log may come late."""
    log, out = tmp_path / "train.log", tmp_path / "page.html"
    text = (trained / "train.log").read_text()
    end = text.index("| train_inner | {", text.index("| train_inner | {") + 1)
    command = ["page", "--log", str(log), "--watch", "1", "--output", str(out)]
    with subprocess.Popen(
        [sys.executable, "-m", "fairseq_evomoe.tools.report", *command],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    ) as process:  # fmt: skip
        assert "waiting" in process.stdout.readline()
        log.write_text(text[: text.rindex("\n", 0, end) + 1])
        while "waiting" in (said := process.stdout.readline()):
            pass
        assert str(out) in said
        assert '<meta http-equiv="refresh" content="1">' in out.read_text(encoding="utf-8")
        log.write_text(text)
        assert process.wait(60) == 0
    assert "http-equiv" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "there is nothing to report on"),
        (("--hypothesis", "x"), "go together"),
        (("--checkpoint", "x", "--watch", "5"), "--watch 5: .* a --log to follow"),
        (("--log", "x", "--watch", "0"), "--watch 0: give seconds above 0"),
        (("--log", "x", "--samples", "-1"), "--samples -1: "),
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
    shown = page.bleu_rows(tmp_path / "reference", [("x", tmp_path / "hypothesis")])
    assert "100.00" in shown
    (tmp_path / "hypothesis").write_bytes(b"ein\nH\xe4user\n")
    with pytest.raises(ValueError, match="hypothesis, line 2, is not UTF-8 text"):
        page.bleu_rows(tmp_path / "reference", [("x", tmp_path / "hypothesis")])
