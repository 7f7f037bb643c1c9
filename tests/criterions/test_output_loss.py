"""The loss in pieces equals fairseq's: transformer/output_loss.py, criterions/output_loss.py."""

import pytest
import torch
from conftest import DEVICE, build, train, train_args, train_workers, valid_batch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from torch import nn

from fairseq_evomoe.criterions.output_loss import OutputLossMixin, output_weight
from fairseq_evomoe.kernels.transformer import output_loss as module
from fairseq_evomoe.kernels.transformer.output_loss import output_loss

DENSE = ("--moe-freq", 0, "--dropout", 0)


def inputs(tokens, width=6, vocabulary=11, dtype=torch.float64):
    torch.manual_seed(4)
    states = torch.randn(tokens, width, dtype=dtype, device=DEVICE, requires_grad=True)
    weight = nn.Parameter(torch.randn(vocabulary, width, dtype=dtype, device=DEVICE))
    return states, weight, torch.randint(vocabulary, (tokens,), device=DEVICE)


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 3 rows, so that the last one is smaller."""
    monkeypatch.setattr(module, "FEWEST_ROWS", 3)
    monkeypatch.setattr(module, "PIECE", {"cpu": 1, "cuda": 1})


@pytest.mark.parametrize("tokens", [0, 1, 3, 10])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_against_fairseqs_loss(small_pieces, smoothing, tokens):
    """Both sums and every gradient are fairseq's in float64, whatever the pieces."""
    states, weight, target = inputs(tokens)
    loss, nll = output_loss(states, weight, target, smoothing=smoothing)
    found = torch.autograd.grad(3 * loss, [states, weight])
    lprobs = (states @ weight.t()).log_softmax(-1)
    want, want_nll = label_smoothed_nll_loss(lprobs, target, smoothing)
    wanted = torch.autograd.grad(3 * want, [states, weight])
    assert torch.allclose(loss, want.sum()) and torch.allclose(nll, want_nll.sum())
    assert not nll.requires_grad
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_gradients_by_differences(small_pieces):
    states, weight, target = inputs(5)
    run = lambda s, w: output_loss(s, w, target, smoothing=0.1)[0]
    assert torch.autograd.gradcheck(run, (states, weight))


def test_large_logits_and_frozen_parts(small_pieces):
    """Logits of thousands overflow nothing; what needs no gradient gets none."""
    states, weight, target = inputs(7, dtype=torch.float32)
    loss, _ = output_loss(states * 1e4, weight.detach(), target)
    (d_states,) = torch.autograd.grad(loss, [states])
    assert torch.isfinite(loss) and bool(torch.isfinite(d_states).all())
    loss, _ = output_loss(states.detach(), weight, target)
    loss.backward()
    assert states.grad is None and weight.grad is not None
    with torch.no_grad():
        assert not output_loss(states, weight, target)[0].requires_grad


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_bfloat16(how):
    """Losses and gradients are near float32's, and have the dtypes of what they belong to."""
    states, weight, target = inputs(200, 32, 300, torch.float32)
    want, _ = output_loss(states, weight, target, smoothing=0.1)
    wanted = torch.autograd.grad(want, [states, weight])
    if how == "bfloat16":
        states, weight = (x.detach().bfloat16().requires_grad_() for x in (states, weight))
    with torch.autocast(DEVICE, torch.bfloat16, enabled=how == "autocast"):
        loss, _ = output_loss(states, weight, target, smoothing=0.1)
    found = torch.autograd.grad(loss, [states, weight])
    assert loss.dtype == torch.float32 and abs(loss - want) < 1e-2 * want
    for a, b, of in zip(found, wanted, (states, weight), strict=True):
        assert a.dtype == of.dtype and (a.float() - b).norm() < 2e-2 * b.norm()


@pytest.mark.parametrize("family", ["translation", "lm"])
@pytest.mark.parametrize("training", [True, False])
def test_criterions_equal_fairseqs(toy, family, training):
    """Loss, log and gradients of a whole model, with and without the pieces."""
    cfg, task, model = build(toy, *DENSE, family=family)
    model.double().train(training)
    criterion = task.build_criterion(cfg.criterion)
    batch = valid_batch(task)
    results = []
    for own in (True, False):
        model.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if not own:
                patch.setattr(OutputLossMixin, "forward", super_forward)
            loss, size, log = criterion(model, batch)
        loss.backward()
        results.append((loss, log, size, [p.grad for p in model.parameters()]))
    (one, log, size, grads), (other, other_log, other_size, other_grads) = results
    assert size == other_size and log.keys() == other_log.keys()
    # fairseq takes the softmax in float32
    assert torch.allclose(one.float(), other.float(), rtol=1e-6)
    for key in ("loss", "nll_loss"):
        if key in log:
            assert torch.allclose(log[key].float(), other_log[key].float(), rtol=1e-6)
    for a, b in zip(grads, other_grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def super_forward(self, model, sample, reduce=True):
    return super(OutputLossMixin, self).forward(model, sample, reduce)


def test_where_it_falls_back(toy):
    """Adaptive softmax, a hooked layer and accuracy use fairseq's own code."""
    _, _, model = build(toy, *DENSE)
    assert output_weight(model) is model.decoder.output_projection.weight
    hook = model.decoder.output_projection.register_forward_hook(lambda *a: None)
    assert output_weight(model) is None
    hook.remove()
    flags = ("--adaptive-softmax-cutoff", "50,100")
    cfg, task, model = build(
        toy, *DENSE, *flags, "--decoder-output-dim", 32, "--decoder-input-dim", 32, family="lm"
    )
    assert output_weight(model) is None
    loss, _, _ = task.build_criterion(cfg.criterion)(model, valid_batch(task))
    loss.backward()
    cfg, task, model = build(toy, *DENSE, "--report-accuracy")
    _, _, log = task.build_criterion(cfg.criterion)(model, valid_batch(task))
    assert log["total"] > 0


@pytest.mark.parametrize("flags", [(), ("--find-unused-parameters",)], ids=str)
def test_two_workers_equal_one(toy, tmp_path, flags):
    """Under torch's DDP the weights used outside its forward pass get their gradients."""
    common = (*DENSE, "--max-update", 3, "--clip-norm", 0)
    one = train(*train_args(toy, tmp_path / "1", *common, "--update-freq", 2))
    two = train_workers(2, *train_args(toy, tmp_path / "2", *common, *flags))
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-3)
        assert b["gnorm"] == pytest.approx(a["gnorm"], abs=2e-3)
