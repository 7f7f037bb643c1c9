"""The plugin loads from a bare checkout, an editable install and a wheel, from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT, run, train_args

pytestmark = pytest.mark.slow


LOAD = """
import sys
from argparse import Namespace
from fairseq import utils
utils.import_user_module(Namespace(user_dir=sys.argv[1]))
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
import fairseq_evomoe.kernels.experts.moe_ffn as k
assert "translation_evomoe" in TASK_REGISTRY
assert "transformer_evomoe_wmt_en_de" in ARCH_MODEL_REGISTRY
assert "moe_label_smoothed_cross_entropy" in CRITERION_REGISTRY
print("loaded", k.__file__)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that git does not ignore, as a fresh clone would hold them."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    files = listed.stdout.split() if listed.returncode == 0 else []
    if not files:
        pytest.skip("not a git checkout, so the files of the project are unknown")
    for name in files:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def environment(tmp_path):
    """(Python, site-packages) of a virtual environment with all our packages but not the plugin."""
    home = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", home)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = home / "lib" / version / "site-packages"
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "evomoe" in entry.name or (packages / entry.name).exists():
            continue
        if entry.name == "fairseq":  # copied, since fairseq looks for a user dir beside its files
            shutil.copytree(entry, packages / entry.name)
        else:
            (packages / entry.name).symlink_to(entry)
    return home / "bin" / "python", packages


def load(python, user_dir, cwd):
    out = run(python, "-c", LOAD, user_dir, cwd=cwd)
    return Path(os.path.normpath(out.split("loaded ")[-1].strip()))


def install(python, *what):
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *what)


def test_bare_checkout(checkout, environment, tmp_path):
    """The uninstalled plugin loads by relative path in the checkout, by absolute path elsewhere."""
    python, _ = environment
    assert load(python, "fairseq_evomoe", checkout) == checkout / "kernels/experts/moe_ffn.py"
    assert (
        load(python, checkout / "fairseq_evomoe", tmp_path)
        == checkout / "kernels/experts/moe_ffn.py"
    )


@pytest.mark.parametrize("mode", ["default", "compat", "strict"])
def test_editable_install(checkout, environment, tmp_path, mode):
    """The plugin loads after pip install -e in each of setuptools' editable modes."""
    python, _ = environment
    copy = tmp_path / "repo"
    shutil.copytree(checkout, copy)
    extra = [] if mode == "default" else ["--config-settings", f"editable_mode={mode}"]
    install(python, "-e", copy, *extra)
    load(python, "fairseq_evomoe", copy)
    load(python, copy / "fairseq_evomoe", tmp_path)


