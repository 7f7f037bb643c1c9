"""Which library multiplies float32 matrices on a CPU: the one that torch takes, or oneDNN.

torch gives float32 products to MKL, which on some processors uses half of their vector width.
oneDNN uses all of it, but on processors with matrix units for bfloat16 the same setting rounds to
bfloat16. So the choice is made by a measurement of time and error. It is in force only inside
`products`.
"""

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

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


@functools.cache
def choose(wanted: str) -> str:
    """One of `WAYS`: the one that is wanted, or for "auto" the faster one that is as exact.

    The choice is made once per process and logged.

    Raises:
        ValueError: oneDNN is wanted, and this torch is built without it.
    """
    if not torch.backends.mkldnn.is_available():
        if wanted == "onednn":
            raise ValueError("--cpu-matmul onednn: this torch is built without oneDNN; give auto")
        return "torch"
    if wanted != "auto":
        return wanted
    found = measure()
    way = "onednn" if found.gain >= LEAST_GAIN and found.error <= MOST_ERROR else "torch"
    logger.info(
        "float32 products on this CPU: %s (oneDNN takes %.2f of torch's time, with %.1f times its "
        "error); --cpu-matmul forces a way",
        *(way, 1 / found.gain, found.error),
    )
    return way
