"""kernels/lookup/linear_part.py: folding, its gradients and the straight-through gradient."""

import pytest
import torch

from fairseq_evomoe.kernels.lookup.linear_part import fold, parts, straight_through
from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.lookup.score import SCORES, linear_gain, patterns

SHAPES = ((7, 5, 4, 9), (40, 3, 8, 33), (3, 2, 1, 1))


def drawn(shape, dtype=torch.float64):
    rows, tables, bits, width = shape
    z = torch.randn(rows, tables, bits, dtype=dtype)
    own = torch.randn(tables, 2**bits, width, dtype=dtype)
    return z, own, torch.randn(tables, bits, width, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fold(shape, dtype):
    """Every row is its own part plus the signed sum of the linear part, and both gradients are
    those of the formula."""
    _, own, linear = drawn(shape)
    a, b = (x.to(dtype).requires_grad_() for x in (own, linear))
    whole = fold(a, b, 1.7)
    dy = torch.randn(whole.shape, dtype=torch.float64)
    whole.backward(dy.to(dtype))
    want = a.detach().double().clone()
    want_b = torch.zeros_like(linear)
    for c in range(own.size(1)):
        for i in range(linear.size(1)):
            sign = 1 if c >> i & 1 else -1
            want[:, c] += 1.7 * sign * b.detach()[:, i].double()
            want_b[:, i] += 1.7 * sign * dy.to(dtype)[:, c].double()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    assert whole.dtype == dtype and torch.allclose(whole.double(), want, atol=tolerance)
    assert torch.equal(a.grad, dy.to(dtype))
    assert torch.allclose(b.grad.double(), want_b, atol=tolerance * 10, rtol=0.01)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parts(shape):
    """Parts fold to the whole again, and the rows' part is orthogonal to every linear part."""
    _, whole, _ = drawn(shape)
    own, linear = parts(whole, 0.6)
    assert torch.allclose(fold(own, linear, 0.6), whole)
    signs = patterns(shape[2]).double() * 2 - 1
    assert torch.einsum("nt,knh->kth", signs, own).abs().max() < 1e-10


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_linear_part_is_a_dense_layer(score, bits):
    """With the gain, L has the units of dense weights: the look-up of L alone is, among all
    multiples of it, the one nearest to W x for normal x."""
    z, _, linear = drawn((20000, 3, bits, 8))
    gain = linear_gain(score, bits, 1.0)
    tables = fold(torch.zeros(3, 2**bits, 8, dtype=torch.float64), linear, gain)
    y = lookup(z, tables, score=score)
    dense = torch.einsum("bkt,kth->bh", z, linear)
    assert float((y * dense).sum() / (y * y).sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_straight_through(score, shape):
    """The value does not change, and z gets p a <dy, L> where |z| <= 1, beside the gradient of the
    score."""
    z, own, linear = drawn(shape)
    leaves = [x.clone().requires_grad_() for x in (z, own, linear)]
    tables = fold(leaves[1], leaves[2], 0.8)
    plain = lookup(leaves[0], tables, score=score)
    y = straight_through(plain, leaves[0], leaves[2], 0.8, score=score, temperature=1.0)
    assert torch.equal(y, plain)
    dy = torch.randn_like(y)
    have = torch.autograd.grad(y, leaves, dy)

    # the same with a sign that is linear in its gradient alone
    leaves = [x.clone().requires_grad_() for x in (z, own, linear)]
    plain = lookup(leaves[0], fold(leaves[1], leaves[2], 0.8), score=score)
    size = z.abs()
    p = torch.sigmoid(2 * size).prod(-1) if score != "l1" else size.mean(-1)
    if score == "abs_prob":
        p = p * size.sum(-1)
    soft = leaves[0].clamp(-1, 1)
    extra = torch.einsum("bkt,kth->bh", (soft - soft.detach()) * p[..., None], linear * 0.8)
    want = torch.autograd.grad(plain + extra, leaves, dy)
    for a, b in zip(have, want, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


def test_straight_through_under_autocast():
    """Under autocast the product is made in its dtype, and the gradient keeps the input's."""
    z, _, linear = drawn((64, 4, 8, 32), torch.float32)
    z.requires_grad_()
    y = torch.randn(64, 32)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = straight_through(y, z, linear, 1.0, score="l1", temperature=1.0)
        grads.append(torch.autograd.grad(out, z, torch.ones_like(out))[0])
    exact, rounded = grads
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact) and torch.allclose(rounded, exact, atol=0.2)
