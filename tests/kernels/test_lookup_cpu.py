"""csrc/lookup_cpu.cpp: every instruction set against the reference in float64."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from fairseq_evomoe.kernels import backend, native
from fairseq_evomoe.kernels.lookup import cpu, reference
from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.lookup.score import SCORES, quantise

SHAPES = [
    (1, 1, 1, 1),  # the smallest
    (1, 5, 8, 100),  # one row, split over columns; the width fills no register
    (7, 3, 4, 5),  # unequal sizes
    (64, 9, 8, 48),  # by rows; 4 does not divide the number of tables
    (600, 11, 4, 70),  # by tiles; 8 does not divide the tables, the last tile has 6 columns
    (300, 3, 5, 32),  # by tiles, all of full width
    (5200, 2, 10, 33),  # by tiles too large for 8 tables at once
    (0, 3, 4, 5),  # no rows
]


@pytest.fixture(params=native.ISAS)
def isa(request, monkeypatch, force):
    assert not cpu.unavailable()
    if native.ISAS.index(request.param) > torch.ops.evomoe.lookup_cpu_isa():
        pytest.skip(f"this machine has no {request.param}")
    force(backend.use("native"))
    with chosen(monkeypatch, request.param):
        yield


@contextmanager
def chosen(monkeypatch, name):
    """Set EVOMOE_CPU_ISA, which is read once per process, and clear the cached value."""
    monkeypatch.setenv("EVOMOE_CPU_ISA", name)
    cpu._isa.cache_clear()
    yield
    cpu._isa.cache_clear()


def inputs(shape):
    rows, tables, bits, width = shape
    return torch.randn(rows, tables, bits), torch.randn(tables, 2**bits, width)


def close(have, want):
    scale = want.abs().max().clamp_min(1) if want.numel() else 1
    return torch.allclose(have.double(), want.double(), atol=float(2e-5 * scale), rtol=2e-5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, score, isa):
    """y, dz and dT equal those of autograd through the reference in float64."""
    z, tables = inputs(shape)
    dy = torch.randn(shape[0], shape[3])
    results = []
    for op, dtype in ((lookup, torch.float32), (reference.lookup, torch.float64)):
        a = z.clone().to(dtype).requires_grad_()
        b = tables.clone().to(dtype).requires_grad_()
        y = op(a, b, score=score, temperature=0.7)
        y.backward(dy.to(dtype))
        zero = torch.zeros_like(b)
        results.append((y.detach(), a.grad, zero if b.grad is None else b.grad))
    for have, want in zip(*results, strict=True):
        assert close(have, want)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
def test_one_gradient_alone(shape, isa):
    """A gradient that is not requested is not computed, and the other one does not change."""
    z, tables = inputs(shape)
    dy = torch.randn(shape[0], shape[3])
    both = z.clone().requires_grad_(), tables.clone().requires_grad_()
    lookup(*both, score="prob").backward(dy)
    for i in (0, 1):
        one = [z.clone(), tables.clone()]
        one[i].requires_grad_()
        lookup(*one, score="prob").backward(dy)
        assert torch.equal(one[i].grad, both[i].grad) and one[1 - i].grad is None


@pytest.mark.parametrize("width", [1, 20, 33])
def test_memory_of_others_does_not_leak_in(width, isa):
    """Gradients of widths that do not fill a tile are finite, whatever freed memory holds."""
    z, tables = inputs((512, 3, 4, width))
    for _ in range(8):
        leaves = z.clone().requires_grad_(), tables.clone().requires_grad_()
        y = lookup(*leaves, score="prob")
        dy = torch.ones_like(y)
        poison = [torch.full((512 * 32 + n,), float("nan")) for n in range(0, 64, 8)]
        del poison
        found = torch.autograd.grad(y, leaves, dy)
        assert all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_small_tables(shape, score, isa):
    """int8 rows with their scales, and bfloat16 rows, are read as the values they encode."""
    z, tables = inputs(shape)
    small, scale = quantise(tables)
    want = reference.lookup(z.double(), (small.float() * scale[..., None]).double(), score=score)
    assert close(lookup(z, small, score=score, row_scale=scale), want)
    half = tables.bfloat16()
    assert close(lookup(z, half, score=score), reference.lookup(z, half.double(), score=score))
    # a bfloat16 parameter gets a bfloat16 gradient, summed in float32
    a, b = half.clone().requires_grad_(), half.float().requires_grad_()
    for x in (a, b):
        lookup(z, x, score=score).sum().backward()
    assert a.grad.dtype == torch.bfloat16 and torch.equal(a.grad, b.grad.bfloat16())
    plain = lookup(z, small, score=score, row_scale=scale)
    with_grad = lookup(z.clone().requires_grad_(), small, score=score, row_scale=scale)
    assert torch.equal(with_grad, plain) and not with_grad.requires_grad, "a constant to autograd"


@pytest.mark.parametrize("shape", [(600, 11, 4, 70), (64, 9, 8, 48)], ids=str)
def test_a_row_does_not_know_its_batch(shape, isa):
    """A row's result is the same to the bit alone, in a batch and on any number of threads, because
    every sum has a fixed order."""
    z, tables = inputs(shape)
    whole = lookup(z, tables, score="prob")
    for i in (0, len(z) // 2, len(z) - 1):
        assert torch.equal(lookup(z[i : i + 1], tables, score="prob")[0], whole[i])
    grads = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        a, b = z.clone().requires_grad_(), tables.clone().requires_grad_()
        y = lookup(a, b, score="prob")
        y.square().sum().backward()
        assert torch.equal(y, whole)
        grads.append((a.grad, b.grad))
    torch.set_num_threads(before)
    for other in grads[1:]:
        assert all(torch.equal(x, y) for x, y in zip(grads[0], other, strict=True))


def test_special_values(isa):
    """0 and -0 set the bit, infinities have p = 1, and a NaN affects its own row alone."""
    tables = torch.randn(1, 8, 20)
    z = torch.tensor([[0.0, -0.0, 0.0], [torch.inf, -torch.inf, torch.inf], [1e30, 1, -1e-30]])
    y = lookup(z[:, None], tables, score="prob")
    assert close(y[0], tables[0, 7] / 8)
    assert torch.equal(y[1], tables[0, 5])
    assert close(y[2], tables[0, 3] * torch.sigmoid(torch.tensor(2.0)) / 2)
    z[0, 1] = torch.nan
    y = lookup(z[:, None], tables, score="prob")
    assert y[0].isnan().all() and torch.isfinite(y[1:]).all()


def test_nothing_is_left_unwritten(isa):
    """With new memory filled with NaN, every element of the results is still finite."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for shape in SHAPES:
            z, tables = (x.requires_grad_() for x in inputs(shape))
            y = lookup(z, tables, score="abs_prob")
            y.sum().backward()
            assert all(torch.isfinite(x).all() for x in (y, z.grad, tables.grad))
    finally:
        torch.use_deterministic_algorithms(False)


