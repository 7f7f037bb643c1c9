"""Build and load the C++ and CUDA kernels.

A kernel is built on first use, which takes some seconds, and the library is cached on disk. A build
for CPUs needs torch 2.10 (for its stable C++ interface) and g++ or another C++20 compiler; a build
for GPUs needs nvcc. If any of these is missing, callers fall back on Triton or torch, and one log
line says why. `EVOMOE_CACHE` names another cache folder; `CXX` and `NVCC` name another compiler.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

COMMON = Path(__file__).parent / "csrc"
"""Folder of the headers that kernels for CPUs share."""

FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", "-w")
CUDA_FLAGS = (
    *("-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC"),
    *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90"),
    # PTX, which drivers compile at load time for newer devices
    *("-gencode", "arch=compute_90,code=compute_90"),
)


def cache_folder() -> Path:
    """Folder of the built libraries: EVOMOE_CACHE, or fairseq_evomoe in the user's cache folder."""
    chosen = os.environ.get("EVOMOE_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fairseq_evomoe"


def _command(sources: Path, name: str) -> list[str]:
    """Return the compiler's command line without the output file."""
    if (sources / f"{name}.cu").exists():
        compiler = os.environ.get("NVCC") or shutil.which("nvcc")
        if not compiler:
            raise RuntimeError("no nvcc on the PATH: install the CUDA toolkit or set NVCC")
        return [compiler, *CUDA_FLAGS, str(sources / f"{name}.cu")]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise RuntimeError("no C++ compiler: install one (Debian: apt-get install g++) or set CXX")
    root = Path(torch.__file__).parent
    include = [f"-I{folder}" for folder in (root / "include", COMMON, sources)]
    command = [compiler, *FLAGS, *include, str(sources / f"{name}.cpp")]
    return [*command, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def build(sources: Path, name: str) -> Path:
    """Return the path of the library of csrc/<name>.cpp or .cu, building it if necessary.

    An earlier build of the same sources with the same command is used as it is.

    Raises:
        RuntimeError: if there is no compiler, or if it failed; the message ends with its output.
    """
    command = _command(sources, name)
    inputs = [torch.__version__, platform.machine(), *command]
    shared = COMMON.glob("*") if (sources / f"{name}.cpp").exists() else ()
    inputs += [p.read_text() for p in sorted((*sources.glob(f"{name}*"), *shared))]
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    target = cache_folder() / f"{name}-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    logger.info("building %s (once); the library is cached in %s", name, target.parent)
    # processes that build at the same time each build a copy, and the last one to finish stays
    handle, draft = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
    os.close(handle)
    try:
        done = subprocess.run([*command, "-o", draft], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command[0]} exited {done.returncode}: {done.stderr[-2000:]}")
        os.replace(draft, target)
    finally:
        Path(draft).unlink(missing_ok=True)
    return target


ISAS = ("portable", "avx2", "avx512")


def chosen_isa(best: int) -> int:
    """Index into `ISAS` of the instruction set to use: EVOMOE_CPU_ISA, or the best of this machine.

    Args:
        best: index of the widest instruction set that this machine has.

    Raises:
        ValueError: if EVOMOE_CPU_ISA names an instruction set that this machine does not have.
    """
    requested = os.environ.get("EVOMOE_CPU_ISA")
    if not requested:
        return best
    if requested not in ISAS[: best + 1]:
        raise ValueError(
            f"EVOMOE_CPU_ISA={requested!r}: this machine has {', '.join(ISAS[: best + 1])}"
        )
    return ISAS.index(requested)


# a cached function does not keep two threads from running it at the same time
_LOCK = threading.RLock()


def load(sources: Path, name: str) -> str:
    """Build csrc/<name>.cpp and load it into torch.ops.evomoe, once per process.

    Args:
        sources: folder of the sources.
        name: of the file, without its ending.

    Returns:
        "" if the ops are available, otherwise the reason why they are not.
    """
    with _LOCK:
        return _load(sources, name)


@functools.cache
def _load(sources: Path, name: str) -> str:
    try:
        torch.ops.load_library(build(sources, name))
    except (OSError, RuntimeError) as error:
        logger.info("%s is unavailable, torch serves instead: %s", name, error)
        return str(error)
    return ""
