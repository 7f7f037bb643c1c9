"""Reads the metrics that fairseq-train prints with `--log-format json`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fairseq_evomoe.compat.loggers import DETAIL

Row = dict[str, float]


@dataclass
class RunLog:
    """The log of one run.

    Attributes:
        name: name of the run.
        train: one row every `--log-interval` updates. "tokens" is the number of target tokens so
            far.
        valid: one row per validation, with the prefix "valid_" removed from the keys. "tokens" and
            "wall" are those of the nearest training row.
    """

    name: str
    train: list[Row] = field(default_factory=list)
    valid: list[Row] = field(default_factory=list)

    def series(self, x: str, y: str, *, rows: str = "train") -> tuple[list[float], list[float]]:
        """Return columns x and y of the "train" or "valid" rows that have both."""
        found = [(r[x], r[y]) for r in getattr(self, rows) if x in r and y in r]
        return [a for a, _ in found], [b for _, b in found]

    @property
    def layers(self) -> dict[str, list[str]]:
        """Map each MoE layer, encoder first and sorted by number, to its experts' load keys."""
        keys = {k for r in self.train for k in r if k.startswith(DETAIL)}
        number = lambda text: int("".join(c for c in text if c.isdigit()) or 0)
        found: dict[str, list[str]] = {}
        for key in sorted(keys, key=lambda k: number(k.split("/")[2])):
            found.setdefault(key.split("/")[1], []).append(key)
        order = sorted(found, key=lambda n: (n.startswith("decoder"), number(n)))
        return {n: found[n] for n in order}


def _rows(path: Path, lines: list[bytes], kind: str) -> list[Row]:
    marker = f"| {kind} | {{".encode()
    found = []
    for number, line in enumerate(lines, 1):
        if marker not in line:
            continue
        try:
            row = json.loads(b"{" + line.split(marker, 1)[1])
        except ValueError as error:
            if number == len(lines):
                # the run is under way, or was ended while it wrote
                continue
            raise ValueError(f"{path}, line {number}: {error}") from error
        found.append({k: float(v) for k, v in row.items() if v is not None})
    return found


DONE = b"| done training in "
"""What fairseq-train logs at its end."""


def is_done(path: Path) -> bool:
    """Whether the last training that wrote to this log has come to its end."""
    text = path.read_bytes()
    return text.rfind(DONE) > text.rfind(b"| train_inner | {")


def read_log(path: Path, name: str | None = None) -> RunLog:
    """Read a log. If a resumed run repeated some updates, only their last rows are kept.

    A last line that is cut is left out.

    Raises:
        ValueError: the log has no training lines, or a broken one.
    """
    lines = path.read_bytes().rstrip(b"\n").split(b"\n")
    log = RunLog(name or path.parent.name)
    by_update: dict[float, Row] = {}
    for row in _rows(path, lines, "train_inner"):
        by_update[row["num_updates"]] = row
    log.train = [by_update[n] for n in sorted(by_update)]
    if not log.train:
        raise ValueError(f"{path} has no training lines; train with --log-format json")
    tokens = before = 0.0
    for row in log.train:
        tokens += row.get("wpb", 0.0) * (row["num_updates"] - before)
        before = row["num_updates"]
        row["tokens"] = tokens
    place = {row["num_updates"]: row for row in log.train}
    for row in _rows(path, lines, "valid"):
        row = {k.removeprefix("valid_"): v for k, v in row.items()}
        nearest = min(place, key=lambda n: abs(n - row["num_updates"]))
        row["tokens"] = place[nearest]["tokens"]
        row["wall"] = place[nearest].get("wall", 0.0)
        log.valid.append(row)
    return log
