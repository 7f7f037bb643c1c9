"""kernels/lookup_triton.py, run on a GPU if there is one, else by Triton's interpreter.

Without a GPU, `aot.py` checks that the kernels compile for GPUs.
"""

import pytest
import torch
from conftest import DEVICE

from fairseq_evomoe.kernels.lookup import lookup_triton as kernel
from fairseq_evomoe.kernels.lookup import reference
from fairseq_evomoe.kernels.lookup.score import SCORES, codes, quantise

pytestmark = pytest.mark.slow


SHAPES = [
    (1, 1, 1, 1),  # the smallest
    (7, 3, 4, 5),  # unequal sizes
    (5, 9, 3, 40),  # more columns than a power of two
    (3, 2, 6, 600),  # more columns than a tile
    (0, 3, 4, 5),  # no rows
]


def inputs(shape):
    rows, tables, bits, width = shape
    z, t = torch.randn(rows, tables, bits), torch.randn(tables, 2**bits, width)
    return z.to(DEVICE), t.to(DEVICE)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_forward(shape, score, parts):
    """y and the codes equal the reference, with the tables in one part and in two."""
    z, tables = inputs(shape)
    y, code, _p = kernel.forward(z, tables, None, score, 0.7, save=True, parts=parts)
    want = reference.lookup(z.double(), tables.double(), score=score, temperature=0.7)
    assert torch.allclose(y.double(), want, atol=1e-5)
    assert torch.equal(code.long(), codes(z))
    alone, *empty = kernel.forward(z, tables, None, score, 0.7, save=False, parts=parts)
    assert torch.equal(alone, y) and all(e.numel() == 0 for e in empty)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_gradient(shape, score):
    """dz and dT equal autograd through the reference in float64, also if only one is requested."""
    z, tables = inputs(shape)
    dy = torch.randn(shape[0], shape[3]).to(DEVICE)
    _, code, p = kernel.forward(z, tables, None, score, 0.7, save=True, parts=1)
    both = kernel.backward(dy, z, tables, code, p, score, 0.7, need_z=True, need_t=True)
    a, b = z.double().requires_grad_(), tables.double().requires_grad_()
    reference.lookup(a, b, score=score, temperature=0.7).backward(dy.double())
    for have, want in zip(both, (a.grad, b.grad), strict=True):
        want = torch.zeros_like(have).double() if want is None else want
        assert torch.allclose(have.double(), want, atol=1e-4)
    dz, none = kernel.backward(dy, z, tables, code, p, score, 0.7, need_z=True, need_t=False)
    assert none is None and torch.equal(dz, both[0])
    none, dt = kernel.backward(dy, z, tables, code, p, score, 0.7, need_z=False, need_t=True)
    assert none is None and torch.equal(dt, both[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_small_tables(dtype):
    """Half-precision and int8 tables are read as the values they encode and summed in float32."""
    z, tables = inputs((6, 5, 4, 20))
    scale = None
    if dtype == torch.int8:
        held, scale = quantise(tables)
        whole = held.float() * scale[..., None]
    else:
        held = tables.to(dtype)
        whole = held.float()
    y, *_ = kernel.forward(z, held, scale, "prob", 1.0, save=False, parts=1)
    assert torch.allclose(y, reference.lookup(z, whole, score="prob"), atol=1e-5)


def test_special_values():
    """0 and -0 set the bit, infinities have probability 1, and a NaN affects its own row alone."""
    tables = torch.randn(1, 8, 20).to(DEVICE)
    z = torch.tensor([[0.0, -0.0, 0.0], [torch.inf, -torch.inf, torch.inf], [1.0, torch.nan, 1.0]])
    z = z[:, None].to(DEVICE)
    y, *_ = kernel.forward(z, tables, None, "prob", 1.0, save=False, parts=1)
    assert torch.allclose(y[0], tables[0, 7] / 8)
    assert torch.allclose(y[1], tables[0, 5])
    assert y[2].isnan().all()


def test_as_ops_of_torch():
    """The ops pass opcheck (schema, fake, autograd); a compiled call keeps the row scales."""
    z, tables = (x.requires_grad_() for x in inputs((4, 3, 4, 8)))
    torch.library.opcheck(torch.ops.evomoe.lookup_triton, (z, tables, "prob", 0.7))
    _, code, p = torch.ops.evomoe.lookup_triton(z, tables, "prob", 0.7)
    back = (torch.randn(4, 8).to(DEVICE), z.detach(), tables.detach(), code, p.detach())
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.evomoe.lookup_triton_backward, (*back, "prob", 0.7, *needs))
    small, scale = quantise(tables.detach())
    call = (z.detach(), small, scale, "prob", 0.7)
    torch.library.opcheck(torch.ops.evomoe.lookup_triton_infer, call)
    with torch.no_grad():
        whole = torch.compile(kernel.lookup, fullgraph=True, backend="eager", dynamic=False)
        y = whole(z.detach(), small, score="prob", temperature=0.7, row_scale=scale)
    assert torch.equal(y, kernel.forward(*call, save=False)[0])


def test_the_call_of_a_layer():
    """`lookup`, as layers call it, has correct gradients and takes row scales in inference only."""
    z, tables = (x.requires_grad_() for x in inputs((6, 5, 4, 20)))
    kernel.lookup(z, tables, score="l1").square().sum().backward()
    a, b = (x.detach().double().requires_grad_() for x in (z, tables))
    reference.lookup(a, b, score="l1").square().sum().backward()
    assert torch.allclose(z.grad.double(), a.grad, atol=1e-3)
    assert torch.allclose(tables.grad.double(), b.grad, atol=1e-3)
    small, scale = quantise(tables.detach())
    with torch.no_grad():
        y = kernel.lookup(z, small, score="l1", row_scale=scale)
    want = reference.lookup(z.detach(), small.float() * scale[..., None], score="l1")
    assert torch.allclose(y, want, atol=1e-5)
    with_grad = kernel.lookup(z, small, score="l1", row_scale=scale)
    assert torch.equal(with_grad, y) and not with_grad.requires_grad, "a constant to autograd"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize(
    "shape", [(4096, 64, 8, 512), (1, 128, 8, 1024), (300, 12, 10, 96)], ids=str
)
def test_on_a_gpu_through_the_package(shape):
    """The package chooses this kernel; real shapes match the reference, and two runs are equal."""
    from fairseq_evomoe.kernels.lookup.lookup import lookup

    z, tables = (x.requires_grad_() for x in inputs(shape))
    dy = torch.randn(shape[0], shape[3]).to(DEVICE)
    grads = []
    for op in (lookup, lookup, reference.lookup):
        z.grad = tables.grad = None
        y = op(z, tables, score="prob")
        y.backward(dy)
        grads.append((y, z.grad, tables.grad))
    for one, again, want in zip(*grads, strict=True):
        assert torch.equal(one, again) and torch.allclose(one, want, atol=1e-3)


def test_few_rows_fill_a_device():
    """Tables are split if rows alone give too few programs, into parts of at least 4 tables."""
    assert kernel.splits(1, 1, 64, 132) == 16
    assert kernel.splits(4096, 1, 64, 132) == 1
    assert kernel.splits(1, 1, 3, 132) == 1
    assert kernel.splits(0, 1, 64, 132) >= 1
