"""GPU dispatch, run on a GPU if there is one, else by Triton's interpreter."""

import pytest
import torch
from conftest import DEVICE
from expert_kit import by_loops, problem
from fairseq.utils import get_activation_fn
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend
from fairseq_evomoe.kernels.experts import gpu
from fairseq_evomoe.kernels.experts.dispatch_triton import add_bias, combine, dispatch
from fairseq_evomoe.kernels.experts.gpu import (
    choose_product,
    sparse_ffn,
    unsupported,
    unsupported_products,
)
from fairseq_evomoe.kernels.experts.pairs import expert_order
from fairseq_evomoe.kernels.experts.pairs_triton import sort_pairs
from fairseq_evomoe.kernels.experts.values import ExpertWeights, Routing

pytestmark = pytest.mark.slow


CASES = [
    (7, 3, 4, 8, 0.5, ()),
    (1, 4, 4, 4, 0.6, ()),  # one token
    (0, 2, 4, 4, 0.5, ()),  # no token at all
    (9, 1, 4, 4, 1.0, ()),  # one expert
    (13, 5, 12, 20, 0.4, (0, 3)),  # experts without tokens, no powers of two
    (6, 4, 4, 4, 0.0, ()),  # no active pair
    (11, 4, 4, 8, 1.0, ()),  # all pairs active
    (150, 2, 4, 8, 0.9, ()),  # experts with more rows than a block
]


fairseq_gelu = get_activation_fn("gelu")
PRODUCTS = ("grouped_mm", "fused")


