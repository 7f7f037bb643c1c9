"""tools/upcycle.py: a dense run continues as a mixture of experts, in each family and layout."""

import pytest
import torch
from conftest import FAMILIES, train, train_args, valid_batch
from dense_kit import DENSE, TASKS
from fairseq import checkpoint_utils

from fairseq_evomoe.modules.split import SplitRule
from fairseq_evomoe.tools import upcycle
from fairseq_evomoe.tools.upcycle import Upcycled

# the flag that the tool prints for language models, which have a token bias by default
BIAS = {"lm": ("--moe-gate-token-bias", 0)}
CONTINUED = ("--evo-spawn-update", 4, "--dts-anneal-updates", 4, "--dts-noise", "none")


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request, toy, tmp_path_factory):
    """(family, checkpoint after 4 of 7 updates, log lines) of stock fairseq without dropout."""
    family = request.param
    folder = tmp_path_factory.mktemp(f"dense-{family}")
    flags = (*DENSE[family], "--task", TASKS[family], "--dropout", 0, "--attention-dropout", 0)
    args = train_args(
        toy, folder, *flags, "--max-update", 7, "--save-interval-updates", 4, family=family
    )
    rows = train(*args)
    (path,) = folder.glob("checkpoint_*_4.pt")
    return family, path, rows


def grow(path, out, *flags):
    upcycle.main([str(a) for a in (path, "--output", out, "--moe-freq", 1, *flags)])
    return out


def output(path):
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    batch = valid_batch(task)
    with torch.no_grad():
        made = model.eval()(**batch["net_input"])[0]
    return made, batch["net_input"]


def test_copies_leave_the_output_unchanged(dense, tmp_path, capsys):
    """With --evo-diversify copy the output is the dense model's; with another mode it is not."""
    family, path, _ = dense
    grown = grow(path, tmp_path / "up.pt", "--evo-diversify", "copy", "--moe-expert-count", 3)
    want, net_input = output(path)
    have, _ = output(grown)
    real = net_input.get("prev_output_tokens", net_input["src_tokens"]).ne(1)
    assert torch.allclose(have[real], want[real], atol=2e-5)
    out = capsys.readouterr().out
    assert "--restore-file" in out and "--moe-freq 1 --moe-expert-count 3" in out
    assert ("--moe-gate-token-bias 0" in out) == (family in BIAS)
    mixed, _ = output(grow(path, tmp_path / "mask.pt"))
    assert not torch.allclose(mixed[real], want[real], atol=1e-3)


def test_training_goes_on(dense, toy, tmp_path):
    """fairseq-train continues with Adam's moments, and the next loss is that of the dense run."""
    family, path, rows = dense
    grown = grow(path, tmp_path / "up.pt", "--evo-diversify", "copy")
    flags = (*CONTINUED, "--dropout", 0, "--attention-dropout", 0, "--moe-freq", 1)
    flags += BIAS.get(family, ())
    more = train(
        *train_args(
            toy, tmp_path, *flags, "--max-update", 7, "--restore-file", grown,
            "--moe-gate-loss-wt", 0, family=family,
        )
    )  # fmt: skip
    assert [r["num_updates"] for r in more] == [5, 6, 7]
    assert more[0]["moe_stage"] == 1 and more[0]["moe_active_experts"] == 4
    assert more[0]["loss"] == pytest.approx(rows[4]["loss"], abs=2e-3)
    # identical experts get the same gradient and so move together, nearly as the dense FFN
    assert more[1]["loss"] == pytest.approx(rows[5]["loss"], rel=0.05)


def test_without_optimizer_state(dense, toy, tmp_path):
    """With --no-optimizer-state and --reset-optimizer, updates start at 0 from these weights."""
    family, path, rows = dense
    grown = grow(path, tmp_path / "up.pt", "--no-optimizer-state")
    assert "last_optimizer_state" not in torch.load(grown, weights_only=False)
    flags = ("--evo-spawn-update", 0, "--moe-freq", 1, "--max-update", 2, "--reset-optimizer")
    flags += BIAS.get(family, ())
    more = train(*train_args(toy, tmp_path, *flags, "--restore-file", grown, family=family))
    assert [r["num_updates"] for r in more] == [1, 2]
    assert more[0]["loss"] < rows[0]["loss"]


