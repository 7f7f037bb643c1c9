"""Shared by all tests: one-thread determinism, poisoned memory, a toy corpus, the real commands."""

import json
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # read when Triton is imported, by whichever test comes first
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
USER_DIR = ROOT / "fairseq_evomoe"


def pytest_collection_modifyitems(items):
    """`-m gpu` selects every test that runs on a GPU where there is one."""
    for item in items:
        if hasattr(getattr(item, "module", None), "DEVICE"):
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random stream, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty yields NaN: an output cell that no kernel wrote makes the test fail."""

    def poison(original):
        def wrapper(*args, **kwargs):
            t = original(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def triton_can(monkeypatch):
    """Triton's kernels can serve: on a GPU where there is one, else by the interpreter."""
    if DEVICE == "cpu":
        from fairseq_evomoe.kernels import backend

        monkeypatch.setattr(backend, "without_triton", lambda device: "")


def run(*command, cwd=None, env=None, ok=True, timeout=600):
    """Run a real command; its standard output and error together, in one string."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    if ok:
        assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout[-6000:]}"
    else:
        assert done.returncode != 0, f"{command} should have failed\n{done.stdout[-3000:]}"
    return done.stdout


def tool(name):
    """Path of a console script of this environment."""
    return Path(sys.executable).parent / name


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A binarised toy corpus, word level, from the real fairseq-preprocess; its folder."""
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
    """fairseq-train on the toy corpus with a tiny model; later flags win."""
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
    """Collects the JSON lines of one kind: `train_inner`, one an update, or `valid`."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.rows = []

    def emit(self, record):
        if record.name == self.kind:
            row = json.loads(record.getMessage())
            self.rows.append({k: float(v) for k, v in row.items() if v is not None})


def train(*args, kind="train_inner"):
    """The real fairseq-train in this process; the lines of one kind that it logged, as numbers."""
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
    """The real fairseq-train in `workers` processes, as torchrun starts them; the first's lines.

    They are forks of this process, which spares each the seconds in which fairseq is imported.
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
    """(config, task, model) from the real command line, on the toy corpus."""
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
