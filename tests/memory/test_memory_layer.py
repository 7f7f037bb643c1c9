"""memory/: the layer, its initial scale, the FFN and attention against formulas."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from fairseq_evomoe.kernels.lookup import reference
from fairseq_evomoe.kernels.lookup.score import patterns
from fairseq_evomoe.memory.attention import MemoryAttention
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.fit import linear_tables
from fairseq_evomoe.memory.layer import MemoryFFN, MemoryLayer
from fairseq_evomoe.memory.official import load_official

D = 24


def flags(**changes):
    return MemoryConfig(**{"memory_bits": 4, "memory_lr_scale": 1.0, **changes}).check()


@pytest.mark.parametrize("width", [24, 22, 3])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_layer(width, scale):
    """The layer looks up slices of 4 values, zero-padded if 4 does not divide the width, in scaled
    tables and adds a bias."""
    made = MemoryLayer(width, 10, flags(memory_lr_scale=scale))
    nn.init.normal_(made.bias)
    x = torch.randn(5, 2, width)
    full = torch.zeros(10, math.ceil(width / 4) * 4)
    full[:, :width] = x.view(10, width)
    want = reference.lookup(full.view(10, -1, 4), made.tables * scale, score="prob") + made.bias
    assert torch.allclose(made(x), want.view(5, 2, 10), atol=1e-5)


LINEAR = {"memory_linear": True, "memory_lr_scale": 3.0}


@pytest.mark.parametrize("score", ["prob", "abs_prob", "l1"])
@pytest.mark.parametrize("bits", [4, 8, 10])
@pytest.mark.parametrize("form", [{}, LINEAR], ids=["rows", "linear part"])
def test_initial_output_has_the_scale_of_a_linear_layer(score, bits, form):
    """Standard normal inputs give outputs of nn.Linear's standard deviation, 1 / sqrt(3)."""
    width = 40 * bits
    cfg = flags(memory_score=score, memory_bits=bits, memory_delta=0, **form)
    made = MemoryLayer(width, 64, cfg)
    x = torch.randn(200, width)
    linear = nn.Linear(width, 64, bias=False)
    with torch.no_grad():
        assert made(x).std().item() == pytest.approx(linear(x).std().item(), rel=0.1)


def look_up(made, x):
    """What a layer with a linear part outputs, by its definition: every table written out."""
    rule, signs = made.rule, patterns(made.rule.bits) * 2.0 - 1
    whole = rule.scale * made.tables + rule.gain * torch.einsum("nt,kth->knh", signs, made.linear)
    y = reference.lookup(rule.slices(x), whole, score=rule.score) + made.bias
    return y.view(*x.shape[:-1], -1)


@pytest.mark.parametrize("training", [True, False])
def test_a_linear_part_is_a_part_of_the_tables(training):
    """With --memory-linear the layer reads rows times the scale plus a sum_i s_i L_i."""
    made = MemoryLayer(D, 10, flags(**LINEAR)).train(training)
    x = torch.randn(5, 2, D)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(made(x), look_up(made, x), atol=1e-5)


def test_folded_tables_follow_the_parameters():
    """In evaluation the parts are added once, and again after every change of a parameter."""
    made = MemoryLayer(D, 10, flags(**LINEAR)).eval()
    x = torch.randn(64, D)

    def check(model):
        # no change of mode here: that alone would forget the folded tables
        with torch.no_grad():
            assert torch.allclose(model(x), look_up(model, x), atol=1e-5)
            first = model._folded
            model(x)
            assert model._folded is first and first is not None

    check(made)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.1)
    made(x).square().sum().backward()
    optimizer.step()
    check(made)
    other = MemoryLayer(D, 10, flags(**LINEAR))
    made.load_state_dict(other.state_dict())
    check(made)
    made.train()
    # fairseq writes half-precision weights in this way, which autograd does not see
    made.linear.data.mul_(2)
    made.eval()
    check(made)
    copied = copy.deepcopy(made)
    assert copied._folded is None and pickle.loads(pickle.dumps(made))._folded is None
    with torch.no_grad():
        copied.linear.mul_(2)
    check(copied)
    assert not torch.equal(copied(x), made(x))
    assert set(made.state_dict()) == {"tables", "linear", "bias"}


