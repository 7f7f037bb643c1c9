"""transformer/attention.py: equal to torch's attention, and used only where it is faster."""

import threading

import pytest
import torch
from torch.nn import functional as F

from fairseq_evomoe.kernels.transformer import attention as module
from fairseq_evomoe.kernels.transformer.attention import attention
from fairseq_evomoe.kernels.transformer.functions import fast_functions

TORCH = F.scaled_dot_product_attention
MASKS = {
    "none": lambda b, n, q, k: None,
    "causal": lambda b, n, q, k: torch.full((q, k), float("-inf")).triu(1),
    "padding": lambda b, n, q, k: torch.zeros(b, 1, 1, k).masked_fill(
        torch.arange(k) >= k - 1, float("-inf")
    ),
    "bias": lambda b, n, q, k: torch.randn(b, n, q, k),
    "bool": lambda b, n, q, k: torch.ones(q, k).tril().bool(),
}


def inputs(b=2, n=3, q=5, k=5, width=4, dtype=torch.float64):
    torch.manual_seed(3)
    shapes = ((b, n, q, width), (b, n, k, width), (b, n, k, width))
    # as fairseq makes them: views of (length, batch, heads) with the axes exchanged
    return [
        torch.randn(b, s[2], n, width, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes
    ]


@pytest.mark.parametrize("keys", [5, 7])
@pytest.mark.parametrize("mask", MASKS)
def test_against_torch(mask, keys, monkeypatch):
    """Output and gradients in float64 are those of torch's function; it does not serve the call."""
    if mask in ("causal", "bool") and keys != 5:
        keys = 5
    made = MASKS[mask](2, 3, 5, keys)
    if made is not None and made.is_floating_point():
        made = made.double()
    results = []
    for function in (TORCH, attention):
        own = inputs(k=keys)
        if function is attention:
            monkeypatch.setattr(module, "torch_attention", None)
        y = function(*own, attn_mask=made)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).double()
        results.append([y, *torch.autograd.grad((y * direction).sum(), own)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_gradients_by_differences():
    mask = MASKS["causal"](1, 1, 3, 3).double()
    own = inputs(1, 2, 3, 3, 2)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, attn_mask=mask), own)


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_bfloat16(how, tiles, monkeypatch):
    """Near float32's result, by the kernel or by products, in the dtype that is asked for."""
    monkeypatch.setattr(module.cpu, "has_tiles", lambda: tiles)
    own = inputs(2, 2, 80, 80, 16, torch.float32)
    mask = MASKS["causal"](2, 2, 80, 80)
    want = TORCH(*own, attn_mask=mask)
    wanted = torch.autograd.grad(want.sum(), own)
    if how == "bfloat16":
        own = [x.detach().bfloat16().requires_grad_() for x in own]
        mask = mask.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = attention(*own, attn_mask=mask)
    assert y.dtype == torch.bfloat16
    assert (y.float() - want).norm() < 1e-2 * want.norm()
    for found, exact in zip(torch.autograd.grad(y.sum(), own), wanted, strict=True):
        assert (found.float() - exact).norm() <= 3e-2 * exact.norm() + 1e-2


@pytest.mark.parametrize(
    ("length", "options", "grad"),
    [
        (200, {}, True),
        (5, {"dropout_p": 0.5}, True),
        (5, {"is_causal": True}, True),
        (5, {}, False),
    ],
)
def test_where_torch_serves(length, options, grad, monkeypatch):
    """Long float32 sequences without the kernel, dropout and inference are left to torch."""
    served = []
    monkeypatch.setattr(module.cpu, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(
        module, "torch_attention", lambda *a, **k: (served.append(1), TORCH(*a, **k))[1]
    )
    own = inputs(q=length, k=length, dtype=torch.float32)
    with torch.set_grad_enabled(grad):
        attention(*own, **options)
    assert served


def test_torch_is_as_before_after_the_block():
    """Blocks may be nested, fail, and overlap in several threads."""
    with fast_functions():
        assert F.scaled_dot_product_attention is attention
        with pytest.raises(KeyError), fast_functions():
            raise KeyError
        assert F.scaled_dot_product_attention is attention
    assert F.scaled_dot_product_attention is TORCH
    meet = threading.Barrier(4)

    def work():
        with fast_functions():
            meet.wait(timeout=10)
            assert F.scaled_dot_product_attention is attention

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert F.scaled_dot_product_attention is TORCH


def test_fairseqs_attention_trains_with_it():
    """fairseq's module reaches it through torch, with its own masks, and gives the same result."""
    from fairseq.modules.multihead_attention import MultiheadAttention

    torch.manual_seed(2)
    made = MultiheadAttention(8, 2, self_attention=True)
    x = torch.randn(6, 3, 8)
    pads = torch.zeros(3, 6, dtype=torch.bool)
    pads[1, 4:] = True
    run = lambda: made(x, x, x, key_padding_mask=pads, need_weights=False)[0]
    want = run()
    with fast_functions():
        assert torch.allclose(run(), want, atol=1e-6)
