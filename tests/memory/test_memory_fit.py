"""memory/fit.py and conversion.py: look-up tables fitted to a given map by least squares."""

import pytest
import torch

from fairseq_evomoe.kernels.lookup.score import codes, linear_gain
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.conversion import directions
from fairseq_evomoe.memory.fit import fit, linear_tables
from fairseq_evomoe.memory.layer import MemoryFFN, MemoryLayer


def kept(layer, x, y):
    with torch.no_grad():
        return float(1 - (layer(x) - y).square().sum() / (y - y.mean(0)).square().sum())


def made(width, out, **flags):
    return MemoryLayer(width, out, MemoryConfig(**flags)).eval()


@pytest.mark.parametrize(
    ("score", "t", "gain", "explained"),
    [("prob", 1, 5.09, 0.617), ("prob", 4, None, 0.677), ("abs_prob", 1, 0.580, 0.537),
     ("l1", 1, 1.0, 0.682)],
)  # fmt: skip
def test_linear_maps_without_data(score, t, gain, explained):
    """For normal inputs, gain and explained variance of a linear map are as measured elsewhere."""
    if gain:
        assert linear_gain(score, 8, t) == pytest.approx(gain, rel=5e-3)
    layer = made(64, 48, memory_score=score, memory_temperature=t, memory_lr_scale=3)
    weight = torch.randn(48, 64)
    x = torch.randn(6000, 64)
    with torch.no_grad():
        layer.tables.copy_(linear_tables(layer, weight) / layer.rule.scale)
    assert kept(layer, x, x @ weight.t()) == pytest.approx(explained, abs=0.02)


@pytest.mark.parametrize("score", ["prob", "abs_prob", "l1"])
@pytest.mark.parametrize("bits", [1, 3])
def test_the_gain_is_the_least_squares_one(score, bits):
    """The closed form of the gain equals a regression on many draws."""
    z = torch.randn(400000, 1, bits, dtype=torch.float64)
    from fairseq_evomoe.kernels.lookup.score import weigh

    p = weigh(z, score, 0.7)
    sign = torch.where(z[:, :, 0] >= 0, 1.0, -1.0)
    best = float((p * sign * z[:, :, 0]).mean() / p.square().mean())
    assert linear_gain(score, bits, 0.7) == pytest.approx(best, rel=0.01)


def test_a_look_up_is_found_again():
    """A layer that is fitted to another look-up's outputs becomes that look-up, bias included."""
    truth = made(11, 7, memory_bits=4)
    with torch.no_grad():
        truth.bias.normal_()
    x, new = torch.randn(4000, 11), torch.randn(500, 11)
    layer = made(11, 7, memory_bits=4, memory_lr_scale=2)
    fit(layer, x, truth(x), sweeps=30, strength=1e-3)
    assert kept(layer, new, truth(new)) > 0.999


def test_rows_without_samples_stay_at_the_prior():
    """Table rows without samples keep the prior; a row with many samples moves to their targets."""
    layer = made(4, 3, memory_bits=4, memory_lr_scale=1)
    prior = torch.randn(1, 16, 3)
    x = torch.randn(300, 4).abs()
    x[:, 3] *= -1
    row = int(codes(layer.rule.slices(x))[0])
    y = torch.full((300, 3), 5.0)
    fit(layer, x, y, prior=prior)
    others = [r for r in range(16) if r != row]
    assert torch.allclose(layer.tables[0, others], prior[0, others])
    with torch.no_grad():
        assert (layer(x) - y).abs().mean() < 0.5


@pytest.mark.parametrize("hidden", [10, None, 96])
def test_the_hidden_values_that_are_inputs(hidden):
    """The second look-up's tables hash their slices of the input, as far as the hidden width goes.

    With 4 bits and delta 2, table k hashes the hidden values from 6 k on, and the first 4 of them
    have the signs of the inputs from 4 k on. What is beyond the last slice is not the input.
    """
    ffn = MemoryFFN(24, MemoryConfig(memory_bits=4, memory_delta=2, memory_ffn_embed_dim=hidden))
    directions(ffn, torch.Generator().manual_seed(2))
    x = torch.randn(4000, 24, generator=torch.Generator().manual_seed(3))
    together = torch.corrcoef(torch.cat([ffn.first(x), x], 1).t())[: -x.size(1), -x.size(1) :]
    wide = hidden or 36
    assert together.shape == (wide, 24)
    inputs = {6 * (d // 4) + d % 4: d for d in range(24)}
    for row in range(wide):
        if row in inputs:
            assert together[row].argmax() == inputs[row] and together[row, inputs[row]] > 0.8
        else:
            assert together[row].max() < 0.8
