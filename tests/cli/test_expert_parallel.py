"""--expert-parallel through the real fairseq-train, one process a worker."""

import re

import pytest
import torch
from conftest import USER_DIR, build, run, tool, train, train_args, train_workers

STAGES = ("--evo-spawn-update", 4, "--dts-anneal-updates", 4, "--dts-hard-update", 9)
# fairseq gives all workers the same random stream, so what is drawn differs from one worker's
QUIET = (*STAGES, "--dts-noise", "none", "--dropout", 0, "--attention-dropout", 0)
COMMON = (*QUIET, "--max-update", 12, "--clip-norm", 0.5)
# clip says whether gnorm, compared itself, is above a threshold: 0 or 100
IGNORED = re.compile("wall|wps|ups|wpb|gb_free|clip")


def trained(toy, folder, *flags, workers=1, apart=False, family="translation", per_update=4):
    """Lines of a run with `workers`, whose updates are of `per_update` batches in all."""
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
    """Equal to `atol`, but for one element in a thousand.

    Adam makes a step of the learning rate of a gradient that is nothing but rounding.
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
    """And on two workers with two experts each."""
    folder = tmp_path_factory.mktemp("two") / "save"
    flags = ("--save-interval-updates", 2)
    return folder, trained(toy, folder, *flags, workers=2, apart=True)


@pytest.mark.parametrize("workers", ["two", "four"])
def test_equals_one_worker(one, workers, request):
    """Every number logged, weights and moments; some workers have no batch at an epoch's end."""
    folder, lines = request.getfixturevalue(workers)
    close(one[1], lines)
    want, have = state(one[0]), state(folder)
    same_tensors(want["model"], have["model"], 1e-3)
    same_tensors(want["last_optimizer_state"]["state"], have["last_optimizer_state"]["state"], 1e-4)
    assert not list(folder.glob("*rank*")) and not list(folder.glob("experts*"))


@pytest.mark.parametrize("update", [2, 6], ids=["diversify", "sparsify"])
@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("writers", ["one", "two", "four"])
def test_resumes_on_any_number_of_workers(toy, tmp_path, writers, readers, update, request, one):
    """Written by 1, 2 or 4 workers, read by 1, 2 or 4: the curve of the run that nobody stopped."""
    if update == 2 and (writers, readers) not in {("one", 4), ("four", 1), ("four", 2)}:
        pytest.skip("before the split three pairs stand for all")
    folder, _ = request.getfixturevalue(writers)
    (saved,) = folder.glob(f"checkpoint_*_{update}.pt")
    flags = ("--restore-file", saved)
    resumed = trained(toy, tmp_path / "save", *flags, workers=readers, apart=readers > 1)
    assert [r["num_updates"] for r in resumed] == list(range(update + 1, 13))
    close(one[1][update:], resumed)


def test_one_process_reads_it(four, toy):
    """fairseq-generate on a single process takes the checkpoint of four workers as it is."""
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
    "look-ups": ("translation", "--expert-type", "memory", "--memory-bits", 4),
    "gshard": (
        *("translation", "--moe-gate", "gshard", "--moe-second-expert-policy", "all"),
        *("--moe-capacity-factor", 1.0),
    ),
    # rounding makes its assignment swap two tokens now and then; experts that are nearly alike
    # forgive it
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
    """Gates, experts, model families, copies of experts, averages: as one worker trains them."""
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
    """Masters and moments are shared out too: a run resumed in the middle goes on as it was."""
    flags = (*HALF[layout], "--save-interval-updates", 6)
    whole = trained(toy, tmp_path / "a", *flags, workers=2, apart=True)
    (saved,) = (tmp_path / "a").glob("checkpoint_*_6.pt")
    flags = (*flags, "--restore-file", saved)
    resumed = trained(toy, tmp_path / "b", *flags, workers=2, apart=True)
    # fairseq saves no float32 masters: the first update is the same, later ones nearly so
    assert resumed[0] == whole[6]
    close(whole[6:], resumed, digits=2e-2)
    alone = trained(toy, tmp_path / "c", *HALF[layout])
    for a, b in zip(alone, whole, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=5e-3)


def test_sharded_checkpoints(toy, tmp_path, one):
    """Experts in a folder beside the file: resumed by any number of workers, generated from,
    merged; folders of checkpoints that are gone are removed."""
    flags = ("--expert-parallel-save", "sharded", "--save-interval-updates", 2)
    folder = tmp_path / "a"
    keep = ("--keep-interval-updates", 2)
    lines = trained(toy, folder, *flags, *keep, workers=2, apart=True)
    close(one[1], lines)
    # what the last save made useless goes at the next one
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
            "score checkpoints by fairseq-generate",
        ),
        (("--expert-parallel", "--expert-parallel-save", "both"), "choose gathered or sharded"),
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
    """Before training, with the flag and the way out."""
    with pytest.raises(ValueError, match=re.escape(said)):
        build(toy, *flags)


def test_a_size_that_does_not_divide(toy, tmp_path):
    """--expert-parallel-size 3 of two workers and four experts: the sizes that would do."""
    flags = ("--distributed-world-size", 2, "--expert-parallel", "--expert-parallel-size", 3)
    out = run(tool("fairseq-train"), *train_args(toy, tmp_path, *flags), ok=False, cwd=tmp_path)
    assert "choose one of 1, 2" in out
