"""What the benchmarks share: interleaved timing, the machine's name, rows of a csv."""

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def interleave(
    functions: Mapping[str, Callable[[], Any]], rounds: int, *, warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of each function in each round, after `warm` rounds that are not counted.

    All functions run in every round, in alternating order. So whatever slows the machine down for a
    moment affects all of them alike, and no function always finds another's data in the cache.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + warm):
        order = list(functions.items())
        for name, function in order if turn % 2 else reversed(order):
            start = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if turn >= warm:
                times[name].append(time.perf_counter() - start)
    return times


def ratios(times: Mapping[str, Sequence[float]], name: str, to: str) -> dict[str, float]:
    """Median, 20th and 80th percentile of the rounds' ratios `name` / `to`, as csv columns."""
    each = sorted(a / b for a, b in zip(times[name], times[to], strict=True))
    at = lambda q: round(each[round(q * (len(each) - 1))], 3)
    return {
        "ratio_p50": round(statistics.median(each), 3),
        "ratio_p20": at(0.2),
        "ratio_p80": at(0.8),
    }


def milliseconds(times: Sequence[float]) -> float:
    return round(1e3 * statistics.median(times), 4)


def gemm_rate(size: int = 1024, **like: Any) -> float:
    """FLOP/s of a matrix product on this machine. `like` is dtype and device, as in torch.randn."""
    a, b = torch.randn(size, size, **like), torch.randn(size, size, **like)
    seconds = interleave({"mm": lambda: torch.mm(a, b)}, 9)["mm"]
    return 2 * size**3 / statistics.median(seconds)


def copy_rate(size: int = 2**26, device: str = "cpu") -> float:
    """Bytes/s that a copy of `size` bytes reads (it writes as many)."""
    a = torch.ones(size // 4, device=device)
    b = torch.empty_like(a)
    return size / statistics.median(interleave({"copy": lambda: b.copy_(a)}, 9)["copy"])


def cpu_name() -> str:
    """The processor's name and widest vector units, since one name may stand for generations."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(": ")[1] for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    units = next((x.split() for x in lines if x.startswith("flags")), [])
    widest = [u for u in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if u in units]
    return ", ".join([name, *widest[:1]])


def machine(device: str = "cpu") -> dict[str, Any]:
    """Columns that say where a row was measured."""
    return {
        "threads": torch.get_num_threads(),
        "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def append(path: Path | None, fields: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Append rows to a csv, with a header if the file is new. Do nothing if `path` is None."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
