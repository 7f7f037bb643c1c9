"""What fairseq-train printed with `--log-format json`, as numbers."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fairseq_evomoe.compat.running import DETAIL

Row = dict[str, float]


@dataclass
class RunLog:
    """One run's log.

    Attributes:
        name: of the run.
        train: a row every `--log-interval` updates; with "tokens", all target tokens so far.
        valid: a row every validation; the keys without their prefix "valid_".
    """

    name: str
    train: list[Row] = field(default_factory=list)
    valid: list[Row] = field(default_factory=list)

    def series(self, x: str, y: str, *, rows: str = "train") -> tuple[list[float], list[float]]:
        """Columns x and y of the rows that have both; of "train" or of "valid" rows."""
        found = [(r[x], r[y]) for r in getattr(self, rows) if x in r and y in r]
        return [a for a, _ in found], [b for _, b in found]

    @property
    def layers(self) -> dict[str, list[str]]:
        """MoE layer -> the keys of its experts' load; the encoder first, layers by number."""
        keys = {k for r in self.train for k in r if k.startswith(DETAIL)}
        number = lambda text: int("".join(c for c in text if c.isdigit()) or 0)
        found: dict[str, list[str]] = {}
        for key in sorted(keys, key=lambda k: number(k.split("/")[2])):
            found.setdefault(key.split("/")[1], []).append(key)
        order = sorted(found, key=lambda n: (n.startswith("decoder"), number(n)))
        return {n: found[n] for n in order}


def _rows(lines: list[str], kind: str) -> list[Row]:
    marker = f"| {kind} | {{"
    found = [json.loads("{" + line.split(marker, 1)[1]) for line in lines if marker in line]
    return [{k: float(v) for k, v in row.items() if v is not None} for row in found]


def read_log(path: Path, name: str | None = None) -> RunLog:
    """Read a log; of a run that was resumed, updates that were made again count once.

    Raises:
        ValueError: it has no line of training.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    log = RunLog(name or path.parent.name)
    by_update: dict[float, Row] = {}
    for row in _rows(lines, "train_inner"):
        by_update[row["num_updates"]] = row
    log.train = [by_update[n] for n in sorted(by_update)]
    if not log.train:
        raise ValueError(f"{path}: no line of training: was it written with --log-format json?")
    tokens = before = 0.0
    for row in log.train:
        tokens += row.get("wpb", 0.0) * (row["num_updates"] - before)
        before = row["num_updates"]
        row["tokens"] = tokens
    place = {row["num_updates"]: row for row in log.train}
    for row in _rows(lines, "valid"):
        row = {k.removeprefix("valid_"): v for k, v in row.items()}
        nearest = min(place, key=lambda n: abs(n - row["num_updates"]))
        row["tokens"] = place[nearest]["tokens"]
        row["wall"] = place[nearest].get("wall", 0.0)
        log.valid.append(row)
    return log
