"""The structure of the code: one-way imports, no module-level state, files of readable size."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "fairseq_evomoe"
FLOORS = (
    {"options", "config", "schedule", "old_names", "kernels"},
    {"parallel", "hf"},
    {"modules"},
    {"memory"},
    {"compat", "models", "criterions"},
    {"tasks"},
    {"tools"},
)
"""Files and folders of the package, from the lowest floor to the highest."""

# what stands side by side and yet reads another: file or folder -> what it may read
SIDEWAYS = {
    "config": {"options"},
    "old_names": {"config"},
    "criterions": {"compat"},
}
EXPORTED = "_evomoe"
"""How the names of files end that `evomoe-export --with-code` copies, and that stand alone."""

FOLDERS = {
    "kernels": ROOT / "kernels",
    "criterions": ROOT / "criterions",
    **{
        path.name: path
        for path in (ROOT / PACKAGE).iterdir()
        if path.is_dir() and path.name != "__pycache__"
    },
}
FILES = [
    *((n, p) for n, folder in sorted(FOLDERS.items()) for p in sorted(folder.rglob("*.py"))),
    *((p.stem, p) for p in sorted((ROOT / PACKAGE).glob("*.py")) if p.stem != "__init__"),
]
IDS = [str(p.relative_to(ROOT)) for _, p in FILES]


def module_name(path: Path) -> str:
    """Name by which a file is imported, for example fairseq_evomoe.kernels.gate.rule."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, including imports inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            # files that are exported with a model import each other in any folder
            assert node.level == 0 or path.stem.endswith(EXPORTED), f"{path}: relative import"
            module = f"{PACKAGE}.hf.{node.module}" if node.level else node.module
            names |= {f"{module}.{a.name}" for a in node.names}
    return names


def test_every_folder_has_a_floor():
    """FLOORS names each file and folder of the package exactly once."""
    named = [name for floor in FLOORS for name in floor]
    assert sorted(named) == sorted({name for name, _ in FILES})


@pytest.mark.parametrize("name, path", FILES, ids=IDS)
def test_imports_run_one_way(name, path):
    """A file imports only its own folder, the floors below it, and what SIDEWAYS allows."""
    ours = {n.split(".")[1] for n in imported(path) if n.startswith(f"{PACKAGE}.")}
    height = next(i for i, floor in enumerate(FLOORS) if name in floor)
    assert ours <= {name}.union(SIDEWAYS.get(name, ()), *FLOORS[:height])


def test_no_files_import_each_other_in_a_circle():
    """The imports between files, those inside functions included, have no circle."""
    files = {module_name(path): path for _, path in FILES}
    imports = {}
    for name, path in files.items():
        # `from a.b import c` names the module a.b.c, or a name inside the module a.b
        read = {n if n in files else n.rpartition(".")[0] for n in imported(path)}
        imports[name] = (read & set(files)) - {name}
    assert sum(map(len, imports.values())) > len(files), "the names are resolved to files"
    TopologicalSorter(imports).prepare()


@pytest.mark.parametrize("floor, path", FILES, ids=IDS)
def test_kernels_and_hf_know_nothing_of_fairseq(floor, path):
    """No file in kernels/ or hf/ imports fairseq."""
    if floor in ("kernels", "hf"):
        assert not any(n.split(".")[0] == "fairseq" for n in imported(path))


@pytest.mark.parametrize("floor, path", FILES, ids=IDS)
def test_no_mutable_state_in_modules(floor, path):
    """No file has a `global` statement, so no function rebinds a module-level name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"


@pytest.mark.parametrize("floor, path", FILES, ids=IDS)
def test_files_fit_the_eye(floor, path):
    """No file is longer than 350 lines, and each begins with a docstring."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_every_module_is_packaged():
    """setup.py lists every folder that holds modules."""
    text = (ROOT / "setup.py").read_text()
    for _, path in FILES:
        package = module_name(path.with_name("__init__.py"))
        assert f'"{package}"' in text, package


def test_importing_the_plugin_is_quick():
    """It does not import torch's compiler, which takes longer than all of its own modules."""
    code = (
        "import sys, fairseq_cli.train; before = set(sys.modules); import fairseq_evomoe\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert 'fairseq_evomoe' in new and 'torch._dynamo' not in sys.modules, sorted(new)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
