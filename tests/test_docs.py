"""README and docs agree with the code and contain no dead link."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, run, train, train_args

pytestmark = pytest.mark.slow


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "recipes").glob("*.md"),
]
IDS = [str(p.relative_to(ROOT)) for p in PAGES]


def test_generated_pages_are_the_code():
    """docs/flags.md and docs/compat.md equal what docs/make_pages.py generates today."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs/make_pages.py"], capture_output=True, text=True, check=True
    )
    flags, compat = ((ROOT / f"docs/{n}.md").read_text("utf-8") for n in ("flags", "compat"))
    assert done.stdout == f"{flags}\n{compat}\n", "run python docs/make_pages.py --write"
    for flag in ("--moe-gate", "--memory-bits", "--evo-spawn-update", "--moe-gate-loss-wt"):
        assert f"| `{flag}` |" in flags
    assert "fairseq.trainer.Trainer.load_checkpoint" in compat


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_links_lead_somewhere(path):
    """Every relative link names a file that exists."""
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_flags_in_the_text_exist(path):
    """Every flag of this package that a page names exists in the code."""
    flags = (ROOT / "docs/flags.md").read_text(encoding="utf-8")
    text = re.sub(r"(?s)^\| there \| here \|.*?\n\n", "", path.read_text(encoding="utf-8"))
    for flag in set(re.findall(r"(?<![\w-])--(?:moe|evo|dts|memory)-[a-z0-9-]*[a-z0-9]", text)):
        known = f"`{flag}`" in flags or flag in (
            "--memory-efficient-fp16",
            "--memory-efficient-bf16",
        )
        if path.name != "migration.md":
            assert known or f"`{flag}-" in flags, flag


def test_every_metric_is_explained(toy, tmp_path):
    """docs/metrics.md explains each routing metric that a run logs."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    rows = train(*train_args(toy, tmp_path, "--max-update", 3, "--moe-z-loss-wt", 0.1))
    keys = {k.split("/")[0] for row in rows for k in row if k.startswith(("moe_", "memory_"))}
    assert "moe_active_experts" in keys
    for key in keys:
        assert f"`{key}" in text, key


def test_commands_that_pages_name_are_installed():
    """Every evomoe-... command that a page names is installed by setup.py."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    names = re.search(r"for name in \(([^)]*)\)", setup)[1]
    for path in PAGES:
        for name in re.findall(r"\bevomoe-([a-z]+)\b", path.read_text(encoding="utf-8")):
            assert f'"{name}"' in names, (path.name, name)


def test_tables_are_what_the_rows_say():
    """Each table of results in a page equals what its script generates from benchmarks/results."""
    pytest.importorskip("matplotlib")
    from benchmarks.pages import evidence, mixed_domains, speed, tables

    pages = (tables, evidence, speed, mixed_domains)
    places = [place for page in pages for place in page.places()]
    assert len(places) >= 18
    for path, marker, text in places:
        page = path.read_text(encoding="utf-8")
        start, end = f"<!-- {marker} -->\n", f"<!-- end of {marker} -->"
        assert page.split(start)[1].split(end)[0] == text, f"{path.name}: {marker}"


def test_examples_in_python_run(toy, tmp_path):
    """The Python blocks of docs/api.md run unchanged, one after another, on a toy model."""
    train(*train_args(toy, tmp_path / "checkpoints", "--moe-expert-count", 4))
    saved = tmp_path / "checkpoints/checkpoint_last.pt"
    saved.rename(saved.with_name("checkpoint_best.pt"))
    (tmp_path / "data-bin").symlink_to(toy / "bin")
    blocks = re.findall(r"(?s)```python\n(.*?)```", (ROOT / "docs/api.md").read_text("utf-8"))
    assert len(blocks) == 2
    path = {"PYTHONPATH": str(ROOT)}
    said = [run(sys.executable, "-c", block, cwd=tmp_path, env=path) for block in blocks]
    assert re.search(r"(?m)^\['.*', '.*'\]$", said[0])
    assert "Stage.HARD" in said[1]


def test_the_site_builds(tmp_path):
    """Sphinx builds all pages and the API reference without a warning, and the index links them."""
    pytest.importorskip("myst_parser")
    command = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", ROOT / "docs")
    run(*command, ROOT, tmp_path)
    index = (tmp_path / "docs/index.html").read_text(encoding="utf-8")
    for page in PAGES:
        name = page.relative_to(ROOT).with_suffix(".html")
        assert (tmp_path / name).exists(), name
        if page.name != "index.md":
            assert name.name in index, f"docs/index.md does not list {page.name}"
    api = (tmp_path / "docs/api.html").read_text(encoding="utf-8")
    assert "EvoMoELayer" in api and "eq. 11 of arXiv 2411.12992" in api
