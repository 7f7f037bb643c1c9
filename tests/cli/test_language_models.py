"""The real commands on language models and masked LMs, down to a fine-tuned classifier."""

import json
import re

import pytest
import torch
from conftest import USER_DIR, run, tool, train_args

STAGES = ("--evo-spawn-update", 3, "--dts-anneal-updates", 3, "--dts-hard-update", 7)
PLUGIN = ("--user-dir", USER_DIR, "--cpu", "--num-workers", "0", "--log-format", "json")
BLOCKS = ("--tokens-per-sample", "32", "--sample-break-mode", "eos")


def rows_of(out, kind="train_inner"):
    return [json.loads(r) for r in re.findall(rf"\| {kind} \| (\{{.*\}})", out)]


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """family -> (a checkpoint from fairseq-train through all stages, its last validation)."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            args = train_args(toy, folder, *STAGES, "--max-update", 12, family=family)
            args.remove("--disable-validation")
            out = run(tool("fairseq-train"), *args)
            assert rows_of(out)[-1]["moe_stage"] == "2"
            made[family] = folder / "checkpoint_last.pt", rows_of(out, "valid")[-1]
        return made[family]

    return get


@pytest.mark.parametrize("family", ["lm", "mlm"])
def test_validate_repeats_the_loss_of_training(trained, toy, family):
    """fairseq-validate on the checkpoint prints what training printed when it wrote it."""
    path, seen = trained(family)
    task = {"lm": "language_modeling_evomoe", "mlm": "masked_lm_evomoe"}[family]
    flags = ("--task", task, "--path", path, "--max-tokens", "400", "--seed", "7", *BLOCKS)
    again = rows_of(run(tool("fairseq-validate"), toy / "mono", *PLUGIN, *flags), "valid")[-1]
    for key in ("loss", "moe_active_experts", "moe_gate_loss"):
        assert float(again[f"valid_{key}"]) == pytest.approx(float(seen[f"valid_{key}"])), key


@pytest.mark.parametrize("task", ["language_modeling", "language_modeling_evomoe"])
def test_eval_lm(trained, toy, task):
    """fairseq-eval-lm scores the valid set with the perplexity of validation."""
    path, seen = trained("lm")
    flags = ("--path", path, "--task", task, "--gen-subset", "valid", *BLOCKS)
    out = run(tool("fairseq-eval-lm"), toy / "mono", *PLUGIN, *flags)
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+)", out)[1])
    assert loss == pytest.approx(float(seen["valid_loss"]), rel=2e-2)


@pytest.mark.parametrize("family", ["lm", "mlm"])
def test_hydra_train(toy, tmp_path, family):
    """fairseq-hydra-train takes defaults from the YAML's model name and runs all stages."""
    model = {
        "lm": "{_name: transformer_lm_evomoe, decoder_layers: 2, decoder_embed_dim: 32, "
        "decoder_ffn_embed_dim: 64, decoder_attention_heads: 2}",
        "mlm": "{_name: roberta_evomoe, encoder_layers: 2, encoder_embed_dim: 32, "
        "encoder_ffn_embed_dim: 64, encoder_attention_heads: 2, max_positions: 64}",
    }[family]
    task, criterion = {
        "lm": ("language_modeling_evomoe", "moe_cross_entropy"),
        "mlm": ("masked_lm_evomoe", "moe_masked_lm"),
    }[family]
    (tmp_path / "run.yaml").write_text(f"""
# @package _group_
common: {{user_dir: {USER_DIR}, cpu: true, log_format: json, log_interval: 1, seed: 7}}
checkpoint: {{save_dir: {tmp_path}/ck, no_epoch_checkpoints: true}}
task: {{_name: {task}, data: {toy}/mono, tokens_per_sample: 32, sample_break_mode: eos,
  evo_spawn_update: 2, dts_anneal_updates: 2, dts_hard_update: 5}}
dataset: {{max_tokens: 400, num_workers: 0, disable_validation: true}}
criterion: {{_name: {criterion}}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
optimization: {{max_update: 7, lr: [0.003]}}
model: {model}
""")
    command = [tool("fairseq-hydra-train"), "--config-dir", tmp_path, "--config-name", "run"]
    out = run(*command, f"hydra.run.dir={tmp_path}/hydra", cwd=tmp_path)
    log = out + "".join(p.read_text() for p in (tmp_path / "hydra").glob("*.log"))
    rows = [json.loads(r) for r in re.findall(r"\[train_inner\]\[INFO\] - (\{.*\})", log)]
    side = {"lm": "decoder", "mlm": "encoder"}[family]
    assert rows[-1]["moe_stage"] == "2" and f"moe_load/{side}.1/e3" in rows[-1]
    assert (tmp_path / "ck/checkpoint_last.pt").exists()


