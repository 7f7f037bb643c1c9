"""Which library multiplies float32 matrices on a CPU: the one that torch takes, or oneDNN.

torch gives float32 products to MKL, which on some processors uses half of their vector width.
oneDNN uses all of it, but on processors with matrix units for bfloat16 the same setting rounds to
bfloat16. So the choice is made by a measurement of time and error. It is in force only inside
`products`. The first measurement on a processor is kept in the cache folder of the kernels, so that
every process there chooses the same, and an interrupted run continues with the same roundings.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fairseq_evomoe.kernels.native import cache_folder

logger = logging.getLogger(__name__)

WAYS = ("torch", "onednn")
LEAST_GAIN = 1.2
"""How many times as fast oneDNN must be to be chosen: small products gain less than large ones."""
MOST_ERROR = 4.0
"""Largest error of oneDNN's product over that of torch's, each against float64."""


class _Setting:
    """Puts torch's setting in place while at least one block needs it, in whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._before = "highest"

    def enter(self) -> None:
        with self._lock:
            if not self._blocks:
                self._before = torch.get_float32_matmul_precision()
                # on a CPU "medium" is oneDNN; "high" changes nothing there
                torch.set_float32_matmul_precision("medium")
            self._blocks += 1

    def leave(self) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                torch.set_float32_matmul_precision(self._before)

    @property
    def open(self) -> bool:
        return self._blocks > 0


_SETTING = _Setting()


def by_onednn() -> bool:
    """Whether a block of `products("onednn")` is open, in this thread or in another."""
    return _SETTING.open


@contextmanager
def products(way: str) -> Iterator[None]:
    """Within, float32 products on CPUs are made in one of `WAYS`.

    The setting is the process's: products of other threads are made in the same way meanwhile.
    """
    if way != "onednn":
        yield
        return
    _SETTING.enter()
    try:
        yield
    finally:
        _SETTING.leave()


class Measured(NamedTuple):
    """oneDNN's products beside torch's.

    Attributes:
        gain: how many times as fast they are.
        error: their largest error against float64 over that of torch's.
    """

    gain: float
    error: float


def measure(size: int = 384, rounds: int = 9) -> Measured:
    """Time products of both ways in turn, some milliseconds in all, and compare their errors.

    The shortest times count: whatever else runs on the machine makes some of them longer.
    """
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    errors: dict[str, float] = {}
    for _ in range(rounds):
        for way in WAYS:
            with products(way):
                times[way].append(_seconds(lambda: a @ b))
                errors[way] = float((a @ b - exact).abs().max())
    torch_s, onednn_s = (min(times[way][1:]) for way in WAYS)
    return Measured(torch_s / onednn_s, errors["onednn"] / errors["torch"])


def _seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _processor() -> str:
    """What a measurement depends on: the processor's name and the build of torch."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        about = sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    except OSError:
        about = [platform.processor()]
    return "\n".join([platform.machine(), torch.__version__, *about])


def _kept(path: Path) -> Measured | None:
    """The figures in a file; None if there is none, or a damaged one."""
    try:
        return Measured(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def measured_once() -> Measured:
    """The measurement that was made first on this processor, in whatever process.

    Where nothing can be kept, it is made anew.
    """
    key = hashlib.sha256(_processor().encode()).hexdigest()[:16]
    path = cache_folder() / f"matmul-{key}.json"
    if kept := _kept(path):
        return kept
    found = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(found._asdict(), file)
        try:
            # of processes that measure at the same time, the first one's figures stay
            os.link(draft, path)
        except FileExistsError:
            if _kept(path) is None:
                os.replace(draft, path)
        finally:
            Path(draft).unlink(missing_ok=True)
    except OSError:
        return found
    return _kept(path) or found


@functools.cache
def choose(wanted: str) -> str:
    """One of `WAYS`: the one that is wanted, or for "auto" the faster one that is as exact.

    The choice is made once per process and logged; see `measured_once`.

    Raises:
        ValueError: oneDNN is wanted, and this torch is built without it.
    """
    if not torch.backends.mkldnn.is_available():
        if wanted == "onednn":
            raise ValueError("--cpu-matmul onednn: this torch is built without oneDNN; give auto")
        return "torch"
    if wanted != "auto":
        return wanted
    found = measured_once()
    way = "onednn" if found.gain >= LEAST_GAIN and found.error <= MOST_ERROR else "torch"
    logger.info(
        "float32 products on this CPU: %s (oneDNN takes %.2f of torch's time, with %.1f times its "
        "error, as measured first on this processor); --cpu-matmul forces a way",
        *(way, 1 / found.gain, found.error),
    )
    return way