def test_half_precision_inputs_and_strides(isa):
    """Half-precision inputs and non-contiguous inputs and tables give the right results."""
    z, tables = inputs((33, 3, 4, 16))
    for dtype in (torch.float16, torch.bfloat16):
        y = lookup(z.to(dtype), tables, score="prob")
        want = reference.lookup(z.to(dtype).double(), tables.double(), score="prob")
        assert (y.dtype == dtype and torch.equal(y, want.float().to(dtype))) or close(y, want)
    turned = tables.transpose(1, 2).contiguous().transpose(1, 2)
    strided = torch.stack([z, z])[:, ::2]
    assert torch.equal(
        lookup(strided[0], turned, score="prob"), lookup(z[::2], tables, score="prob")
    )


def test_as_ops_of_torch(isa):
    """The ops pass opcheck, and torch.compile makes one graph with the same gradients."""
    z, tables = (x.requires_grad_() for x in inputs((40, 3, 4, 16)))
    call = (z, tables, None, 0, 0.7, cpu.isa())
    torch.library.opcheck(torch.ops.evomoe.lookup_cpu, call)
    plain = (z.detach(), tables.detach(), *call[2:])
    torch.library.opcheck(torch.ops.evomoe.lookup_cpu_infer, plain)
    assert torch.equal(
        torch.ops.evomoe.lookup_cpu_infer(*plain), torch.ops.evomoe.lookup_cpu(*call)[0]
    )
    _, code, p = torch.ops.evomoe.lookup_cpu(*call)
    back = (torch.randn(40, 16), z.detach(), tables.detach(), code, p.detach(), 0, 0.7)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.evomoe.lookup_cpu_backward, (*back, *needs, cpu.isa()))
    torch._dynamo.reset()  # a compiled graph keeps the instruction set it was compiled with
    f = lambda a, b: lookup(a, b, score="prob", temperature=0.7).square().sum()
    grads = []
    for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        z.grad = tables.grad = None
        g(z, tables).backward()
        grads.append((z.grad, tables.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_it_cannot_serve_is_said(monkeypatch, force):
    """float64 falls back to torch, and is refused with the reason if native is forced."""
    z, tables = inputs((3, 2, 4, 5))
    args = (z.double(), tables.double())
    assert torch.allclose(
        lookup(*args, score="prob"), reference.lookup(*args, score="prob"), atol=1e-12
    )
    force(backend.use("native"))
    with pytest.raises(ValueError, match="it has no torch.float64"):
        lookup(*args, score="prob")
    with (
        chosen(monkeypatch, "mmx"),
        pytest.raises(ValueError, match="this machine has portable"),
    ):
        lookup(z, tables, score="prob")


PROGRAM = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
from fairseq_evomoe.kernels.lookup.lookup import lookup
for _ in range(2):
    lookup(torch.randn(2, 3, 4), torch.randn(3, 16, 5), score="prob")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "said"),
    [("/no/such/compiler", "No such file"), ("/bin/false", "/bin/false exited 1")],
)
def test_without_a_compiler_torch_serves(compiler, said, tmp_path):
    """Without a compiler one log line says why, the call works, and no partial build remains."""
    env = {**os.environ, "CXX": compiler, "EVOMOE_CACHE": str(tmp_path)}
    env.pop("EVOMOE_BACKEND", None)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [x for x in done.stderr.splitlines() if "torch serves instead" in x]
    assert len(lines) == 1 and said in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_build_is_kept(tmp_path, monkeypatch):
    """A second build returns the library in the cache folder without compiling again."""
    monkeypatch.setenv("EVOMOE_CACHE", str(tmp_path))
    first = native.build(cpu.SOURCES, "lookup_cpu")
    stamp = first.stat().st_mtime_ns
    assert native.build(cpu.SOURCES, "lookup_cpu") == first and first.stat().st_mtime_ns == stamp
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
