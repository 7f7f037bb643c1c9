"""The real commands on a toy corpus, each in its own process."""

import json
import re

import pytest
import torch
from conftest import USER_DIR, run, tool, train_args

from fairseq_evomoe import compat

STAGES = ("--evo-spawn-update", 6, "--dts-anneal-updates", 6, "--dts-hard-update", 14)
PLUGIN = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0")
LANGUAGES = ("--source-lang", "en", "--target-lang", "de")


@pytest.fixture(scope="session")
def trained(toy, tmp_path_factory):
    """A model taken through all three stages by fairseq-train; its last checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    out = run(
        tool("fairseq-train"),
        *train_args(toy, folder, *STAGES, "--max-update", 20),
        *("--tensorboard-logdir", folder / "tb"),
    )
    (folder / "train.log").write_text(out)
    return folder / "checkpoint_last.pt"


def hypotheses(out):
    return re.findall(r"^H-(\d+)\t\S+\t(.*)$", out, flags=re.MULTILINE)


def test_train_logs_json_and_tensorboard(trained):
    """JSON lines hold every routing metric, also per expert; TensorBoard has experts by layer."""
    lines = (trained.parent / "train.log").read_text().splitlines()
    rows = [json.loads(x.split("| train_inner | ")[1]) for x in lines if "| train_inner | {" in x]
    assert len(rows) == 20 and rows[-1]["moe_stage"] == "2"
    assert "moe_load/encoder.1/e3" in rows[-1] and "moe_dead_experts" in rows[-1]
    written = b"".join(p.read_bytes() for p in (trained.parent / "tb").rglob("*tfevents*"))
    assert b"moe_active_experts" in written and b"moe_load/decoder.1" in written


def test_checkpoint_holds_nothing_executable(trained):
    """A checkpoint loads with weights_only=True if the config class, Namespace, is allowed."""
    from argparse import Namespace

    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(trained, weights_only=True)
    # leaving the context removes Namespace from the list even if it was there before
    compat.saving.allow_config_classes_in_checkpoints()
    evolution = state["model"]["encoder.layers.1.moe_layer._extra_state"]
    assert evolution.tolist() == [20, 2, 0.3, 1, 0]


@pytest.mark.parametrize("task", [(), ("--task", "translation_evomoe")], ids=["stock", "ours"])
def test_generate(trained, toy, task):
    """Beam search gives a hypothesis for each of 43 sentences, a number that 8 does not divide."""
    out = run(
        tool("fairseq-generate"),
        toy / "bin",
        *PLUGIN,
        *LANGUAGES,
        *("--path", trained, "--beam", "3", "--batch-size", "16", "--max-len-b", "20", *task),
    )
    assert sorted(int(i) for i, _ in hypotheses(out)) == list(range(43))


def test_generate_does_not_depend_on_the_batch(trained, toy):
    """Translations are the same with one sentence per batch and with all in one batch."""
    outs = [
        hypotheses(
            run(
                tool("fairseq-generate"),
                toy / "bin",
                *PLUGIN,
                *LANGUAGES,
                *("--path", trained, "--beam", "2", "--batch-size", size, "--max-len-b", "15"),
            )
        )
        for size in ("1", "43")
    ]
    assert sorted(outs[0]) == sorted(outs[1])


def test_interactive(trained, toy, tmp_path):
    """fairseq-interactive reads a file and answers line by line."""
    source = tmp_path / "in.en"
    lines = (toy / "test.en").read_text(encoding="utf-8").splitlines()[:3]
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = run(
        tool("fairseq-interactive"),
        toy / "bin",
        *PLUGIN,
        *LANGUAGES,
        *("--path", trained, "--input", source, "--beam", "2", "--max-len-b", "10"),
    )
    assert [int(i) for i, _ in hypotheses(out)] == [0, 1, 2]


def test_validate_repeats_the_loss_of_training(trained, toy, tmp_path):
    """fairseq-validate on the checkpoint prints what training printed when it wrote it."""
    args = train_args(toy, tmp_path, *STAGES, "--max-update", 10)
    args.remove("--disable-validation")
    out = run(tool("fairseq-train"), *args)
    seen = json.loads(re.findall(r"\| valid \| (\{.*\})", out)[-1])
    again = run(
        tool("fairseq-validate"),
        toy / "bin",
        *("--user-dir", USER_DIR, "--cpu", "--task", "translation_evomoe", *LANGUAGES),
        *("--path", tmp_path / "checkpoint_last.pt", "--max-tokens", "400"),
        *("--log-format", "json", "--num-workers", "0"),
    )
    printed = json.loads(re.findall(r"\| valid \| (\{.*\})", again)[-1])
    assert seen["valid_num_updates"] == "10"
    for key in ("loss", "nll_loss", "moe_active_experts", "moe_temperature", "moe_gate_loss"):
        assert float(printed[f"valid_{key}"]) == pytest.approx(float(seen[f"valid_{key}"])), key


def test_hydra_train(toy, tmp_path):
    """fairseq-hydra-train runs a YAML file's three stages, and fairseq-generate loads the model."""
    config = f"""
# @package _group_
common: {{user_dir: {USER_DIR}, cpu: true, log_format: json, log_interval: 1, seed: 7}}
checkpoint: {{save_dir: {tmp_path}/ck, no_epoch_checkpoints: true}}
task: {{_name: translation_evomoe, data: {toy}/bin, source_lang: en, target_lang: de,
  evo_spawn_update: 3, dts_anneal_updates: 3, dts_hard_update: 8}}
dataset: {{max_tokens: 400, num_workers: 0, disable_validation: true}}
criterion: {{_name: moe_label_smoothed_cross_entropy, label_smoothing: 0.1}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{max_update: 10, lr: [0.003]}}
model: {{_name: transformer_evomoe, encoder_layers: 2, decoder_layers: 2, encoder_embed_dim: 32,
  encoder_ffn_embed_dim: 64, encoder_attention_heads: 2, decoder_attention_heads: 2,
  share_all_embeddings: true, moe_expert_count: 3, decoder_moe_freq: 1}}
"""
    (tmp_path / "run.yaml").write_text(config)
    command = [tool("fairseq-hydra-train"), "--config-dir", tmp_path, "--config-name", "run"]
    out = run(*command, f"hydra.run.dir={tmp_path}/hydra", cwd=tmp_path)
    log = out + "".join(p.read_text() for p in (tmp_path / "hydra").glob("*.log"))
    rows = [json.loads(r) for r in re.findall(r"\[train_inner\]\[INFO\] - (\{.*\})", log)]
    assert rows[-1]["moe_stage"] == "2" and "moe_load/decoder.0/e2" in rows[-1]
    assert "moe_load/encoder.1/e0" not in rows[-1], (
        "decoder_moe_freq alone leaves the encoder dense"
    )
    out = run(
        tool("fairseq-generate"),
        toy / "bin",
        *PLUGIN,
        *LANGUAGES,
        *("--path", tmp_path / "ck/checkpoint_last.pt", "--beam", "1", "--max-len-b", "10"),
    )
    assert len(hypotheses(out)) == 43