def compared(case, activation, *, dtype=torch.float32, tolerance=1e-4, spare=0):
    """Compare output and every gradient with loops over tokens and experts in float64.

    `sparse_ffn` gets room for `spare` more rows than there are active pairs.
    """
    x, w, active, gate = problem(*case[:5], empty=case[5])
    narrow = lambda t: t.detach().to(dtype).to(t.dtype).requires_grad_()
    x, *w, gate = (narrow(t) for t in (x, *w, gate))
    dy = torch.randn_like(x).to(dtype).to(x.dtype)
    leaves = [x, *w, gate]
    expected = by_loops(x, w, active, gate, activation)
    expected.backward(dy)
    want = [torch.zeros_like(p) if p.grad is None else p.grad for p in leaves]
    ours = [p.detach().to(dtype).to(DEVICE).requires_grad_() for p in leaves]
    x2, w2, gate2 = ours[0], ours[1:5], ours[5]
    on = active.to(DEVICE)
    y = sparse_ffn(
        x2,
        ExpertWeights(*w2),
        Routing(gate2 * on, on),
        max_pairs=int(active.sum()) + spare,
        activation=activation,
    )
    assert y.dtype == dtype
    y.backward(dy.to(dtype).to(DEVICE))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in ours]
    for a, b in zip([y, *found], [expected, *want], strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert torch.allclose(a.detach().cpu().double(), b, atol=tolerance * scale)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=["relu", "gelu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_whole_path(case, activation, product, force):
    force(gpu.use_product(product))
    compared(case, activation)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=str)
def test_rows_to_spare(case, product, force):
    """Rows beyond the active pairs, which hold NaN here, do not affect any result."""
    force(gpu.use_product(product))
    compared(case, F.gelu, spare=9)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], (150, 2, 40, 136, 0.9, ())], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(case, dtype, force):
    """With inputs that the format holds exactly, results differ by rounding on the way only."""
    force(gpu.use_product("fused"))
    compared(case, F.gelu, dtype=dtype, tolerance=0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.mark.parametrize("case", [(300, 3, 20, 70, 0.9, ()), (70, 2, 33, 65, 0.5, (0,))], ids=str)
def test_no_power_of_two_and_many_tiles(case, force):
    """Results are right if rows, widths and depths fill several tiles and end within one."""
    force(gpu.use_product("fused"))
    compared(case, F.gelu)


def test_the_same_twice(force):
    """Two runs are equal to the bit, gradients included."""
    force(gpu.use_product("fused"))
    x, w, active, gate = problem(40, 4, 16, 24, 0.6, empty=())
    made = []
    for _ in range(2):
        leaves = [p.detach().float().to(DEVICE).requires_grad_() for p in (x, *w, gate)]
        y = sparse_ffn(
            leaves[0],
            ExpertWeights(*leaves[1:5]),
            Routing(leaves[5], active.to(DEVICE)),
            max_pairs=int(active.sum()),
            activation=F.relu,
        )
        y.sum().backward()
        made.append([y, *(p.grad for p in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("block", [None, 1, 4, 64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 5), (40, 8), (9, 300)])
def test_places_are_the_sorted_order(shape, block):
    """Pairs are sorted as on the CPU, by expert and then by token, whatever the block size."""
    active = torch.rand(shape) < 0.4
    token, counts = expert_order(active)
    found = sort_pairs(active.to(DEVICE), len(token), block=block)
    assert found.ends.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert found.token.tolist() == token.tolist()
    assert found.expert.tolist() == [e for e, n in enumerate(counts) for _ in range(n)]
    assert torch.equal(found.place.cpu() >= 0, active)
    for row, (t, e) in enumerate(zip(found.token.tolist(), found.expert.tolist(), strict=True)):
        assert int(found.place[t, e]) == row
    more = sort_pairs(active.to(DEVICE), len(token) + 3, block=block)
    assert torch.equal(more.place, found.place) and more.expert[len(token) :].tolist() == [0] * 3


def test_more_pairs_than_there_is_room_for():
    """Pairs beyond the room count as inactive: they have no place and no row of a product."""
    active = torch.ones(5, 3, dtype=torch.bool, device=DEVICE)
    found = sort_pairs(active, 7)
    assert found.ends.tolist() == [5, 7, 7] and found.token.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert found.place[:, 1].tolist() == [5, 6, -1, -1, -1] and (found.place[:, 2] == -1).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_nan_comes_through(product, force):
    """A NaN passes through, as through torch's ReLU, so that a loss scaler can see it."""
    force(gpu.use_product(product))
    x, w, active, gate = problem(6, 2, 4, 8, 1.0, empty=())
    x = x.detach().float().to(DEVICE)
    x[2] = float("nan")
    w = [p.detach().float().to(DEVICE) for p in w]
    y = sparse_ffn(
        x,
        ExpertWeights(*w),
        Routing(gate.detach().float().to(DEVICE), active.to(DEVICE)),
        max_pairs=12,
        activation=F.relu,
    )
    assert y[2].isnan().all() and not y[[0, 1, 3, 4, 5]].isnan().any()


def test_bfloat16_sums_in_float32():
    """300 experts of weight and output 1 sum to 300, which a sum in bfloat16 would not reach."""
    experts = 300
    active = torch.ones(2, experts, dtype=torch.bool, device=DEVICE)
    place = sort_pairs(active, 2 * experts).place
    x = torch.ones(2, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    rows = dispatch(x, place, 2 * experts)
    assert rows.dtype == torch.bfloat16 and torch.equal(rows, torch.ones_like(rows))
    y = combine(rows, torch.ones(2, experts, device=DEVICE), place)
    assert torch.equal(y.float(), torch.full((2, 8), 300.0, device=DEVICE))
    y.sum().backward()
    assert torch.equal(x.grad.float(), torch.full((2, 8), 300.0, device=DEVICE))


def test_bias_gradient_of_experts_without_rows_is_zero():
    """The bias gradient of an expert without rows is written and is exactly 0."""
    ends = torch.tensor([0, 3, 3, 5], dtype=torch.int32, device=DEVICE)
    expert = torch.tensor([1, 1, 1, 3, 3], dtype=torch.int32, device=DEVICE)
    h = torch.randn(5, 6, device=DEVICE, requires_grad=True)
    bias = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    y = add_bias(h, bias, expert, ends)
    assert torch.allclose(y, h + bias[expert.long()])
    dy = torch.randn_like(y)
    y.backward(dy)
    want = torch.stack([dy[:0].sum(0), dy[:3].sum(0), dy[:0].sum(0), dy[3:].sum(0)])
    assert torch.allclose(bias.grad, want) and torch.equal(h.grad, dy)


def weights(width):
    """Weights of two experts that take states of this width."""
    return ExpertWeights(
        torch.zeros(2, 16, width),
        torch.zeros(2, 16),
        torch.zeros(2, width, 16),
        torch.zeros(2, width),
    )


def test_what_it_cannot_serve_is_said(monkeypatch, force):
    """Each obstacle is named in the reason, and a forced product that cannot serve raises."""
    x, w = torch.zeros(2, 8), weights(8)
    assert "not on cpu" in unsupported(x, w, F.relu, 0.0)
    monkeypatch.setattr(backend, "triton_unsupported", lambda device: "")
    assert unsupported(x, w, F.relu, 0.0) == "" and "float64" in unsupported(
        x.double(), w, F.relu, 0.0
    )
    odd = torch.zeros(2, 6), weights(6)
    assert unsupported(*odd, F.relu, 0.0) == ""  # our own product takes any width
    assert "multiples of 4; its other product has no dropout" in unsupported(*odd, F.relu, 0.1)
    assert "ReLU and GELU" in unsupported(*odd, torch.tanh, 0.0)
    force(gpu.use_product("fused"))
    with pytest.raises(ValueError, match="'fused': has no dropout"):
        choose_product(x, w, F.relu, 0.1)


def test_the_product_follows_device_dtype_and_activation():
    """The product is chosen by device, dtype, width, dropout and activation."""
    x, w = torch.zeros(2, 8), weights(8)
    assert choose_product(x, w, F.relu, 0.0) == "grouped_mm"
    assert choose_product(x.half(), w, F.relu, 0.0) == "fused"
    assert choose_product(x.half(), w, F.relu, 0.1) == "grouped_mm"
    assert choose_product(x.half(), w, torch.tanh, 0.0) == "grouped_mm"
    assert choose_product(torch.zeros(2, 6), weights(6), F.relu, 0.0) == "fused"
    assert unsupported_products(x, w, fairseq_gelu, 0.0) == {"grouped_mm": "", "fused": ""}
    assert torch.equal(fairseq_gelu(x + 1), F.gelu(x + 1))
