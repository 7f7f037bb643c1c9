"""GPU dispatch: on a GPU where there is one, else by Triton's interpreter."""

import pytest
import torch
from conftest import DEVICE
from fairseq.utils import get_activation_fn
from test_grouped_ffn import by_loops, problem
from torch.nn import functional as F

from fairseq_evomoe.kernels import backend, grouped_ffn_gpu, routing
from fairseq_evomoe.kernels.dispatch_triton import add_bias, combine, dispatch
from fairseq_evomoe.kernels.grouped_ffn_gpu import choose_product, sparse_ffn, unfit, why_not
from fairseq_evomoe.kernels.routing_triton import sort_pairs

CASES = [
    (7, 3, 4, 8, 0.5, ()),
    (1, 4, 4, 4, 0.6, ()),  # one token
    (0, 2, 4, 4, 0.5, ()),  # no token at all
    (9, 1, 4, 4, 1.0, ()),  # one expert
    (13, 5, 12, 20, 0.4, (0, 3)),  # experts without tokens, no powers of two
    (6, 4, 4, 4, 0.0, ()),  # nobody goes anywhere
    (11, 4, 4, 8, 1.0, ()),  # everybody goes everywhere
    (150, 2, 4, 8, 0.9, ()),  # more rows of an expert than a block
]


fairseq_gelu = get_activation_fn("gelu")
PRODUCTS = ("grouped_mm", "fused")


def compared(case, activation, *, dtype=torch.float32, tolerance=1e-4, spare=0):
    """Output and every gradient beside those of loops over tokens and experts in float64.

    `spare` rows are made room for beyond those that there are.
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
    pairs = int(active.sum()) + spare
    y = sparse_ffn(x2, *w2, weight=gate2 * on, active=on, pairs=pairs, activation=activation)
    assert y.dtype == dtype
    y.backward(dy.to(dtype).to(DEVICE))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in ours]
    for a, b in zip([y, *found], [expected, *want], strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        assert torch.allclose(a.detach().cpu().double(), b, atol=tolerance * scale)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("activation", [F.relu, F.gelu], ids=["relu", "gelu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_whole_path(case, activation, product, monkeypatch):
    monkeypatch.setattr(grouped_ffn_gpu, "product", product)
    compared(case, activation)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[5]], ids=str)
def test_rows_to_spare(case, product, monkeypatch):
    """Room for more rows than there are: what is in them (NaN here) reaches nothing."""
    monkeypatch.setattr(grouped_ffn_gpu, "product", product)
    compared(case, F.gelu, spare=9)


@pytest.mark.parametrize("case", [CASES[0], CASES[4], (150, 2, 40, 136, 0.9, ())], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(case, dtype, monkeypatch):
    """Inputs that the format holds exactly: what differs is rounding on the way."""
    monkeypatch.setattr(grouped_ffn_gpu, "product", "fused")
    compared(case, F.gelu, dtype=dtype, tolerance=0.03 if dtype == torch.bfloat16 else 0.004)


@pytest.mark.parametrize("case", [(300, 3, 20, 70, 0.9, ()), (70, 2, 33, 65, 0.5, (0,))], ids=str)
def test_no_power_of_two_and_many_tiles(case, monkeypatch):
    """Rows, widths and depths that end within a tile, and more than one tile of each."""
    monkeypatch.setattr(grouped_ffn_gpu, "product", "fused")
    compared(case, F.gelu)


def test_the_same_twice(monkeypatch):
    """Bit for bit, gradients included."""
    monkeypatch.setattr(grouped_ffn_gpu, "product", "fused")
    x, w, active, gate = problem(40, 4, 16, 24, 0.6, empty=())
    made = []
    for _ in range(2):
        leaves = [p.detach().float().to(DEVICE).requires_grad_() for p in (x, *w, gate)]
        y = sparse_ffn(
            *leaves[:5], weight=leaves[5], active=active.to(DEVICE), pairs=int(active.sum()),
            activation=F.relu,
        )  # fmt: skip
        y.sum().backward()
        made.append([y, *(p.grad for p in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.parametrize("block", [None, 1, 4, 64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (17, 5), (40, 8), (9, 300)])
def test_places_are_the_sorted_order(shape, block):
    """The same order as the CPU's, whatever the block: experts ascending, tokens within."""
    active = torch.rand(shape) < 0.4
    token, counts = routing.sort_pairs(active)
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
    """Those beyond are as good as inactive: no place, and no rows that a product would write."""
    active = torch.ones(5, 3, dtype=torch.bool, device=DEVICE)
    found = sort_pairs(active, 7)
    assert found.ends.tolist() == [5, 7, 7] and found.token.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert found.place[:, 1].tolist() == [5, 6, -1, -1, -1] and (found.place[:, 2] == -1).all()