def rows_of(out):
    found = re.findall(r"\| train_inner \| (\{.*\})", out)
    return [
        {k: v for k, v in json.loads(r).items() if "w" not in k and "up" not in k} for r in found
    ]


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_train_as_one(toy, tmp_path, workers):
    """CPU workers with one batch each equal one worker that accumulates as many; resuming works.

    An epoch has 14 batches, so two of four workers have no batch at its end, and no worker waits
    for another. Routing noise is off because fairseq gives all workers the same random stream.
    """
    common = (*STAGES, "--max-update", 16, "--dts-noise", "none", "--dropout", 0)
    as_many = ("--update-freq", workers)
    one = run(tool("fairseq-train"), *train_args(toy, tmp_path / "1", *common, *as_many))
    pair = ("--distributed-world-size", workers, "--save-interval-updates", 6)
    args = train_args(toy, tmp_path / "2", *common, *pair)
    # once by workers that fairseq spawns, and else by forks, which do not import it anew
    two = run(tool("fairseq-train"), *args, cwd=tmp_path, real=workers == 2)
    (saved,) = (tmp_path / "2").glob("checkpoint_*_6.pt")
    again = run(
        tool("fairseq-train"),
        *train_args(toy, tmp_path / "3", *common, *pair, "--restore-file", saved),
    )
    want, have, resumed = rows_of(one), rows_of(two), rows_of(again)
    assert len(want) == len(have) == 16 and len(resumed) == 10
    for a, b in zip(want, have, strict=True):
        for key in a:
            assert float(a[key]) == pytest.approx(float(b[key]), rel=2e-3, abs=2e-3), key
    assert resumed == have[6:]


