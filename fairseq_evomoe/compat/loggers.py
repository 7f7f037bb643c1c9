"""Patches of how fairseq logs: to progress bars, TensorBoard, Weights & Biases, Aim, checkpoints.

The shares of the load of a layer's experts are one histogram per layer, with a bar per expert, and
not a scalar per expert: 12 layers of 64 experts would be 768 charts.
"""

import importlib
import re
from collections.abc import Callable
from typing import Any

import numpy
from fairseq.logging import meters, progress_bar

from fairseq_evomoe.compat.patching import patch

DETAIL = "moe_load/"
"""Prefix of metrics too numerous for a progress bar; JSON logs hold them all."""

EXPERT = re.compile(rf"{re.escape(DETAIL)}(.+)/e(\d+)")

Write = Callable[[str, list[float], int], None]


def loads_of(stats: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Separate the shares of the experts' load from the other metrics.

    Args:
        stats: name -> value of each metric.

    Returns:
        The other metrics, and layer -> share of the load of each of its experts. A layer whose base
        expert has not split has one expert and is left out.
    """
    rest: dict[str, Any] = {}
    found: dict[str, dict[int, float]] = {}
    for key, value in stats.items():
        if expert := EXPERT.fullmatch(key):
            found.setdefault(expert[1], {})[int(expert[2])] = float(getattr(value, "avg", value))
        else:
            rest[key] = value
    shares = {
        layer: [experts.get(i, 0.0) for i in range(max(experts) + 1)]
        for layer, experts in found.items()
    }
    return rest, {layer: values for layer, values in shares.items() if len(values) > 1}


@patch(meters.MetersDict, "load_state_dict", test="tests/criterions/test_table_metrics.py")
def leave_out_other_meters(original: Any) -> Any:
    """Resume after a validation of look-ups, whose meters fairseq saves and does not know."""

    def load_state_dict(self: Any, state_dict: list[tuple[Any, ...]]) -> None:
        # they start anew with each validation
        original(self, [meter for meter in state_dict if meter[2] in vars(meters)])

    return load_state_dict


@patch(progress_bar.BaseProgressBar, "_format_stats", test="tests/test_compat.py")
def shorten_progress_bar(original: Any) -> Any:
    """Leave metrics per layer and expert out of progress bars, where they would hide the rest."""

    def _format_stats(self: Any, stats: dict[str, Any]) -> Any:
        return original(self, {k: v for k, v in stats.items() if DETAIL not in k})

    return _format_stats


def _apart(original: Any, write: Callable[[Any, str | None, dict[str, Any]], Write | None]) -> Any:
    """A method that gives `original` the scalars and `write(self, tag, stats)` each histogram."""

    def log(self: Any, stats: dict[str, Any], tag: str | None = None, step: Any = None) -> None:
        rest, loads = loads_of(stats)
        original(self, rest, tag, step)
        at = stats["num_updates"] if step is None else step
        add = write(self, tag, stats) if loads else None
        if add is not None:
            for layer, shares in loads.items():
                add(DETAIL + layer, shares, int(getattr(at, "val", at)))

    return log


@patch(
    progress_bar.TensorboardProgressBarWrapper,
    "_log_to_tensorboard",
    test="tests/tasks/test_loggers.py",
)
def loads_in_tensorboard(original: Any) -> Any:
    """Write the load of a layer's experts to TensorBoard as one histogram instead of scalars."""

    def write(self: Any, tag: str | None, stats: dict[str, Any]) -> Write | None:
        writer = self._writer(tag or "")
        if writer is None:
            return None

        def add(name: str, shares: list[float], step: int) -> None:
            # expert i has the bar from i to i + 1
            writer.add_histogram_raw(
                name,
                min=0.0,
                max=float(len(shares)),
                num=sum(shares),
                sum=sum(i * s for i, s in enumerate(shares)),
                sum_squares=sum(i * i * s for i, s in enumerate(shares)),
                bucket_limits=[float(i + 1) for i in range(len(shares))],
                bucket_counts=shares,
                global_step=step,
            )
            writer.flush()

        return add

    return _apart(original, write)


@patch(progress_bar.WandBProgressBarWrapper, "_log_to_wandb", test="tests/tasks/test_loggers.py")
def loads_in_wandb(original: Any) -> Any:
    """Log the load of a layer's experts to Weights & Biases as one histogram instead of scalars."""

    def write(self: Any, tag: str | None, stats: dict[str, Any]) -> Write | None:
        wandb = progress_bar.wandb
        if wandb is None:
            return None
        prefix = "" if tag is None else tag + "/"

        def add(name: str, shares: list[float], step: int) -> None:
            edges = list(range(len(shares) + 1))
            wandb.log({prefix + name: wandb.Histogram(np_histogram=(shares, edges))}, step=step)

        return add

    return _apart(original, write)


@patch(progress_bar.AimProgressBarWrapper, "_log_to_aim", test="tests/tasks/test_loggers.py")
def loads_in_aim(original: Any) -> Any:
    """Track the load of a layer's experts in Aim as one distribution instead of scalars."""

    def write(self: Any, tag: str | None, stats: dict[str, Any]) -> Write | None:
        if self.run is None:
            return None
        aim = importlib.import_module("aim")
        subset = "train" if "train" in (tag or "") else "val" if "val" in (tag or "") else None
        context = {"tag": tag} | ({"subset": subset} if subset else {})

        def add(name: str, shares: list[float], step: int) -> None:
            value = aim.Distribution(hist=numpy.array(shares), bin_range=(0, len(shares)))
            self.run.track(value, name=name, step=step, context=context)

        return add

    return _apart(original, write)
