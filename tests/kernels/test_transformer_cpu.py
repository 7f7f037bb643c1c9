"""csrc/transformer_cpu.cpp: attention and the loss's softmax, every instruction set, in float64."""

import pytest
import torch
from isa_kit import every_isa
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.transformer import attention, cpu, output_loss

SHAPES = (
    (1, 1, 1, 1, 4),  # B, N, L, S, C
    (2, 3, 5, 7, 8),
    (3, 2, 33, 70, 12),
    (1, 4, 130, 130, 32),
    (2, 1, 70, 300, 64),
    (2, 2, 0, 3, 16),
)
INF = float("inf")
MASKS = {
    "none": lambda b, n, q, k: None,
    "causal": lambda b, n, q, k: torch.full((q, k), -INF).triu(1),
    "padding": lambda b, n, q, k: torch.zeros(b, 1, 1, k).masked_fill(
        torch.arange(k) >= max(1, k - 3), -INF
    ),
    "padding on the left": lambda b, n, q, k: torch.zeros(b, 1, 1, k).masked_fill(
        torch.arange(k) < k // 2, -INF
    ),
    "bias of each head": lambda b, n, q, k: torch.randn(b, n, q, k),
    "bool": lambda b, n, q, k: torch.ones(q, k).tril().bool(),
    "not contiguous": lambda b, n, q, k: torch.randn(k, q).t(),
}


isa = every_isa(cpu, "transformer_isa")


def inputs(shape):
    """As fairseq makes them: views (B, N, L, C) of states (L, B, N, C)."""
    b, n, q, k, width = shape
    return [torch.randn(x, b, n, width).permute(1, 2, 0, 3).requires_grad_() for x in (q, k, k)]


def exact_attention(own, mask):
    """Output and inputs in float64, by the formula."""
    q, k, v = (x.detach().double().requires_grad_() for x in own)
    scores = q @ k.transpose(-1, -2) / q.size(-1) ** 0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -INF)
    elif mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1) @ v, (q, k, v)


def near(have, want, tolerance=2e-6):
    if not want.numel():
        return have.shape == want.shape
    return float((have - want).abs().max()) <= tolerance * float(want.abs().max().clamp_min(1))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(shape, mask, isa):
    """Output and gradients are those of the formula in float64, for any lengths and masks."""
    own, made = inputs(shape), MASKS[mask](*shape[:4])
    y = cpu.Attention.apply(*own, made)
    want, exact = exact_attention(own, made)
    assert y.shape == want.shape and near(y, want)
    # neighbours in the layout of a module's states
    direction = torch.randn_like(y.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)
    found = torch.autograd.grad(y, own, direction)
    wanted = torch.autograd.grad(want, exact, direction.double())
    for have, expected in zip(found, wanted, strict=True):
        assert near(have, expected, 1e-5)


def test_large_scores_and_queries_that_see_nothing(isa):
    """Scores of thousands overflow nothing. A query without keys gets 0 and gives no gradient."""
    own = inputs((1, 2, 6, 9, 8))
    mask = torch.zeros(6, 9)
    mask[2] = mask[:, 7:] = -INF
    y = cpu.Attention.apply(own[0] * 1e4, *own[1:], mask)
    assert bool(torch.isfinite(y).all()) and not y[:, :, 2].any()
    found = torch.autograd.grad(y.sum(), own)
    assert all(bool(torch.isfinite(d).all()) for d in found)
    assert not found[0][:, :, 2].any()
    assert not found[1][:, :, 7:].any() and not found[2][:, :, 7:].any()