def test_two_workers_balance_as_one(toy, tmp_path):
    """The balance bias follows the load of all workers together, and equals that of one worker."""
    flags = ("--moe-gate", "topk", "--moe-balance-bias", 0.1, "--max-update", 7, "--dropout", 0)
    run(tool("fairseq-train"), *train_args(toy, tmp_path / "1", *flags, "--update-freq", 2))
    pair = ("--distributed-world-size", 2)
    run(tool("fairseq-train"), *train_args(toy, tmp_path / "2", *flags, *pair), cwd=tmp_path)
    states = [
        torch.load(tmp_path / n / "checkpoint_last.pt", weights_only=False)["model"] for n in "12"
    ]
    steps = [k for k in states[0] if k.endswith("bias_steps")]
    assert len(steps) == 2
    for key in steps:
        assert states[0][key].abs().sum() > 0 and torch.equal(states[0][key], states[1][key])


def test_bf16_trains(toy, tmp_path):
    """--bf16 trains through the split, with its fp32 masters, and does not require a TPU."""
    out = run(
        tool("fairseq-train"), *train_args(toy, tmp_path, *STAGES, "--max-update", 16, "--bf16")
    )
    rows = rows_of(out)
    assert len(rows) == 16 and rows[-1]["moe_stage"] == "2"
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])


def test_stock_criterion_and_task(toy, tmp_path):
    """A Switch model needs no schedule, so fairseq's own task and criterion can train it."""
    args = train_args(toy, tmp_path, "--max-update", 3, "--moe-gate", "switch")
    args[args.index("--task") + 1] = "translation"
    args[args.index("--criterion") + 1] = "label_smoothed_cross_entropy"
    out = run(tool("fairseq-train"), *args)
    assert len(rows_of(out)) == 3


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--moe-gate", "oracle"), "--moe-gate oracle: choose one of"),
        (("--evo-spawn-update", 99), "--evo-spawn-update 99 lies beyond --max-update"),
        (("--moe-gate-loss-wt", -1), "--moe-gate-loss-wt -1.0: a loss weight must be"),
        (("--moe-eval-capacity-token-fraction", 0.25), "evaluation drops no token"),
    ],
    ids=str,
)
def test_bad_flags_stop_before_training(toy, tmp_path, flags, message):
    """The run ends with the flag and the fix in its last line, and writes no checkpoint."""
    out = run(tool("fairseq-train"), *train_args(toy, tmp_path, *flags), ok=False)
    assert message in out.splitlines()[-1]
    assert not list(tmp_path.glob("*.pt"))


def test_stock_task_with_dts_names_the_task(toy, tmp_path):
    """With --task translation and the DTS gate, the error says which task to use."""
    args = train_args(toy, tmp_path)
    args[args.index("--task") + 1] = "translation"
    out = run(tool("fairseq-train"), *args, ok=False)
    assert "train with --task translation_evomoe" in out


def test_average(trained, toy, tmp_path):
    """evomoe-average writes the mean of two checkpoints' weights; fairseq-generate loads it."""
    run(
        tool("fairseq-train"),
        *train_args(toy, tmp_path, *STAGES, "--max-update", 18, "--save-interval-updates", 2),
    )
    out = tmp_path / "mean.pt"
    run(tool("evomoe-average"), tmp_path, "--last", 2, "--output", out)
    load = lambda p: torch.load(p, weights_only=False)["model"]
    a, b, mean = (load(p) for p in (*sorted(tmp_path.glob("checkpoint_*_1[68].pt")), out))
    for key in mean:
        if key.endswith("_extra_state"):
            assert torch.equal(mean[key], b[key])
        elif mean[key].is_floating_point():
            assert torch.allclose(mean[key], (a[key] + b[key]) / 2, atol=1e-6), key
    again = run(tool("evomoe-average"), tmp_path, "--last", 2, "--output", out, ok=False)
    assert "is not overwritten" in again
    mixed = run(
        tool("evomoe-average"), tmp_path, "--last", 8, "--output", tmp_path / "x.pt", ok=False
    )
    assert "average checkpoints of one stage only" in mixed
    few = run(
        tool("evomoe-average"), tmp_path, "--last", 99, "--output", tmp_path / "x.pt", ok=False
    )
    assert "lower --last" in few
    generated = run(
        tool("fairseq-generate"),
        toy / "bin",
        *PLUGIN,
        *LANGUAGES,
        *("--path", out, "--beam", "1", "--max-len-b", "10"),
    )
    assert len(hypotheses(generated)) == 43