@pytest.fixture(scope="module")
def small(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense-ours")
    train(*train_args(toy, folder, "--moe-freq", 0, "--max-update", 2))
    return folder / "checkpoint_last.pt"


def test_our_own_dense_model(small, tmp_path):
    """A model of this package with --moe-freq 0 is upcycled too, with a split as in training."""
    grown = torch.load(grow(small, tmp_path / "up.pt", "--seed", 3), weights_only=False)
    state = torch.load(small, weights_only=False)["model"]
    w2 = grown["model"]["encoder.layers.0.moe_layer.experts.w2"]
    assert torch.equal(w2[0], state["encoder.layers.0.fc2.weight"])
    same = (w2[1:] == w2[:1]).all(1).float().mean().item()
    assert same == pytest.approx(0.5, abs=0.02), "mode drop replaces half of the hidden units"
    extra = grown["model"]["encoder.layers.0.moe_layer._extra_state"]
    assert extra.tolist() == [2, 1, 2.0, 1, 0]


def test_moments_are_found_by_number(small):
    """Moments are found by a parameter's number; torch orders them by their first gradients."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(small)])
    cfg.model.moe_freq = 1
    plan = Upcycled(model, task.build_model(cfg.model, from_checkpoint=True), SplitRule(), seed=1)
    entries = {i: {"exp_avg": torch.full_like(p, i)} for i, p in enumerate(model.parameters())}
    shuffled = dict(sorted(entries.items(), key=lambda kv: (kv[0] * 7) % len(entries)))
    groups = [{"params": list(entries)}]
    one = plan.moments({"state": entries, "param_groups": groups})["state"]
    two = plan.moments({"state": shuffled, "param_groups": groups})["state"]
    assert all(torch.equal(one[i]["exp_avg"], two[i]["exp_avg"]) for i in one)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("mode", ["mask", "copy"])
def test_moments_in_each_layout(small, flat, mode):
    """Experts get the base's moments, 0 where weights are new; gates get 0, others keep theirs."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(small)])
    cfg.model.moe_freq = 1
    grown = task.build_model(cfg.model, from_checkpoint=True)
    plan = Upcycled(model, grown, SplitRule(mode=mode), seed=1)
    names = [n for n, p in model.named_parameters()]
    moments = {n: torch.rand_like(p) + 1 for n, p in model.named_parameters()}
    if flat:
        joined = torch.cat([m.flatten() for m in moments.values()])
        old = {"state": {0: {"step": 4, "exp_avg": joined}}, "param_groups": [{"params": [0]}]}
    else:
        entries = {i: {"step": 4, "exp_avg": moments[n]} for i, n in enumerate(names)}
        old = {"state": entries, "param_groups": [{"params": list(entries), "lr": 1}]}
    new = plan.moments(old)
    if flat:
        sizes = [p.numel() for p in grown.parameters()]
        parts = new["state"][0]["exp_avg"].split(sizes)
    else:
        parts = [new["state"][i]["exp_avg"] for i in range(len(list(grown.parameters())))]
        assert new["param_groups"][0]["params"] == list(range(len(parts)))
    for (name, p), part in zip(grown.named_parameters(), parts, strict=True):
        part = part.view(p.shape)
        if ".gate." in name:
            assert part.abs().sum() == 0
        elif name in plan.origin:
            source, split, short = plan.origin[name]
            want = moments[source][None].expand_as(part).clone()
            assert torch.equal(part, want.masked_fill(split.replaced(short, p.shape), 0))
        else:
            assert torch.equal(part, moments[name])


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--moe-expert-ffn-dim", 96), "--moe-expert-ffn-dim"),
        (("--moe-gate", "magic"), "--moe-gate magic"),
        (("--encoder-moe-freq", 9), "--encoder-moe-freq 9: the encoder has only 2 layers"),
        (("--temperature", 0), "--temperature 0.0"),
        (("--moe-gate", "hash", "--moe-hash-mapping", "no.json"), "no.json: no such file"),
    ],
    ids=str,
)
def test_refusals(small, tmp_path, capsys, flags, message):
    """A bad flag ends in one line that names it, with exit code 1 and no file."""
    with pytest.raises(SystemExit) as stop:
        grow(small, tmp_path / "up.pt", *flags)
    assert stop.value.code == 1 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_has_experts_and_what_exists(small, tmp_path, capsys):
    """A second upcycling and an existing output are refused; nothing is overwritten."""
    grown = grow(small, tmp_path / "up.pt")
    before = grown.read_bytes()
    for source, message in ((grown, "has experts already"), (small, "is not overwritten")):
        out = tmp_path / "two.pt" if source == grown else grown
        with pytest.raises(SystemExit):
            grow(source, out)
        assert message in capsys.readouterr().err
    assert grown.read_bytes() == before and not (tmp_path / "two.pt").exists()


def test_optimizer_state_of_another_model(small):
    """Moments that do not fit are refused with the flag that leaves them out."""
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(small)])
    cfg.model.moe_freq = 1
    plan = Upcycled(model, task.build_model(cfg.model, from_checkpoint=True), SplitRule(), seed=1)
    for state in ({0: {"exp_avg": torch.zeros(5)}}, {i: {} for i in range(3)}):
        with pytest.raises(ValueError, match="--no-optimizer-state"):
            plan.moments({"state": state, "param_groups": [{"params": []}]})