def test_exponential(isa):
    """To a few units in the last place over its whole range, through a softmax of two scores."""
    at = torch.linspace(-100, 0, 4001)
    v = torch.tensor([[1.0], [0.0]]).expand(2, 4).contiguous()[None, None]
    q = torch.ones(1, 1, len(at), 4)
    k = torch.zeros(1, 1, 2, 4)
    mask = torch.stack([at, torch.zeros(len(at))], 1)
    have = cpu.Attention.apply(q, k, v, mask)[0, 0, :, 0].double()
    want = torch.stack([at, torch.zeros(len(at))], 1).double().softmax(1)[:, 0]
    assert bool(((have - want).abs() <= 4e-7 * want + 2e-38).all())


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    own = inputs((4, 4, 40, 40, 16))
    before = torch.get_num_threads()
    try:
        results = []
        for n in (1, threads):
            torch.set_num_threads(n)
            y = cpu.Attention.apply(*own, MASKS["causal"](4, 4, 40, 40))
            results.append([y, *torch.autograd.grad(y.sum(), own)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("words", [1, 3, 17, 700, 4001])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_loss(words, smoothing, isa):
    """Sums and gradient are those of the formula in float64."""
    logits = 5 * torch.randn(23, words)
    target = torch.randint(words, (23,))
    exact = logits.double().requires_grad_()
    lprobs = exact.log_softmax(-1)
    nll, smooth = -lprobs.gather(1, target[:, None]).sum(), -lprobs.sum()
    rest = smoothing / words
    (wanted,) = torch.autograd.grad((1 - smoothing) * nll + rest * smooth, exact)
    have = cpu.softmax_loss(logits, target, sure=1 - smoothing, rest=rest, gradient=True)
    assert torch.allclose(have, torch.stack([nll, smooth * bool(smoothing)]), rtol=1e-6)
    assert near(logits, wanted, 1e-6)


def test_who_serves(monkeypatch):
    """The kernels serve training in float32, unless another backend is forced."""
    own = inputs((2, 2, 20, 20, 8))
    calls = []
    monkeypatch.setattr(cpu.Attention, "apply", lambda *a: calls.append("kernel") or a[0])
    monkeypatch.setattr(attention, "torch_attention", lambda *a, **k: calls.append("torch") or a[0])
    monkeypatch.setattr(attention._Attention, "apply", lambda *a: calls.append("products") or a[0])
    attention.attention(*own)
    with torch.no_grad():
        attention.attention(*own)
        with attention.recomputed():
            attention.attention(*own)
    with backend.use("torch"):
        attention.attention(*own)
    attention.attention(*(x.double() for x in own))
    attention.attention(*(x[:, :, :16] for x in own))
    for tiles in (True, False):
        monkeypatch.setattr(cpu, "has_tiles", lambda tiles=tiles: tiles)
        with torch.autocast("cpu", torch.bfloat16):
            attention.attention(*own)
        attention.attention(*(x.bfloat16() for x in own))
    attention.attention(*own, dropout_p=0.1)
    wanted = ["kernel", "torch", "kernel", *["products"] * 5, "kernel", "kernel", "torch"]
    assert calls == wanted


def test_without_a_compiler_the_loss_is_the_same(monkeypatch):
    states, weight = torch.randn(50, 8), torch.randn(30, 8)
    target = torch.randint(30, (50,))
    with_kernel = output_loss.output_loss(states, weight, target, smoothing=0.1)
    monkeypatch.setattr(cpu, "unavailable", lambda: "no compiler")
    without = output_loss.output_loss(states, weight, target, smoothing=0.1)
    assert all(torch.allclose(a, b) for a, b in zip(with_kernel, without, strict=True))


@pytest.mark.parametrize("name", ["", "torch"])
@pytest.mark.parametrize("word", [-1, 30])
def test_a_target_beyond_the_vocabulary_is_refused(word, name):
    states, weight = torch.randn(5, 8), torch.randn(30, 8)
    with backend.use(name), pytest.raises((IndexError, RuntimeError), match="out of"):
        output_loss.output_loss(states, weight, torch.full((5,), word))


def test_logits_of_minus_infinity(isa):
    """A word that cannot occur leaves the loss of the others finite, as with torch's functions."""
    logits = torch.randn(3, 20)
    logits[:, 7] = -INF
    target = torch.tensor([0, 1, 19])
    want = F.cross_entropy(logits, target, reduction="sum")
    have = cpu.softmax_loss(logits, target, sure=1.0, rest=0.0, gradient=True)
    assert torch.allclose(have[0].float(), want) and float(have[1]) == 0
    assert bool(torch.isfinite(logits).all()) and not logits[:, 7].any()
