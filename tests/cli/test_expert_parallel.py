"""--expert-parallel with the real fairseq-train, one process per worker."""

import re

import pytest
import torch
from conftest import USER_DIR, build, run, tool, train, train_args, train_workers

STAGES = ("--evo-spawn-update", 4, "--dts-anneal-updates", 4, "--dts-hard-update", 9)
# fairseq gives all workers the same random stream, so random draws differ from one worker's
QUIET = (*STAGES, "--dts-noise", "none", "--dropout", 0, "--attention-dropout", 0)
COMMON = (*QUIET, "--max-update", 12, "--clip-norm", 0.5)
# clip is 100 if gnorm, which is compared itself, is above a threshold, and else 0
IGNORED = re.compile("wall|wps|ups|wpb|gb_free|clip")


def trained(toy, folder, *flags, workers=1, apart=False, family="translation", per_update=4):
    """Log lines of a run on `workers` workers, with `per_update` batches per update in all."""
    flags = (*COMMON, "--update-freq", per_update // workers, *flags)
    args = train_args(toy, folder, *flags, family=family)
    args += ["--expert-parallel"] if apart else []
    lines = train(*args) if workers == 1 else train_workers(workers, *args)
    return [{k: v for k, v in row.items() if not IGNORED.search(k)} for row in lines]


def close(one, other, digits=2e-3):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=digits, abs=digits), (key, a["num_updates"])


def state(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=False)


def same_tensors(one, other, atol):
    """Assert that tensors are equal to `atol`, except for one element in a thousand.

    Where a gradient is only rounding error, Adam still makes a step of the learning rate's size.
    """
    assert one.keys() == other.keys()
    for key in one:
        if isinstance(one[key], dict):
            same_tensors(one[key], other[key], atol)
        elif isinstance(one[key], torch.Tensor):
            far = ~torch.isclose(one[key].float(), other[key].float(), atol=atol)
            assert far.float().mean() <= 1e-3, key


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    """The run of one worker, its checkpoints of updates 2, 4, 6, ..., and its lines."""
    folder = tmp_path_factory.mktemp("one") / "save"
    return folder, trained(toy, folder, "--save-interval-updates", 2)


@pytest.fixture(scope="module")
def four(toy, tmp_path_factory):
    """The same run on four workers with an expert each."""
    folder = tmp_path_factory.mktemp("four") / "save"
    flags = ("--save-interval-updates", 2)
    return folder, trained(toy, folder, *flags, workers=4, apart=True)


@pytest.fixture(scope="module")
def two(toy, tmp_path_factory):
    """The same run on two workers with two experts each."""
    folder = tmp_path_factory.mktemp("two") / "save"
    flags = ("--save-interval-updates", 2)
    return folder, trained(toy, folder, *flags, workers=2, apart=True)


@pytest.mark.parametrize("workers", ["two", "four"])
def test_equals_one_worker(one, workers, request):
    """Logs, weights and moments equal one worker's, though some workers run out of batches."""
    folder, lines = request.getfixturevalue(workers)
    close(one[1], lines)
    want, have = state(one[0]), state(folder)
    same_tensors(want["model"], have["model"], 1e-3)
    same_tensors(want["last_optimizer_state"]["state"], have["last_optimizer_state"]["state"], 1e-4)
    assert not list(folder.glob("*rank*")) and not list(folder.glob("experts*"))


WORKERS = {"one": 1, "two": 2, "four": 4}
BEFORE_THE_SPLIT = (("one", 4), ("four", 1), ("four", 2))


@pytest.mark.parametrize(
    ("update", "writers", "readers"),
    [
        *((2, writers, readers) for writers, readers in BEFORE_THE_SPLIT),
        *((6, writers, readers) for writers in WORKERS for readers in WORKERS.values()),
    ],
    ids=str,
)
def test_resumes_on_any_number_of_workers(toy, tmp_path, writers, readers, update, request, one):
    """A checkpoint of 1, 2 or 4 workers, resumed on 1, 2 or 4, continues one worker's curve."""
    folder, _ = request.getfixturevalue(writers)
    (saved,) = folder.glob(f"checkpoint_*_{update}.pt")
    flags = ("--restore-file", saved)
    resumed = trained(toy, tmp_path / "save", *flags, workers=readers, apart=readers > 1)
    assert [r["num_updates"] for r in resumed] == list(range(update + 1, 13))
    close(one[1][update:], resumed)


def test_one_process_reads_it(four, toy):
    """fairseq-generate in a single process loads the checkpoint of four workers as it is."""
    out = run(
        tool("fairseq-generate"),
        toy / "bin",
        *("--user-dir", USER_DIR, "--cpu", "--source-lang", "en", "--target-lang", "de"),
        *("--path", four[0] / "checkpoint_last.pt", "--beam", 1, "--max-len-b", 10),
    )
    assert len(re.findall(r"^H-\d+", out, flags=re.MULTILINE)) == 43


