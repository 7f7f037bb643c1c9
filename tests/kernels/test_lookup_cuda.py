"""csrc/lookup_cuda.cu: run thread by thread on a CPU, compiled by nvcc, and run on a GPU."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

from fairseq_evomoe.kernels import backend, native
from fairseq_evomoe.kernels.lookup import cuda, reference
from fairseq_evomoe.kernels.lookup.lookup import lookup
from fairseq_evomoe.kernels.lookup.score import SCORES, quantise

pytestmark = pytest.mark.slow


SOURCE = cuda.SOURCES / "lookup_cuda.cu"
SHAPES = [
    (1, 1, 1, 1, 1),  # the smallest; B, K, t, H and parts that the tables are split into
    (1, 20, 8, 256, 2),  # two parts, rows of whole 16-byte pieces
    (2, 9, 5, 133, 1),  # one warp has a second table; rows that end within a 16-byte piece
    (3, 17, 10, 40, 2),  # two parts of different size
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The library compiled from the same source for the CPU, with one thread per CUDA thread."""
    out = tmp_path_factory.mktemp("emulated") / "lookup.so"
    here = Path(__file__).parent
    subprocess.run(
        [
            *("g++", "-x", "c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w"),
            *("-DEVOMOE_EMULATE", f"-I{here}", str(SOURCE), "-o", str(out)),
        ],
        check=True,
    )
    return cuda.declare(ctypes.CDLL(str(out)))


def run(library, z, tables, scale, score, parts):
    return cuda.call(library, z, tables, scale, score, 0.7, parts=parts, device=0, stream=0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_thread_by_hand(shape, score, emulated):
    """The kernel, emulated thread by thread, equals the reference in float64.

    Warps, ballots, shuffles and barriers run as written, with fp32, bf16 and int8 tables and both
    input dtypes. Every element of the output is written.
    """
    rows, count, bits, width, parts = shape
    z, tables = torch.randn(rows, count, bits), torch.randn(count, 2**bits, width)
    small, scale = quantise(tables)
    held = [(tables, None, tables), (tables.bfloat16(), None, tables.bfloat16())]
    held += [(small, scale, small.float() * scale[..., None])]
    for stored, its_scale, means in held:
        want = reference.lookup(z.double(), means.double(), score=score, temperature=0.7)
        y = run(emulated, z, stored, its_scale, score, parts)
        assert torch.allclose(y.double(), want, atol=2e-5 * float(want.abs().max().clamp_min(1)))
    half = z.bfloat16()
    y = run(emulated, half, tables, None, score, parts)
    want = reference.lookup(half.double(), tables.double(), score=score, temperature=0.7)
    assert y.dtype == torch.bfloat16 and torch.allclose(y.double(), want, rtol=0.01, atol=0.02)


def test_special_values(emulated):
    """0 and -0 set the bit, infinities have p = 1, a NaN affects only its own row, and B = 0
    works."""
    tables = torch.randn(1, 8, 20)
    z = torch.tensor([[0.0, -0.0, 0.0], [torch.inf, -torch.inf, torch.inf], [1.0, torch.nan, 1.0]])
    y = run(emulated, z[:, None].contiguous(), tables, None, "prob", 1)
    assert torch.allclose(y[0], tables[0, 7] / 8) and torch.allclose(y[1], tables[0, 5])
    assert y[2].isnan().all()
    y = run(emulated, z[2:, None].bfloat16().contiguous(), tables, None, "prob", 1)
    assert y.isnan().all(), "rounding keeps a NaN"
    assert run(emulated, z[:0, None].contiguous(), tables, None, "prob", 1).shape == (0, 20)


def test_shares_of_the_tables():
    """Tables are split until each processor has two blocks; each warp keeps at least one table."""
    assert cuda.shares(1, 8, 128, 132) == 16
    assert cuda.shares(1, 2, 512, 132) == 64
    assert cuda.shares(16, 32, 128, 132) == 1
    assert cuda.shares(0, 0, 3, 132) == 1


@pytest.mark.parametrize(
    ("z", "tables", "said"),
    [
        (torch.zeros(2, 3, 4).half(), torch.zeros(3, 16, 5), "no torch.float16"),
        (torch.zeros(2, 3, 4), torch.zeros(3, 16, 5).half(), "tables of torch.float16"),
        (torch.zeros(17, 3, 4), torch.zeros(3, 16, 5), "at most 16 rows"),
    ],
)
def test_what_it_leaves_to_triton(z, tables, said):
    """The reason says what the kernel does not support; tensors on a CPU are refused too."""
    assert said in cuda.unsupported_sizes(z, tables)
    assert "CUDA devices" in cuda.unsupported(z, tables)


def test_compiled_for_gpus_that_are_not_here(tmp_path):
    """nvcc compiles the kernel for sm_80 and sm_90 without spills, and `build` gives a library."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    for sm in (80, 90):
        command = ["nvcc", *native.CUDA_FLAGS[:5], "-gencode", f"arch=compute_{sm},code=sm_{sm}"]
        done = subprocess.run(
            [*command, "-Xptxas", "-v", str(SOURCE), "-o", str(tmp_path / "x.so")],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
        assert len(registers) == 8 and max(registers) <= 96
        spills = re.findall(r"(\d+) bytes spill", done.stderr)
        assert len(spills) == 16 and set(spills) == {"0"}
    assert ctypes.CDLL(str(native.build(cuda.SOURCES, "lookup_cuda"))).evomoe_cuda_ready


def test_without_nvcc(monkeypatch, tmp_path):
    """Without nvcc a build raises with the reason, and `missing` returns the reason."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(RuntimeError, match="no nvcc on the PATH"):
        native.build(cuda.SOURCES, "lookup_cuda")
    cuda._load.cache_clear()
    assert "no nvcc" in cuda.unavailable()
    cuda._load.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
@pytest.mark.parametrize("shape", [(1, 128, 8, 1024), (16, 64, 8, 512), (3, 40, 10, 100)], ids=str)
def test_on_a_gpu(shape, force):
    """Real shapes match the reference, as an op and in a CUDA graph replayed with new input."""
    if cuda.unavailable():
        pytest.skip(cuda.unavailable())
    force(backend.use("native"))
    rows, count, bits, width = shape
    z, tables = (
        torch.randn(*s, device=DEVICE) for s in ((rows, count, bits), (count, 2**bits, width))
    )
    small, scale = quantise(tables)
    for held, its_scale in ((tables, None), (tables.bfloat16(), None), (small, scale)):
        means = held.float() if its_scale is None else held.float() * its_scale[..., None]
        want = reference.lookup(z, means, score="prob")
        assert torch.allclose(lookup(z, held, score="prob", row_scale=its_scale), want, atol=1e-4)
        torch.library.opcheck(torch.ops.evomoe.lookup_cuda, (z, held, its_scale, "prob", 1.0))
    graph, still = torch.cuda.CUDAGraph(), z.clone()
    with torch.cuda.graph(graph):
        y = lookup(still, tables, score="prob")
    still.copy_(torch.randn_like(z))
    graph.replay()
    assert torch.allclose(y, reference.lookup(still, tables, score="prob"), atol=1e-4)