def test_a_layer_that_was_made_in_inference_mode():
    """Its parameters do not count their changes, so its parts are added at every call."""
    with torch.inference_mode():
        made = MemoryLayer(D, 10, flags(**LINEAR)).eval()
        x = torch.randn(5, D)
        assert torch.allclose(made(x), look_up(made, x), atol=1e-5)
        made.linear.mul_(2)
        assert torch.allclose(made(x), look_up(made, x), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory_straight_through": True}, "--memory-straight-through"),
        ({"memory_linear": True, "memory_tables": "int8"}, "leave out --memory-linear"),
        ({"memory_dropout": 0.1}, "--memory-score abs_prob or l1"),
        ({"memory_dropout": 1.0, "memory_score": "l1"}, "--memory-dropout 1.0"),
        ({"memory_parallel": True}, "--memory-parallel"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_refused_by_name(changes, said):
    """A flag that would have no effect, or a wrong one, is refused before anything is built."""
    with pytest.raises(ValueError, match=said):
        flags(**changes)


def test_a_filled_layer_is_the_dense_layer_and_rows():
    """A layer that is filled with the best tables for a dense layer has its weights as linear part
    and rows of 0, and `fill` is the inverse of `whole_tables`."""
    made = MemoryLayer(D, 10, flags(**LINEAR, memory_score="l1"))
    weight = torch.randn(10, D)
    made.fill(linear_tables(made, weight))
    assert torch.allclose(made.linear.flatten(0, 1).T, weight, atol=1e-5)
    assert made.tables.abs().max() < 1e-5
    whole = torch.randn(made.tables.shape)
    made.fill(whole)
    assert torch.allclose(made.whole_tables(), whole, atol=1e-5)


@pytest.mark.parametrize("score", ["abs_prob", "l1"])
def test_dropout_of_tables(score):
    """A token reads each table with probability 1 - p, times 1 / (1 - p), and evaluation reads all.

    With one table that is an output of 0 or of the whole, scaled."""
    cfg = flags(memory_score=score, memory_dropout=0.25)
    made = MemoryLayer(4, 10, cfg)
    x = torch.randn(4000, 4, requires_grad=True)
    whole = made.eval()(x).detach()
    y = made.train()(x)
    dropped = (y == 0).all(-1)
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(y[~dropped], whole[~dropped] / 0.75, atol=1e-5)
    y.sum().backward()
    assert (x.grad[dropped] == 0).all() and (x.grad[~dropped] != 0).any(-1).all()
    many = MemoryLayer(400, 10, cfg)
    x = torch.randn(2000, 400)
    bias = (many.train()(x) - many.eval()(x)).mean(0).abs().max()
    assert bias < 0.1, "the mean over masks is the whole"


def test_learning_rate_of_the_tables():
    """With --memory-lr-scale s, one Adam step moves the scaled tables s times as far."""
    moved = []
    for scale in (1.0, 3.0):
        torch.manual_seed(1)
        made = MemoryLayer(D, 8, flags(memory_lr_scale=scale))
        before = (made.tables * scale).detach().clone()
        optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
        made(torch.randn(64, D)).square().sum().backward()
        optimizer.step()
        change = (made.tables * scale - before).abs()
        moved.append((before, change[change > 0].median().item()))
    assert torch.allclose(moved[0][0], moved[1][0], atol=1e-6), "the same tables at first"
    assert moved[1][1] == pytest.approx(3 * moved[0][1], rel=0.01)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("delta", "hidden"), [(0, None), (2, None), (0, 96), (2, 31)])
def test_ffn(norm, delta, hidden):
    """The FFN is two look-ups with a norm between them, of widths (t + delta) K and D, with 2^t and
    2^(t + delta) rows; a hidden width of its own gives the second more tables."""
    cfg = flags(memory_norm=norm, memory_delta=delta, memory_ffn_embed_dim=hidden)
    made = MemoryFFN(D, cfg)
    tables = D // 4
    hidden = hidden or (4 + delta) * tables
    assert made.first.tables.shape == (tables, 16, hidden)
    assert made.second.tables.shape == (-(-hidden // (4 + delta)), 2 ** (4 + delta), D)
    x = torch.randn(7, D)
    h = made.first(x)
    if norm == "layer":
        h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    else:
        h = h / (h.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    assert torch.allclose(made(x), made.second(h), atol=1e-4)


def attend(q, k, v, heads):
    """Softmax attention over (L, B, D) without masks, head after head."""
    out = torch.zeros_like(q)
    size = q.size(-1) // heads
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        a, b, c = (t[..., part].transpose(0, 1) for t in (q, k, v))
        out[..., part] = (torch.softmax(a @ b.mT / size**0.5, -1) @ c).transpose(0, 1)
    return out


@pytest.mark.parametrize("out", ["none", "dense", "memory"])
def test_self_attention(out):
    """Queries, keys and values are thirds of one look-up."""
    made = MemoryAttention(D, 3, self_attention=True, cfg=flags(memory_out_proj=out))
    x = torch.randn(6, 2, D)
    q, k, v = made.qkv(x).chunk(3, -1)
    want = attend(q, k, v, 3)
    if out == "dense":
        want = made.out(want)
    elif out == "memory":
        want = made.out(made.out_norm(want))
    have, _ = made(x, x, x)
    assert torch.allclose(have, want, atol=1e-5)
    have.sum().backward()
    assert all(p.grad is not None for p in made.parameters())
    assert not any("_proj" in n for n, _ in made.named_parameters()), "no linear map is left over"


def test_attention_over_an_encoder():
    """An encoder output of another width is hashed once, for keys and values together."""
    made = MemoryAttention(D, 3, kdim=16, vdim=16, encoder_decoder_attention=True, cfg=flags())
    x, encoded = torch.randn(4, 2, D), torch.randn(6, 2, 16)
    k, v = made.kv(encoded).chunk(2, -1)
    have, _ = made(x, encoded, encoded, static_kv=True)
    q = made.q(x)
    out = torch.zeros_like(q)
    for h in range(3):
        part = slice(8 * h, 8 * h + 8)
        a, b, c = (t[..., part].transpose(0, 1) for t in (q, k, v))
        out[..., part] = (torch.softmax(a @ b.mT / 8**0.5, -1) @ c).transpose(0, 1)
    assert torch.allclose(have, out, atol=1e-5)


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"memory_layers": "0,x"}, "--memory-layers 0,x"),
        ({"memory_bits": 0}, "--memory-bits 0"),
        ({"memory_bits": 12, "memory_delta": 5}, "--memory-delta 5"),
        ({"memory_ffn_embed_dim": 0}, "--memory-ffn-embed-dim 0"),
        ({"memory_score": "cosine"}, "--memory-score cosine"),
        ({"memory_norm": "batch"}, "--memory-norm batch"),
        ({"memory_out_proj": "big"}, "--memory-out-proj big"),
        ({"memory_temperature": 0.0}, "--memory-temperature 0.0"),
        ({"memory_lr_scale": -1.0}, "--memory-lr-scale -1.0"),
    ],
    ids=str,
)
def test_bad_flags_name_themselves(change, flag):
    """Each impossible value is refused with the flag's name in the message."""
    with pytest.raises(ValueError, match=flag):
        flags(**change)


