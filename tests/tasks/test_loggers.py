"""compat/loggers.py: what TensorBoard, Weights & Biases and Aim get of the experts' load."""

import json
import sys
from pathlib import Path

import pytest
from conftest import run, tool, train_args

from fairseq_evomoe.compat.loggers import loads_of

FLAGS = ("--evo-spawn-update", 2, "--dts-anneal-updates", 2, "--max-update", 6)


def train(toy, folder, *flags):
    args = train_args(toy, folder, *FLAGS, "--log-interval", 1, *flags)
    args.remove("--disable-validation")
    return run(tool("fairseq-train"), *args)


def loads_in_json(out):
    """Layer -> shares of its experts in the last training line of a JSON log."""
    line = [x for x in out.splitlines() if "| train_inner | {" in x][-1]
    return loads_of(json.loads(line.split("| train_inner | ")[1]))[1]


def test_loads_are_put_apart():
    """Experts are in the order of their numbers; a layer with its base expert alone is left out."""
    stats = {f"moe_load/decoder.1/e{e}": e / 66 for e in (10, 1, 0, *range(2, 10), 11)}
    rest, loads = loads_of({"loss": 3, **stats, "moe_load/encoder.1/e0": 1.0})
    assert rest == {"loss": 3}
    assert loads == {"decoder.1": [e / 66 for e in range(12)]}


def test_tensorboard(toy, tmp_path):
    """A layer's load is one histogram whose bars are the shares in the JSON log."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train(toy, tmp_path, "--tensorboard-logdir", tmp_path / "tb")
    for tag in ("train_inner", "valid"):
        events = EventAccumulator(str(tmp_path / "tb" / tag), {"histograms": 0, "scalars": 0})
        events.Reload()
        names = events.Tags()
        assert set(names["histograms"]) == {"moe_load/encoder.1", "moe_load/decoder.1"}
        assert "moe_active_experts" in names["scalars"]
        assert not [n for n in names["scalars"] if "moe_load/" in n]
    events = EventAccumulator(str(tmp_path / "tb/train_inner"), {"histograms": 0})
    events.Reload()
    for layer, shares in loads_in_json(out).items():
        found = events.Histograms(f"moe_load/{layer}")
        assert [event.step for event in found] == [3, 4, 5, 6]
        bars = found[-1].histogram_value
        assert list(bars.bucket_limit) == [1, 2, 3, 4]
        assert list(bars.bucket) == pytest.approx(shares)


READ_WANDB = """
import json, struct, sys
from wandb.proto import wandb_internal_pb2
data = open(sys.argv[1], "rb").read()
at, parts, rows = 7, b"", {}  # the file is a LevelDB log: blocks of 32 KiB, records in pieces
while at < len(data):
    if 32768 - at % 32768 < 7:
        at += 32768 - at % 32768
        continue
    _, length, kind = struct.unpack("<IHB", data[at : at + 7])
    parts += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
        record, parts = wandb_internal_pb2.Record.FromString(parts), b""
        for item in record.history.item:
            rows["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
print("rows", json.dumps(rows))
"""

READ_AIM = """
import json, sys, aim
from aim.sdk.index_manager import RepoIndexManager
repo = aim.Repo(sys.argv[1])
(name,) = repo.list_all_runs()
RepoIndexManager.get_index_manager(repo).index(name)  # as `aim up` does in the background
rows = {}
for query in repo.query_metrics, repo.query_distributions:
    for run in query("", report_mode=0).iter_runs():
        for found in run:
            if found.context.to_dict().get("tag") == "train_inner":
                rows[found.name] = found.data.items_list()[1][0][-1]
for name, last in rows.items():
    if name.startswith("moe_load/"):
        rows[name] = {"values": last.weights.tolist(), "bins": list(last.range)}
print("rows", json.dumps(rows))
"""


def trained_with(package, toy, tmp_path, *flags, env):
    """Train with a package that lies beside the environment, as its import takes a second."""
    folder = Path(sys.prefix) / "beside"
    if not (folder / package).exists():
        pytest.skip(f"{package} is not installed in {folder}; tests/run.sh says how")
    env = {"PYTHONPATH": str(folder), **env}
    args = train_args(toy, tmp_path, *FLAGS, "--log-interval", 1, *flags)
    args.remove("--disable-validation")
    loads = loads_in_json(run(sys.executable, tool("fairseq-train"), *args, env=env))
    assert set(loads) == {"encoder.1", "decoder.1"}

    def read(script, path):
        printed = run(sys.executable, "-c", script, path, env=env).split("rows ")[-1]
        # Aim's threads may complain when the interpreter ends
        return json.JSONDecoder().raw_decode(printed)[0]

    return loads, read


def test_wandb_offline(toy, tmp_path):
    """Without a network the run is written to a folder, with a histogram per layer."""
    env = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    loads, read = trained_with("wandb", toy, tmp_path, "--wandb-project", "tried", env=env)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = read(READ_WANDB, path)
    assert "train_inner/loss" in rows and "valid/loss" in rows
    assert not [name for name in rows if "/e0" in name]
    for layer, shares in loads.items():
        name = f"train_inner/moe_load/{layer}"
        assert rows[f"{name}/_type"] == "histogram" and rows[f"{name}/bins"] == [0, 1, 2, 3, 4]
        assert rows[f"{name}/values"] == pytest.approx(shares)


def test_aim(toy, tmp_path):
    """The run is in the repository, with a distribution per layer."""
    loads, read = trained_with("aim", toy, tmp_path, "--aim-repo", tmp_path, env={})
    rows = read(READ_AIM, tmp_path)
    assert "loss" in rows and not [name for name in rows if "/e0" in name]
    for layer, shares in loads.items():
        row = rows[f"moe_load/{layer}"]
        assert row["bins"] == [0, 4] and row["values"] == pytest.approx(shares)
