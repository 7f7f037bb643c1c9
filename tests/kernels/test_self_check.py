"""kernels/self_check.py: kernels for GPUs prove themselves before they serve.

The kernels run on a GPU if there is one, otherwise in Triton's interpreter."""

import logging

import pytest
import torch
from conftest import DEVICE
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend, self_check
from fairseq_evomoe.kernels.experts import gpu, products_triton, serve
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing
from fairseq_evomoe.kernels.gate import gate, gate_triton, sums, sums_triton
from fairseq_evomoe.kernels.gate.rule import Rule
from fairseq_evomoe.kernels.lookup import lookup_triton
from fairseq_evomoe.kernels.lookup.lookup import lookup

pytestmark = pytest.mark.slow


TRITON = "" if DEVICE == "cuda" else "triton"
"""On a CPU the kernels must be forced, because paths for CPUs come first."""


@pytest.fixture(autouse=True)
def unchecked(monkeypatch, triton_can):
    """No kernel has been checked in this process yet."""
    monkeypatch.setattr(self_check, "_FOUND", {})


def experts(dtype=torch.float32):
    shapes = ((3, 24, 16), (3, 24), (3, 16, 24), (3, 16))
    x = torch.randn(9, 16, device=DEVICE, dtype=dtype)
    weights = torch.rand(9, 3, device=DEVICE)
    active = torch.zeros(9, 3, dtype=torch.bool, device=DEVICE)
    active[:, 1] = True
    made = ExpertWeights(*(torch.randn(s, device=DEVICE, dtype=dtype) for s in shapes))
    with backend.use(TRITON):
        return serve.run_experts(x, made, Routing(weights * active, active, 1), activation=F.relu)


def gated():
    return gate.dense_to_sparse(torch.randn(9, 3, device=DEVICE), Rule(threshold=0.3)).weights


def summed():
    z = torch.randn(9, 3, device=DEVICE)
    return sums.routing_sums(z, z.softmax(-1), z > 0).entropy


def looked_up(dtype=torch.float32):
    z, tables = torch.randn(40, 2, 3, device=DEVICE), torch.randn(2, 8, 5, device=DEVICE)
    with backend.use(TRITON):
        if dtype == torch.int8:
            scale = torch.rand(2, 8, device=DEVICE)
            return lookup(z, (tables * 20).to(dtype), score="l1", row_scale=scale)
        return lookup(z, tables.to(dtype), score="l1")


CALLS = {
    "experts": experts,
    "experts in bfloat16": lambda: experts(torch.bfloat16),
    "gate": gated,
    "sums": summed,
    "look-up": looked_up,
    "look-up of bfloat16": lambda: looked_up(torch.bfloat16),
    "look-up of int8": lambda: looked_up(torch.int8),
}


@pytest.mark.parametrize("call", CALLS)
def test_good_kernels_pass_once(call, caplog):
    """A kernel that is right is checked at its first use, without touching the random stream."""
    torch.manual_seed(5)
    CALLS[call]()
    checked = dict(self_check._FOUND)
    assert checked and set(checked.values()) == {""}
    after = torch.rand(3)
    torch.manual_seed(5)
    CALLS[call]()
    assert torch.equal(torch.rand(3), after) and checked == self_check._FOUND
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def wrong(original):
    """A kernel whose last rows are wrong."""

    def broken(*args, **kwargs):
        out = original(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        first.detach()[-1:] *= 1.5
        return out

    return broken


def fails_to_compile(original):
    def broken(*args, **kwargs):
        raise RuntimeError("ptxas: out of registers")

    return broken


BROKEN = (
    ("experts", products_triton, "fused_ffn", "experts, fused"),
    ("gate", gate_triton, "fused_gate", "gate"),
    ("sums", sums_triton, "fused_sums", "routing sums"),
    ("look-up", lookup_triton, "forward", "look-up, Triton, torch.float32"),
    ("look-up", lookup_triton, "lookup", "look-up, Triton, torch.float32"),
)


@pytest.mark.parametrize("how", [wrong, fails_to_compile])
@pytest.mark.parametrize(("call", "module", "name", "kernel"), BROKEN, ids=str)
def test_broken_kernels_do_not_serve(call, module, name, kernel, how, monkeypatch, caplog):
    """A kernel that differs from torch's path or raises is named in one line, and another path
    serves; where it is forced, that is an error."""
    real = {"experts": gpu.sparse_product}.get(call)
    monkeypatch.setattr(module, name, how(getattr(module, name)))
    served = []
    if real:
        spy = lambda product, *args, **kw: served.append(product) or real(product, *args, **kw)
        monkeypatch.setattr(gpu, "sparse_product", spy)
    forced = call == "look-up" and DEVICE == "cpu"
    with caplog.at_level("WARNING"):
        if forced:
            with pytest.raises(ValueError, match="failed its self-check"):
                CALLS[call]()
        else:
            CALLS[call]()
            CALLS[call]()
    if real:
        # the checks of both products come first, then the good one serves both calls
        assert served[-2:] == ["grouped_mm"] * 2
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert line.startswith(kernel + " on ") and "torch serves instead" in line
    assert "Please report" in line
    assert ("ptxas" in line) == (how is fails_to_compile)


def test_switched_off(monkeypatch):
    """EVOMOE_SELF_CHECK=0 leaves the check out."""
    monkeypatch.setattr(self_check, "_ENABLED", False)
    monkeypatch.setattr(gate_triton, "fused_gate", wrong(gate_triton.fused_gate))
    gated()
    assert self_check._FOUND == {}


def test_values_that_are_not_numbers_fail():
    """NaN is never equal."""
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert self_check.difference(bad, good) == float("inf")
    assert self_check.difference(good, good) == 0