@pytest.mark.parametrize("flat", [True, False])
def test_official_weights(flat):
    """Official tables, numbered with the first value as the highest bit and scored by S p, give the
    same outputs."""
    made = MemoryLayer(D, 5, flags(memory_score="abs_prob", memory_lr_scale=3.0))
    tables, bias = torch.randn(6, 16, 5), torch.randn(5)
    load_official(made, tables.view(-1, 5) if flat else tables, bias)
    x = torch.randn(20, D)
    want = []
    for row in x.tolist():
        y = bias.clone()
        for k in range(6):
            z = row[4 * k : 4 * k + 4]
            code = sum((v >= 0) << (3 - i) for i, v in enumerate(z))
            p = math.prod(1 / (1 + math.exp(-2 * abs(v))) for v in z)
            y = y + sum(map(abs, z)) * p * tables[k, code]
        want.append(y)
    assert torch.allclose(made(x), torch.stack(want), atol=1e-4)


def test_official_weights_that_do_not_fit():
    with pytest.raises(ValueError, match="--memory-score prob"):
        load_official(MemoryLayer(D, 5, flags()), torch.zeros(6, 16, 5))
    with pytest.raises(ValueError, match="--memory-bits"):
        load_official(MemoryLayer(D, 5, flags(memory_score="abs_prob")), torch.zeros(6, 32, 5))


def test_which_layers():
    assert [flags(memory_layers="0, 2").covers(i) for i in range(3)] == [True, False, True]
    assert flags().covers(7)


@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize("mask", ["none", "future", "padding", "both"])
@pytest.mark.parametrize("out", ["none", "dense", "memory"])
def test_attention_without_weights_equals_fairseqs(kind, mask, out):
    """Output and gradients are those of fairseq's own computation, which returns weights too."""
    torch.manual_seed(4)
    cfg = MemoryConfig(memory_bits=4, memory_out_proj=out)
    places = {"self": {"self_attention": True}, "cross": {"encoder_decoder_attention": True}}
    made = MemoryAttention(16, 2, cfg=cfg, kdim=16, vdim=16, **places[kind]).double().eval()
    x = torch.randn(5, 3, 16, dtype=torch.float64, requires_grad=True)
    keys = x if kind == "self" else torch.randn(7, 3, 16, dtype=torch.float64, requires_grad=True)
    future = torch.full((5, len(keys)), float("-inf"), dtype=torch.float64).triu(1)
    pads = torch.zeros(3, len(keys), dtype=torch.bool)
    pads[1, -2:] = True
    masks = {
        "attn_mask": future if mask in ("future", "both") else None,
        "key_padding_mask": pads if mask in ("padding", "both") else None,
    }
    results = []
    for weights in (True, False):
        made.zero_grad()
        y, _ = made(x, keys, keys, need_weights=weights, **masks)
        inputs = [x] if kind == "self" else [x, keys]
        grads = torch.autograd.grad(y.square().sum(), [*inputs, *made.parameters()])
        results.append([y, *grads])
    for one, other in zip(*results, strict=True):
        # fairseq takes the softmax in float32
        assert torch.allclose(one, other, atol=1e-5, rtol=1e-5)
