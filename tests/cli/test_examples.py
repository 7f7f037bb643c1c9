"""The commands of README.md and docs/commands.md, word for word, with flags for small sizes."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, tool
from forks import stand_ins

PAGES = (ROOT / "README.md", ROOT / "docs/commands.md")
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"(?s)```bash\n(.*?)```", TEXT)
TRAINS = [b for b in BLOCKS if "fairseq-train" in b]
STAGES = "--evo-spawn-update 1 --dts-anneal-updates 1 --max-update 6 --save-interval-updates 1"
RUN = "--cpu --num-workers 0 --keep-interval-updates 5 " + STAGES
ENCODER = "--encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 2 "
ENCODER += "--encoder-layers 2"
SMALL = {
    "translation_evomoe": f"{RUN} {ENCODER} --max-tokens 400 --decoder-layers 2 "
    "--decoder-attention-heads 2",
    "language_modeling_evomoe": f"{RUN} --decoder-embed-dim 32 --decoder-ffn-embed-dim 64 "
    "--decoder-attention-heads 2 --decoder-layers 2 --tokens-per-sample 64",
    "masked_lm_evomoe": f"{RUN} {ENCODER}",
    "sentence_prediction": f"--cpu --num-workers 0 --max-epoch 1 {ENCODER}",
}
"""Task -> flags that are added after the README's own and override them."""


@pytest.fixture
def place(tmp_path):
    """A folder with the plugin in it, as the commands expect."""
    (tmp_path / "fairseq_evomoe").symlink_to(ROOT / "fairseq_evomoe")
    return tmp_path


def shell(text: str, place: Path) -> str:
    """Run a block; fairseq-train gets the small sizes of its task, and generation uses the CPU."""
    small = "\n".join(f'        *" {task} "*) set -- "$@" {f} ;;' for task, f in SMALL.items())
    script = f"""set -euo pipefail
fairseq-train() {{
    case " $* " in
{small}
        *) echo "no small sizes for: $*" >&2; return 1 ;;
    esac
    command fairseq-train "$@"
}}
fairseq-generate() {{ command fairseq-generate "$@" --cpu --num-workers 0; }}
fairseq-eval-lm() {{ command fairseq-eval-lm "$@" --cpu --num-workers 0 --tokens-per-sample 64; }}
{text}"""
    path = f"{stand_ins()}/bin:/usr/bin:/bin"
    return run("bash", "-c", script, cwd=place, env={"PATH": path})


def block(*words: str) -> str:
    (found,) = [b for b in BLOCKS if all(w in b for w in words)]
    return found


def test_all_training_commands_are_here():
    """The tests below cover every training command of these pages."""
    assert len(TRAINS) == 3 and sum(b.count("fairseq-train ") for b in TRAINS) == 4


def test_translation(toy, place):
    """Training, averaging, beam search and BLEU run as in the page."""
    (place / "data-bin").symlink_to(toy / "bin")
    (place / "test.de").symlink_to(toy / "test.de")
    said = shell(block("--task translation_evomoe"), place)
    assert "moe_active_experts" in said and (place / "tb").is_dir()
    said = shell(block("evomoe-average", "fairseq-generate"), place)
    assert re.search(r'"name": "BLEU",\s+"score": [\d.]+', said)
    assert len((place / "out.hyp").read_text().splitlines()) == 43


def test_causal_language_model(toy, place):
    """Training and computing perplexity run as in the page."""
    (place / "data-bin").symlink_to(toy / "mono")
    assert "Perplexity" in shell(block("--task language_modeling_evomoe"), place)


def test_masked_language_model_and_classifier(toy, place):
    """Pretraining and fine-tuning on pairs of sentences in GLUE's columns run as in the page."""
    (place / "data-bin").symlink_to(toy / "mono")
    lines = (toy / "train.en").read_text().splitlines()
    for name, rows in (("train", range(64)), ("dev", range(64, 96))):
        table = ["sentence1\tsentence2\tlabel"]
        table += [f"{lines[i]}\t{lines[i + i % 2]}\t{i % 2}" for i in rows]
        (place / f"{name}.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    binarise(place, toy / "mono/dict.txt")
    said = shell(block("--task masked_lm_evomoe", "--task sentence_prediction"), place)
    assert (place / "pretrained/checkpoint_best.pt").exists() and "accuracy" in said


def binarise(place: Path, words: Path) -> None:
    """Binarise the tables into RTE-bin, at word level."""
    for name in ("train", "dev"):
        rows = [x.split("\t") for x in (place / f"{name}.tsv").read_text().splitlines()[1:]]
        for column, text in zip(
            ("input0", "input1", "label"), zip(*rows, strict=True), strict=True
        ):
            (place / f"{name}.{column}").write_text("\n".join(text) + "\n", encoding="utf-8")
    for column in ("input0", "input1", "label"):
        known = [] if column == "label" else ["--srcdict", words]
        run(
            *(sys.executable, tool("fairseq-preprocess"), "--only-source", *known),
            *("--trainpref", place / f"train.{column}", "--validpref", place / f"dev.{column}"),
            *("--destdir", place / "RTE-bin" / column, "--workers", 1),
        )