KINDS = {
    "replicas": ("translation", "--expert-parallel-size", 2),
    "shared": ("translation", "--moe-shared-expert"),
    "look-ups": ("translation", "--moe-expert-type", "memory", "--memory-bits", 4),
    "gshard": (
        *("translation", "--moe-gate", "gshard", "--moe-second-expert-policy", "all"),
        *("--moe-capacity-factor", 1.0),
    ),
    # rounding sometimes makes its assignment swap two tokens, which matters little if experts are
    # nearly alike
    "base": (
        *("translation", "--moe-gate", "base"),
        *("--evo-diversify", "mask", "--evo-diversify-ratio", 0.2),
    ),
    "stable": ("translation", "--moe-gate", "stable", "--stable-freeze-update", 7),
    "lm": ("lm", "--moe-balance-bias", 0.01),
    "mlm": ("mlm",),
    "recomputed": ("translation", "--checkpoint-activations"),
    "ema": ("translation", "--store-ema", "--ema-decay", 0.9, "--ema-fp32"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_one_worker(toy, tmp_path, kind):
    """Gates, experts, model families, replicated experts and averages train as on one worker."""
    family, *flags = KINDS[kind]
    workers = 4 if kind == "replicas" else 2
    own = () if kind == "replicas" else flags
    alone = trained(toy, tmp_path / "a", *own, family=family)
    apart = trained(toy, tmp_path / "b", *flags, workers=workers, apart=True, family=family)
    close(alone, apart)
    want, have = state(tmp_path / "a"), state(tmp_path / "b")
    same_tensors(want["model"], have["model"], 1e-3)
    for key in ("ema", "ema_fp32_params"):
        if key in want["extra_state"]:
            same_tensors(want["extra_state"][key], have["extra_state"][key], 1e-3)


HALF = {
    "bf16": ("--bf16",),
    "memory-efficient-bf16": ("--bf16", "--memory-efficient-bf16"),
    "fp16": ("--fp16", "--fp16-no-flatten-grads", "--fp16-init-scale", 4),
    "memory-efficient-fp16": ("--fp16", "--memory-efficient-fp16", "--fp16-init-scale", 4),
}


@pytest.mark.parametrize("layout", HALF)
def test_half_precision(toy, tmp_path, layout):
    """Masters and moments are sharded too, and a run resumed in the middle continues as before."""
    flags = (*HALF[layout], "--save-interval-updates", 6)
    whole = trained(toy, tmp_path / "a", *flags, workers=2, apart=True)
    (saved,) = (tmp_path / "a").glob("checkpoint_*_6.pt")
    flags = (*flags, "--restore-file", saved)
    resumed = trained(toy, tmp_path / "b", *flags, workers=2, apart=True)
    # fairseq saves no float32 masters, so the first update is the same and later ones nearly so
    assert resumed[0] == whole[6]
    close(whole[6:], resumed, digits=2e-2)
    alone = trained(toy, tmp_path / "c", *HALF[layout])
    for a, b in zip(alone, whole, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-3)


def test_sharded_checkpoints(toy, tmp_path, one):
    """A checkpoint with its experts in a folder beside it resumes on any number of workers.

    fairseq-generate and evomoe-merge read it, and folders of deleted checkpoints are removed.
    """
    flags = ("--expert-parallel-save", "sharded", "--save-interval-updates", 2)
    folder = tmp_path / "a"
    keep = ("--keep-interval-updates", 2)
    lines = trained(toy, folder, *flags, *keep, workers=2, apart=True)
    close(one[1], lines)
    # a folder that the last save made useless is removed by the next save
    assert {p.name.split("-")[1] for p in folder.glob("experts-*")} == {"6", "10", "12"}

    (saved,) = folder.glob("checkpoint_*_6.pt")
    for readers in (1, 4):
        more = (*flags, "--restore-file", saved)
        resumed = trained(toy, tmp_path / f"r{readers}", *more, workers=readers, apart=readers > 1)
        close(one[1][6:], resumed)

    last = folder / "checkpoint_last.pt"
    run(tool("evomoe-merge"), last, "--output", tmp_path / "merged.pt")
    merged = torch.load(tmp_path / "merged.pt", weights_only=True)
    want = state(one[0])
    same_tensors(want["model"], merged["model"], 1e-3)
    same_tensors(
        want["last_optimizer_state"]["state"], merged["last_optimizer_state"]["state"], 1e-4
    )
    generate = ("--user-dir", USER_DIR, "--cpu", "--source-lang", "en", "--target-lang", "de")
    search = ("--beam", 1, "--max-len-b", 10)
    outs = [
        re.findall(
            r"^H-.*$",
            run(tool("fairseq-generate"), toy / "bin", *generate, "--path", path, *search),
            flags=re.MULTILINE,
        )
        for path in (last, tmp_path / "merged.pt")
    ]
    assert len(outs[0]) == 43 and outs[0] == outs[1]

    moved = tmp_path / "moved.pt"
    moved.write_bytes(last.read_bytes())
    said = run(tool("evomoe-merge"), moved, "--output", tmp_path / "x.pt", ok=False)
    assert "needs the folder of its experts beside it" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--expert-parallel-size", 2), "--expert-parallel-size 2: give --expert-parallel too"),
        (("--expert-parallel", "--fp16"), "--fp16: not with --expert-parallel: flattened"),
        (("--expert-parallel", "--amp"), "--amp: not with --expert-parallel"),
        (
            ("--expert-parallel", "--eval-bleu"),
            "score checkpoints with fairseq-generate",
        ),
        (("--expert-parallel", "--zero-sharding", "os"), "--zero-sharding os: not with"),
        (
            (
                *("--expert-parallel", "--expert-parallel-save", "sharded"),
                "--write-checkpoints-asynchronously",
            ),
            "leave it out",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(toy, flags, said):
    """Unsupported flags are refused before training, with the flag and the fix."""
    with pytest.raises(ValueError, match=re.escape(said)):
        build(toy, *flags)


def test_a_size_that_does_not_divide(toy, tmp_path):
    """With --expert-parallel-size 3, two workers and four experts, the error lists valid sizes."""
    flags = ("--distributed-world-size", 2, "--expert-parallel", "--expert-parallel-size", 3)
    out = run(tool("fairseq-train"), *train_args(toy, tmp_path, *flags), ok=False, cwd=tmp_path)
    assert "choose one of 1, 2" in out