@pytest.fixture(scope="module")
def classification(toy, tmp_path_factory):
    """A binarised GLUE-style set; the label says whether a sentence contains a number word."""
    folder = tmp_path_factory.mktemp("glue")
    numbers = re.compile(r"\b(two|three|four|five|six|seven|eight|nine|ten|\w+teen|\w+ty)\b|\d")
    for split in ("train", "valid"):
        lines = (toy / f"{split}.en").read_text(encoding="utf-8").splitlines()
        labels = ["yes" if numbers.search(line) else "no" for line in lines]
        (folder / f"{split}.label").write_text("\n".join(labels) + "\n")
    for name, prefix, extra in (
        ("input0", toy, ("--srcdict", toy / "mono/dict.txt")),
        ("label", folder, ()),
    ):
        end = ".en" if name == "input0" else ".label"
        run(
            tool("fairseq-preprocess"), "--only-source", "--workers", "1", *extra,
            "--trainpref", prefix / f"train{end}", "--validpref", prefix / f"valid{end}",
            "--destdir", folder / "bin" / name,
        )  # fmt: skip
    return folder / "bin"


@pytest.mark.parametrize("criterion", ["sentence_prediction", "moe_sentence_prediction"])
def test_fine_tuning(trained, toy, classification, tmp_path, criterion):
    """fairseq's stock sentence_prediction task learns to classify with the pretrained experts.

    The experts stay in the stage of the checkpoint, that is top-1 without noise.
    """
    path, _ = trained("mlm")
    args = [
        *(classification, "--user-dir", USER_DIR, "--cpu", "--num-workers", 0, "--seed", 3),
        *("--restore-file", path, "--reset-optimizer", "--reset-dataloader", "--reset-meters"),
        *("--task", "sentence_prediction", "--num-classes", 2, "--init-token", 0),
        *("--arch", "roberta_evomoe", "--encoder-layers", 2, "--encoder-embed-dim", 32),
        *("--encoder-ffn-embed-dim", 64, "--encoder-attention-heads", 2, "--max-positions", 32),
        *("--criterion", criterion, "--optimizer", "adam", "--lr", 0.003, "--batch-size", 16),
        *("--lr-scheduler", "fixed", "--max-update", 75, "--save-dir", tmp_path),
        *("--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric"),
        *("--log-format", "json", "--log-interval", 1, "--no-epoch-checkpoints"),
    ]
    out = run(tool("fairseq-train"), *args)
    valid = rows_of(out, "valid")
    share = max(_majority(classification), 1 - _majority(classification))
    assert float(valid[-1]["valid_accuracy"]) > 100 * share + 5
    if criterion.startswith("moe"):
        rows = rows_of(out)
        assert {r["moe_stage"] for r in rows} == {"2"} and rows[0]["moe_active_experts"] == "1"
    before = torch.load(path, weights_only=False)["model"]
    after = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["model"]
    name = "encoder.sentence_encoder.layers.1.moe_layer.experts.w1"
    assert after[name].shape == before[name].shape and not torch.equal(after[name], before[name])


def _majority(classification):
    labels = (classification.parent / "valid.label").read_text().split()
    return labels.count("yes") / len(labels)
