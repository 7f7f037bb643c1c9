"""Kill a training run again and again, resume it, and compare it with an undisturbed one.

    python tests/cli/soak.py DATA OUT [--rounds N]

DATA is a binarised toy corpus (tests/conftest.py makes one). Prints one JSON line per kill, with
its stage and moment, and a last line with the number of kills and the largest differences in
weights, optimizer moments and last loss between the killed run and the undisturbed one. Each
attempt is a forked process, so that libraries are imported once.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from conftest import train, train_args
from fairseq import checkpoint_utils, file_io
from fairseq.trainer import Trainer

import fairseq_evomoe  # noqa: F401
from fairseq_evomoe.modules.split import Split

UPDATES = 18
STAGES = ("--evo-spawn-update", 6, "--dts-anneal-updates", 6, "--dts-hard-update", 13)
PLAN = (
    ("update", 1), ("update", 3), ("write", 1), ("copy", 1), ("update", 4), ("split", 1),
    ("write", 2), ("copy", 2), ("update", 3),
)  # fmt: skip
"""Moments of the kills, in turn: before the n-th update of an attempt, half-way through its n-th
write of a checkpoint, half-way through its n-th copy to another name, or in a split between its
weights and its moments.
"""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, n: int) -> None:
    """Make this process kill itself at a moment."""
    seen = count(1)

    def before(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if next(seen) == n:
                die()
            return real(*args, **kwargs)

        setattr(owner, name, call)

    if moment == "update":
        before(Trainer, "train_step")
    elif moment == "split":
        before(Split, "moments_")
    elif moment == "write":
        real_save = checkpoint_utils._torch_persistent_save

        def save(state: Any, file: Any) -> None:
            real_save(state, file)
            if next(seen) == n:
                file.flush()
                os.truncate(file.name, file.tell() // 2)
                die()

        checkpoint_utils._torch_persistent_save = save
    elif moment == "copy":
        real_copy = shutil.copyfile

        def copy(source: Any, target: Any, **kwargs: Any) -> Any:
            real_copy(source, target, **kwargs)
            if next(seen) == n:
                os.truncate(target, os.path.getsize(target) // 2)
                die()
            return target

        shutil.copyfile = file_io.shutil.copyfile = copy


def attempt(args: list[str], log: Path, moment: tuple[str, int] | None) -> int:
    """Train in a forked process; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("a") as f:
                os.dup2(f.fileno(), 1)
                os.dup2(f.fileno(), 2)
            if moment:
                arm(*moment)
            rows = train(*args)
            log.with_suffix(".json").write_text(json.dumps(rows[-1]))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def updates_done(folder: Path) -> int:
    last = folder / "checkpoint_last.pt"
    if not last.exists():
        return 0
    return torch.load(last, weights_only=False)["optimizer_history"][-1]["num_updates"]


def stage_at(update: int) -> str:
    return "diversify" if update < 6 else "sparsify" if update < 13 else "hard"


def difference(a: Any, b: Any) -> float:
    """Largest difference of all numbers in two nested structures."""
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max((difference(a[k], b[k]) for k in a), default=0.0)
    if isinstance(a, list | tuple):
        return max((difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)
    return abs(a - b) if isinstance(a, int | float) else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="how often to go through the plan")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    def args(name: str) -> list[str]:
        flags = (*STAGES, "--max-update", UPDATES, "--save-interval-updates", 2)
        return train_args(options.data, options.out / name, *flags, "--keep-interval-updates", 2)

    code = attempt(args("calm"), options.out / "calm.log", None)
    assert code == 0, (options.out / "calm.log").read_text()[-3000:]
    soaked, log, kills = options.out / "killed", options.out / "killed.log", 0
    for moment in PLAN * options.rounds:
        done = updates_done(soaked)
        code = attempt(args("killed"), log, moment)
        if code == 0:
            # the run finished before the moment came, and the next attempt starts a new run
            shutil.rmtree(soaked)
            continue
        assert code == -signal.SIGKILL, f"{moment}: {log.read_text()[-3000:]}"
        kills += 1
        print(json.dumps({"after": done, "stage": stage_at(done), "moment": moment}), flush=True)
    if (code := attempt(args("killed"), log, None)) != 0:
        raise SystemExit(f"exit {code}: {log.read_text()[-3000:]}")
    states = [
        torch.load(options.out / n / "checkpoint_last.pt", weights_only=False)
        for n in ("calm", "killed")
    ]
    losses = [json.loads((options.out / f"{n}.json").read_text()) for n in ("calm", "killed")]
    result = {
        "kills": kills,
        "weights": difference(*(s["model"] for s in states)),
        "moments": difference(*(s["last_optimizer_state"]["state"] for s in states)),
        "loss": abs(losses[0]["loss"] - losses[1]["loss"]),
        "left": sorted(p.name for p in soaked.iterdir() if p.suffix != ".pt"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
