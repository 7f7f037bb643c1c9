"""Shared fixtures: one-thread determinism, poisoned memory, a toy corpus, the real commands."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent / "kits"))

import forks
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # Triton reads this when it is first imported, by whichever test comes first
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
USER_DIR = ROOT / "fairseq_evomoe"


SLOW = {"cli", "models", "parallel", "recipes", "tasks", "tools"}
"""Folders whose tests train models or run commands; single files elsewhere say so themselves."""


def pytest_collection_modifyitems(items):
    """Mark slow tests, and every test that runs on a GPU if there is one (`-m gpu`).

    Slow tests come first, so that no process is left with a long file when the others have ended.
    """
    for item in items:
        if SLOW & set(item.path.relative_to(ROOT / "tests").parts):
            item.add_marker("slow")
        if hasattr(getattr(item, "module", None), "DEVICE"):
            item.add_marker("gpu")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random stream, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fill torch.empty with NaN, so that an output element that no kernel writes fails the test."""

    def poison(original):
        def wrapper(*args, **kwargs):
            t = original(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def force():
    """Enter a context manager for the rest of the test, as in `force(backend.use("torch"))`."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


@pytest.fixture
def triton_can(monkeypatch):
    """Let Triton kernels run: on a GPU if there is one, otherwise in Triton's interpreter."""
    if DEVICE == "cpu":
        from fairseq_evomoe.kernels import backend

        monkeypatch.setattr(backend, "triton_unsupported", lambda device: "")


def run(*command, cwd=None, env=None, ok=True, timeout=600, real=False):
    """Run a real command and return its standard output and error in one string.

    A console script that `tool` names runs in a fork of this process, which saves it the seconds
    that importing torch and fairseq takes. Any other command, and every one if `real` is true, runs
    as a process of its own.
    """
    command = [str(c) for c in command]
    env = {"OMP_NUM_THREADS": "1", **(env or {})}
    path = Path(command[0])
    ours = path.parent == Path(sys.executable).parent and path.name in forks.SCRIPTS
    if ours and not real:
        status, said = _fork(path.name, command[1:], cwd, env, timeout)
    else:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        status, said = done.returncode, done.stdout
    if ok:
        assert status == 0, f"{command} exited {status}\n{said[-6000:]}"
    else:
        assert status != 0, f"{command} should have failed\n{said[-3000:]}"
    return said


def _fork(name, words, cwd, env, timeout):
    """Call a console script's function in a fork; return its exit status and all it printed."""
    with tempfile.TemporaryFile("w+") as output:
        process = torch.multiprocessing.get_context("fork").Process(
            target=_call, args=(name, words, cwd or ".", {**os.environ, **env}, output.fileno())
        )
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            output.seek(0)
            raise AssertionError(f"{name} {words} took over {timeout} s\n{output.read()[-6000:]}")
        output.seek(0)
        return process.exitcode, output.read()


def _call(name, words, cwd, env, output):
    for stream in (1, 2):
        os.dup2(output, stream)
    forks.call(name, words, cwd, env)


def tool(name):
    """Path of a console script of this environment."""
    return Path(sys.executable).parent / name


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Folder of a word-level toy corpus, binarised by the real fairseq-preprocess."""
    from recipes.quickstart import grammar

    folder = tmp_path_factory.mktemp("toy")
    splits = grammar.corpus(train=400, valid=40, test=43, seed=5)
    for split, pairs in splits.items():
        for lang, side in (("en", 0), ("de", 1)):
            text = "\n".join(p[side] for p in pairs) + "\n"
            (folder / f"{split}.{lang}").write_text(text, encoding="utf-8")
    for name, end, kind in (
        ("bin", "", ("-s", "en", "-t", "de", "--joined-dictionary")),
        ("mono", ".en", ("--only-source",)),
    ):
        texts = [x for s in ("train", "valid", "test") for x in (f"--{s}pref", folder / (s + end))]
        run(
            tool("fairseq-preprocess"),
            *(*kind, "--workers", "1", "--destdir", folder / name, *texts),
        )
    return folder


FAMILIES = {
    "translation": (
        *("--task", "translation_evomoe", "-s", "en", "-t", "de", "--share-all-embeddings"),
        *("--arch", "transformer_evomoe", "--encoder-layers", 2, "--decoder-layers", 2),
        *("--encoder-embed-dim", 32, "--encoder-ffn-embed-dim", 64),
        *("--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
        *("--criterion", "moe_label_smoothed_cross_entropy", "--label-smoothing", 0.1),
    ),
    "lm": (
        *("--task", "language_modeling_evomoe", "--tokens-per-sample", 32),
        *("--sample-break-mode", "eos", "--arch", "transformer_lm_evomoe"),
        *("--share-decoder-input-output-embed", "--decoder-layers", 2),
        *("--decoder-embed-dim", 32, "--decoder-ffn-embed-dim", 64),
        *("--decoder-attention-heads", 2, "--criterion", "moe_cross_entropy"),
    ),
    "mlm": (
        *("--task", "masked_lm_evomoe", "--tokens-per-sample", 32, "--sample-break-mode", "eos"),
        *("--arch", "roberta_evomoe", "--encoder-layers", 2, "--encoder-embed-dim", 32),
        *("--encoder-ffn-embed-dim", 64, "--encoder-attention-heads", 2),
        *("--criterion", "moe_masked_lm"),
    ),
}
"""Flags of a tiny model of each family."""


def train_args(toy, save_dir, *extra, family="translation"):
    """Arguments of fairseq-train for a tiny model on the toy corpus, which later flags override."""
    return [
        str(a)
        for a in (
            toy / ("bin" if family == "translation" else "mono"),
            *("--user-dir", USER_DIR, *FAMILIES[family]),
            *("--optimizer", "adam", "--lr", 0.003, "--lr-scheduler", "fixed"),
            *("--max-tokens", 400, "--max-update", 30, "--seed", 7, "--num-workers", 0, "--cpu"),
            *("--save-dir", save_dir, "--no-epoch-checkpoints"),
            *("--log-format", "json", "--log-interval", 1, "--disable-validation"),
            *extra,
        )
    ]


class _Rows(logging.Handler):
    """Collects the JSON lines of one kind: `train_inner` (one line per update) or `valid`."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.rows = []

    def emit(self, record):
        if record.name == self.kind:
            row = json.loads(record.getMessage())
            self.rows.append({k: float(v) for k, v in row.items() if v is not None})


def train(*args, kind="train_inner"):
    """Run the real fairseq-train in this process; return its log lines of one kind as numbers."""
    from fairseq.logging import progress_bar
    from fairseq_cli.train import cli_main

    collector = _Rows(kind)
    progress_bar.logger.setLevel(logging.INFO)
    progress_bar.logger.addHandler(collector)
    before, sys.argv = sys.argv, ["fairseq-train", *args]
    try:
        cli_main()
    finally:
        sys.argv = before
        progress_bar.logger.removeHandler(collector)
    return collector.rows


def _worker(rank, workers, port, args, lines):
    os.environ.update(
        {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        | {"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)}
    )
    torch.set_num_threads(1)
    try:
        lines.put((rank, train(*args)))
    except BaseException as error:
        lines.put((rank, "".join(traceback.format_exception(error))))
        os._exit(1)


def train_workers(workers, *args):
    """Run the real fairseq-train in `workers` processes, as torchrun does; return rank 0's lines.

    The processes are forks of this one, so that none of them spends seconds on importing fairseq.
    """
    from fairseq_evomoe.compat.running import free_port

    context = torch.multiprocessing.get_context("fork")
    lines = context.SimpleQueue()
    port = free_port()
    started = [
        context.Process(target=_worker, args=(rank, workers, port, args, lines))
        for rank in range(workers)
    ]
    for process in started:
        process.start()
    found = {}
    while len(found) < workers:
        rank, said = lines.get()
        found[rank] = said
        if isinstance(said, str):
            for process in started:
                process.kill()
            raise AssertionError(said)
    for process in started:
        process.join()
    return found[0]


def build(toy, *extra, family="translation"):
    """Build (config, task, model) from the real command line, on the toy corpus."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    parser = options.get_training_parser()
    flags = train_args(toy, toy / "unused", *extra, family=family)
    args = options.parse_args_and_arch(parser, flags)
    cfg = convert_namespace_to_omegaconf(args)
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    return cfg, task, task.build_model(cfg.model)


def valid_batch(task, rows=6):
    """The first sentences of the toy corpus's valid set, as one batch."""
    task.load_dataset("valid")
    data = task.dataset("valid")
    return data.collater([data[i] for i in range(rows)])