def test_wheel(checkout, environment, tmp_path, toy):
    """The wheel that `python -m build` makes from the source archive works outside the checkout.

    With it installed, `--user-dir fairseq_evomoe` works in any folder, also beside a clone, and so
    do a training run and a tool. As the wheel comes from the archive, the archive lacks nothing.
    """
    python, packages = environment
    copy = tmp_path / "repo"
    shutil.copytree(checkout, copy)
    run(python, "-m", "build", "--no-isolation", "--outdir", tmp_path, copy)
    (wheel,) = tmp_path.glob("*.whl")
    (source,) = tmp_path.glob("*.tar.gz")
    assert wheel.name.split("-")[1] == source.name.split("-")[1].removesuffix(".tar.gz")
    install(python, wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    inside = packages / "fairseq_evomoe"
    assert load(python, "fairseq_evomoe", elsewhere) == inside / "kernels/experts/moe_ffn.py"
    assert load(python, inside, elsewhere) == inside / "kernels/experts/moe_ffn.py"
    assert load(python, "fairseq_evomoe", checkout) == checkout / "kernels/experts/moe_ffn.py"
    top_level = {p.name for p in packages.iterdir() if not p.is_symlink()}
    assert "kernels" not in top_level and "criterions" not in top_level
    names = {p.relative_to(inside).as_posix() for p in inside.rglob("*.py")}
    sources = {
        p.relative_to(checkout / "fairseq_evomoe").as_posix()
        for p in (checkout / "fairseq_evomoe").rglob("*.py")
    } | {
        p.relative_to(checkout).as_posix()
        for d in ("kernels", "criterions")
        for p in (checkout / d).rglob("*.py")
    }
    assert names == sources, "every module of the checkout is in the wheel"
    for source in ("kernels/csrc", "kernels/experts/csrc", "kernels/lookup/csrc"):
        assert {p.name for p in (inside / source).iterdir()} == {
            p.name for p in (checkout / source).iterdir()
        }
    words = train_args(toy, elsewhere / "run", "--max-update", 2)
    words[words.index("--user-dir") + 1] = "fairseq_evomoe"
    run(python, "-m", "fairseq_cli.train", *words, cwd=elsewhere)
    model = elsewhere / "run/checkpoint_last.pt"
    tool = (python, "-m", "fairseq_evomoe.tools.report", "flops", model, "--data", toy / "bin")
    assert "MAC" in run(*tool, cwd=elsewhere)


def test_another_package_named_kernels_stays_importable(checkout, environment):
    """fairseq puts the checkout first on the path, yet `import kernels` finds the other package."""
    python, packages = environment
    (packages / "kernels").mkdir()
    (packages / "kernels/__init__.py").write_text("ORIGIN = 'theirs'\n")
    script = LOAD + "\nimport kernels\nassert sys.path[0] == sys.argv[2]\nassert kernels.ORIGIN\n"
    run(python, "-c", script, checkout / "fairseq_evomoe", checkout, cwd="/")
    assert not (ROOT / "kernels/__init__.py").exists()


def test_import_does_no_work(checkout, environment, tmp_path):
    """Importing the plugin prints nothing of its own, writes nothing and initialises no CUDA."""
    python, _ = environment
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fairseq_evomoe, torch; "
        "assert not torch.cuda.is_initialized()"
    )
    out = run(python, "-B", "-c", script, checkout, cwd=tmp_path)
    assert "evomoe" not in out.lower()
    assert os.listdir(tmp_path) == ["env"]


def test_fairseq_from_wheels(environment, toy, tmp_path):
    """With fairseq as a wheel and without a compiler, the plugin trains and translates."""
    wheel = Path(sys.prefix, "beside/ve-fairseq")
    if not wheel.exists():
        pytest.skip("ve-fairseq is not installed beside the environment; tests/run.sh says how")
    python, packages = environment
    for entry in list(packages.iterdir()):
        if entry.name.startswith("fairseq"):
            shutil.rmtree(entry) if not entry.is_symlink() else entry.unlink()
    for entry in wheel.iterdir():
        if not (packages / entry.name).exists():
            (shutil.copytree if entry.is_dir() else shutil.copy)(entry, packages / entry.name)
    env = {"PATH": str(python.parent), "EVOMOE_CACHE": str(tmp_path / "cache")}
    flags = ("--max-update", 6, "--evo-spawn-update", 2, "--dts-anneal-updates", 2)
    run(python, "-m", "fairseq_cli.train", *train_args(toy, tmp_path / "m", *flags), env=env)
    out = run(
        *(python, "-m", "fairseq_cli.generate", toy / "bin", "--user-dir", ROOT / "fairseq_evomoe"),
        *("--path", tmp_path / "m/checkpoint_last.pt", "--cpu", "--beam", 2, "--max-tokens", 400),
        env=env,
    )
    lines = len((toy / "test.en").read_text().splitlines())
    assert len([x for x in out.splitlines() if x.startswith("H-")]) == lines
    # it ends with an error here, because the plugin is not installed but read from the checkout
    doctor = run(python, "-m", "fairseq_evomoe.tools.doctor", env=env, cwd=ROOT, ok=False)
    assert "0.12.3 (ve-fairseq)" in doctor and "C++ compiler: none" in doctor
    assert not list((tmp_path / "cache").glob("*.so"))
