"""kernels/lookup/: codes, scores, gradients against plain loops and numerical derivatives."""

import math
import sys

import pytest
import torch
from conftest import ROOT, run

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.lookup import eager, reference
from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.lookup.score import SCORES, codes, quantise, score_moment, weigh

SHAPES = [
    (1, 1, 1, 1),  # the smallest
    (7, 3, 4, 5),  # unequal sizes
    (64, 4, 8, 16),  # a row of every table is hit
    (3, 2, 10, 6),  # more than 8 bits
    (0, 3, 4, 5),  # no rows
]


def inputs(shape, dtype=torch.float32):
    rows, tables, bits, width = shape
    z = torch.randn(rows, tables, bits, dtype=torch.float64).to(dtype)
    return z, torch.randn(tables, 2**bits, width, dtype=torch.float64).to(dtype)


def by_hand(z, tables, score, t):
    """The paper's equations in plain Python."""
    out = []
    for row in z.tolist():
        y = [0.0] * tables.size(-1)
        for k, values in enumerate(row):
            code = sum(2**i for i, v in enumerate(values) if v >= 0)
            p = math.prod(1 / (1 + math.exp(-2 * abs(v) / t)) for v in values)
            total = sum(abs(v) for v in values)
            p = {"prob": p, "abs_prob": total * p, "l1": total / len(values)}[score]
            y = [a + p * b for a, b in zip(y, tables[k, code].tolist(), strict=True)]
        out.append(y)
    return torch.tensor(out, dtype=z.dtype).view(len(z), tables.size(-1))


