"""C++ and CUDA kernels: built on first use with the compiler at hand, kept, loaded once.

A build takes some seconds. For CPUs it needs torch 2.10 (its stable C++ interface) and g++ or
another C++20 compiler, for GPUs nvcc. Where they are not to be had, callers fall back on Triton or
torch, and one log line says why. `EVOMOE_CACHE` names another folder, `CXX` and `NVCC` another
compiler.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", "-w")
CUDA_FLAGS = (
    *("-O3", "-std=c++20", "-shared", "-Xcompiler", "-fPIC"),
    *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90,code=sm_90"),
    # newer devices translate this when they load it
    *("-gencode", "arch=compute_90,code=compute_90"),
)


def cache_folder() -> Path:
    """Where builds are kept: EVOMOE_CACHE, or fairseq_evomoe in the user's cache folder."""
    chosen = os.environ.get("EVOMOE_CACHE")
    if chosen:
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fairseq_evomoe"


def _command(name: str) -> list[str]:
    """The compiler's call, but for where the library goes."""
    if (SOURCES / f"{name}.cu").exists():
        compiler = os.environ.get("NVCC") or shutil.which("nvcc")
        if not compiler:
            raise RuntimeError("no nvcc on the PATH")
        return [compiler, *CUDA_FLAGS, str(SOURCES / f"{name}.cu")]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler:
        raise RuntimeError("no C++ compiler (Debian: apt-get install g++)")
    root = Path(torch.__file__).parent
    command = [compiler, *FLAGS, f"-I{root / 'include'}", str(SOURCES / f"{name}.cpp")]
    return [*command, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]


def build(name: str) -> Path:
    """The library of csrc/<name>.cpp or .cu; an earlier build of the same sources is taken as is.

    Raises:
        RuntimeError: no compiler, or it failed; with its last words.
    """
    command = _command(name)
    told = [torch.__version__, platform.machine(), *command]
    told += [p.read_text() for p in sorted(SOURCES.glob(f"{name}*"))]
    key = hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
    target = cache_folder() / f"{name}-{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    logger.info("building %s, once; it is kept in %s", name, target.parent)
    # processes that build at the same time each make their own and the last one stays
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


@functools.cache
def load(name: str) -> str:
    """Build and load csrc/<name>.cpp into torch.ops.evomoe; why not, or "" when it is there."""
    try:
        torch.ops.load_library(build(name))
    except (OSError, RuntimeError) as e:
        logger.info("%s is not to be had, torch serves instead: %s", name, e)
        return str(e)
    return ""
