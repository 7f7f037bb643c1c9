"""The house: one-way imports, no state in modules, files of readable size."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = "fairseq_evomoe"
FOLDERS = {
    "kernels": ROOT / "kernels",
    "criterions": ROOT / "criterions",
    **{
        n: ROOT / PACKAGE / n for n in ("compat", "modules", "models", "parallel", "tasks", "tools")
    },
}
LEAVES = {"config", "memory_config", "schedule"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "parallel": {"parallel", "compat"},
    "modules": {"kernels", "parallel", "modules", "config", "memory_config", "schedule"},
    "models": {"modules", "models", "config", "memory_config"},
    "criterions": {"modules", "criterions", "compat", "schedule"},
    "tasks": {"compat", "kernels", "modules", "parallel", "tasks", "config", "schedule"},
    "tools": {
        "parallel",
        "kernels",
        "models",
        "modules",
        "tools",
        "config",
        "memory_config",
        "schedule",
        "compat",
    },
    "config": set(),
    "memory_config": {"config"},
    "schedule": set(),
    "compat": {"compat"},
}
FILES = [
    *((n, p) for n, folder in FOLDERS.items() for p in sorted(folder.rglob("*.py"))),
    *((n, ROOT / PACKAGE / f"{n}.py") for n in sorted(LEAVES)),
]
IDS = [str(p.relative_to(ROOT)) for _, p in FILES]


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, nested imports too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{a.name}" for a in node.names}
    return names


@pytest.mark.parametrize("floor, path", FILES, ids=IDS)
def test_imports_run_one_way(floor, path):
    """A floor imports only the floors below it."""
    ours = {n.split(".")[1] for n in imported(path) if n.startswith(f"{PACKAGE}.")}
    assert ours <= MAY_IMPORT[floor] | ({floor} if path.name == "__init__.py" else set())


@pytest.mark.parametrize("floor, path", FILES, ids=IDS)
def test_kernels_know_nothing_of_fairseq(floor, path):
    """kernels/ is tensors in, tensors out."""
    if floor == "kernels":
        assert not any(n.split(".")[0] == "fairseq" for n in imported(path))


@pytest.mark.parametrize("floor, path", FILES, ids=IDS)
def test_no_mutable_state_in_modules(floor, path):
    """No `global`; nothing bound at module level is changed from inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not isinstance(node, ast.Global), f"{path}:{node.lineno}"


@pytest.mark.parametrize("floor, path", FILES, ids=IDS)
def test_files_fit_the_eye(floor, path):
    """No file above 350 lines, and each opens with a docstring."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_every_module_is_packaged():
    """setup.py lists every folder that holds modules."""
    text = (ROOT / "setup.py").read_text()
    for name, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            inner = path.parent.relative_to(folder).parts
            package = ".".join((PACKAGE, name, *inner))
            assert f'"{package}"' in text, package