@pytest.mark.parametrize("op", [lookup, reference.lookup], ids=["torch", "reference"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(op, score, shape):
    """The output equals the equations written out, at two temperatures."""
    z, tables = inputs(shape, torch.float64)
    for t in (0.5, 1.0):
        want = by_hand(z, tables, score, t)
        assert torch.allclose(op(z, tables, score=score, temperature=t), want, atol=1e-12)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_the_reference(score, shape):
    """dz and dT equal autograd through the reference, in float32 and float64."""
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        z, tables = inputs(shape, dtype)
        dy = torch.randn(shape[0], shape[3], dtype=torch.float64).to(dtype)
        grads = []
        for op in (lookup, reference.lookup):
            a, b = z.clone().requires_grad_(), tables.clone().requires_grad_()
            op(a, b, score=score, temperature=0.7).backward(dy)
            grads.append((a.grad, b.grad))
        for have, want in zip(*grads, strict=True):
            want = torch.zeros_like(have) if want is None else want
            assert torch.allclose(have, want, atol=atol)


@pytest.mark.parametrize("score", SCORES)
def test_gradcheck(score):
    """Gradients equal numerical derivatives away from z = 0, where the function jumps."""
    z, tables = inputs((4, 3, 4, 5), torch.float64)
    z = z + 0.1 * torch.where(z >= 0, 1, -1)
    z.requires_grad_(), tables.requires_grad_()
    op = lambda a, b: lookup(a, b, score=score, temperature=0.8)
    assert torch.autograd.gradcheck(op, (z, tables))


@pytest.mark.parametrize("score", SCORES)
def test_zero_counts_as_positive(score):
    """z = 0 (and -0) sets the bit and its gradient has the sign +1 (eq. 3)."""
    for zero in (0.0, -0.0):
        z = torch.full((1, 1, 3), zero, dtype=torch.float64, requires_grad=True)
        tables = torch.rand(1, 8, 2, dtype=torch.float64) + 1
        y = lookup(z, tables, score=score, temperature=1.0)
        assert codes(z).tolist() == [[7]]
        y.sum().backward()
        assert (z.grad > 0).all()


@pytest.mark.parametrize("bits", [1, 8, 10, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_code_is_exact_in_half_precision(bits, dtype):
    """Each of the 2^bits sign patterns has its own code, whose lowest bit is the first value."""
    patterns = torch.arange(2**bits)
    signs = ((patterns[:, None] >> torch.arange(bits)) & 1) * 2 - 1
    assert torch.equal(codes(signs[:, None].to(dtype)).squeeze(1), patterns)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_accumulates_in_float32(dtype):
    """Half-precision tables are summed in float32, in which none of the 128 rows is lost."""
    z = torch.full((2, 128, 4), 9.0, dtype=dtype)
    tables = torch.ones(128, 16, 3, dtype=dtype)
    tables[0] = 1024
    y = lookup(z, tables, score="prob")
    assert torch.allclose(y.float(), torch.tensor(1151.0).to(dtype).float(), rtol=1e-3)
    for op in (lookup, reference.lookup):
        a = z.clone().requires_grad_()
        b = tables.clone().requires_grad_()
        op(a, b, score="l1").sum().backward()
        assert a.grad.dtype == b.grad.dtype == dtype and torch.isfinite(a.grad).all()


def test_chunks_change_nothing(monkeypatch, force):
    """Splitting rows into chunks, which bounds memory for mixed dtypes, changes no result."""
    force(backend.use("torch"))
    z, tables = inputs((37, 3, 4, 5))
    whole = lookup(z, tables.bfloat16(), score="prob")
    monkeypatch.setattr(eager, "_CHUNK", 40)
    assert torch.equal(lookup(z, tables.bfloat16(), score="prob"), whole)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("bits", [1, 4, 8, 10])
@pytest.mark.parametrize("t", [0.5, 1.0])
def test_score_moment(score, bits, t):
    """The quadrature of the score's moment equals the mean over many draws."""
    z = torch.randn(400000, 1, bits)
    want = weigh(z, score, t).square().mean().sqrt().item()
    assert score_moment(score, bits, t) == pytest.approx(want, rel=0.02)


def test_published_moments():
    """The rms scores at 8 and 10 bits are as measured elsewhere: .154, .097; official 1.26, .99."""
    assert score_moment("prob", 8, 1.0) == pytest.approx(0.154, abs=2e-3)
    assert score_moment("prob", 10, 1.0) == pytest.approx(0.097, abs=2e-3)
    assert score_moment("abs_prob", 8, 1.0) == pytest.approx(1.26, abs=0.01)
    assert score_moment("abs_prob", 10, 1.0) == pytest.approx(0.99, abs=0.01)


def test_bad_shapes_and_scores():
    """The error states the shape that the tables need, or the scores that exist."""
    z, tables = inputs((2, 3, 4, 5))
    with pytest.raises(ValueError, match=r"needs tables \(3, 16, H\)"):
        lookup(z, tables[:, :8], score="prob")
    with pytest.raises(ValueError, match="choose one of prob, abs_prob, l1"):
        lookup(z, tables, score="cosine")


@pytest.mark.parametrize("name", ["torch", "reference"])
@pytest.mark.parametrize("score", SCORES)
def test_int8_tables(score, name, force):
    """With a scale per row, int8 tables err by at most half a step and are exact at whole steps."""
    force(backend.use(name))
    z, tables = inputs((40, 3, 4, 5))
    small, scale = quantise(tables)
    assert small.dtype == torch.int8 and scale.shape == (3, 16)
    assert (small.float() * scale[..., None] - tables).abs().max() <= scale.max() / 2 + 1e-6
    y = lookup(z, small, score=score, row_scale=scale)
    want = reference.lookup(z, small.float() * scale[..., None], score=score)
    assert torch.allclose(y, want, atol=1e-5)
    whole = torch.randint(-127, 128, (3, 16, 5)).float()
    whole[..., 0] = 127
    small, scale = quantise(whole * 0.5)
    assert torch.allclose(small.float() * scale[..., None], whole * 0.5)
    nothing, scale = quantise(torch.zeros(1, 2, 3))
    assert nothing.abs().sum() == 0 and torch.isfinite(scale).all()


@pytest.mark.slow
def test_first_look_ups_in_many_threads():
    """Threads that make the first look-ups of a process register the ops once and agree."""
    script = """
import sys, threading, torch
sys.path.insert(0, sys.argv[1])
from fairseq_evomoe.kernels.lookup.lookup import lookup
z, tables, found = torch.randn(5, 4, 4), torch.randn(4, 16, 8), []
start = threading.Barrier(8)
def work():
    start.wait()
    found.append(lookup(z, tables, score="prob"))
threads = [threading.Thread(target=work) for _ in range(8)]
for t in threads: t.start()
for t in threads: t.join()
assert len(found) == 8 and all(torch.equal(y, found[0]) for y in found), len(found)
"""
    assert "verrid" not in run(sys.executable, "-W", "default", "-c", script, ROOT)