@pytest.mark.parametrize("product", PRODUCTS)
def test_nan_comes_through(product, monkeypatch):
    """As through torch's ReLU: a loss scaler must see it."""
    monkeypatch.setattr(grouped_ffn_gpu, "product", product)
    x, w, active, gate = problem(6, 2, 4, 8, 1.0, empty=())
    x = x.detach().float().to(DEVICE)
    x[2] = float("nan")
    w = [p.detach().float().to(DEVICE) for p in w]
    y = sparse_ffn(
        x, *w, weight=gate.detach().float().to(DEVICE), active=active.to(DEVICE), pairs=12,
        activation=F.relu,
    )  # fmt: skip
    assert y[2].isnan().all() and not y[[0, 1, 3, 4, 5]].isnan().any()


def test_bfloat16_sums_in_float32():
    """300 experts of weight and output 1: the sum counts them all, where bfloat16 would not."""
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
    """Nothing is left unwritten: an expert without rows gets exactly 0."""
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


def test_what_it_cannot_serve_is_said(monkeypatch):
    """Each reason names itself, and a product that is told but cannot serve raises."""
    x, w = torch.zeros(2, 8), torch.zeros(2, 16, 8)
    assert "not on cpu" in why_not(x, w, F.relu, 0.0)
    monkeypatch.setattr(backend, "without_triton", lambda device: "")
    assert why_not(x, w, F.relu, 0.0) == "" and "float64" in why_not(x.double(), w, F.relu, 0.0)
    odd = torch.zeros(2, 6), torch.zeros(2, 16, 6)
    assert why_not(*odd, F.relu, 0.0) == ""  # our own takes any width
    assert "multiples of 4; its other product has no dropout" in why_not(*odd, F.relu, 0.1)
    assert "ReLU and GELU" in why_not(*odd, torch.tanh, 0.0)
    monkeypatch.setattr(grouped_ffn_gpu, "product", "fused")
    with pytest.raises(ValueError, match="'fused': has no dropout"):
        choose_product(x, w, F.relu, 0.1)


def test_the_product_follows_device_dtype_and_activation():
    """torch's has a kernel for bfloat16 on new devices; odd widths, dropout, others decide."""
    x, w = torch.zeros(2, 8), torch.zeros(2, 16, 8)
    assert choose_product(x, w, F.relu, 0.0) == "grouped_mm"
    assert choose_product(x.half(), w.half(), F.relu, 0.0) == "fused"
    assert choose_product(x.half(), w.half(), F.relu, 0.1) == "grouped_mm"
    assert choose_product(x.half(), w.half(), torch.tanh, 0.0) == "grouped_mm"
    assert choose_product(torch.zeros(2, 6), torch.zeros(2, 16, 6), F.relu, 0.0) == "fused"
    assert unfit(x, w, fairseq_gelu, 0.0) == {"grouped_mm": "", "fused": ""}
    assert torch.equal(fairseq_gelu(x + 1), F.gelu(x + 1))
