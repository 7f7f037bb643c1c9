"""How look-ups are fitted to the dense layers whose place they take.

Letters: B rows, D input width, H output width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_evomoe.memory.fit import fit, linear_tables
from fairseq_evomoe.memory.layer import MemoryFFN, MemoryLayer


@dataclass(frozen=True)
class Unit:
    """One look-up layer and the part of the dense model that it replaces.

    Attributes:
        name: name of the look-up layer.
        layer: the look-up layer.
        source: the dense module whose calls are recorded.
        target: maps (keyword arguments, output) of a call of `source` to the output that the
            look-up should give.
        free: maps any input (B, D) of the dense part to its output, which the look-up should give.
        weight: weights of the linear layers that are replaced, stacked to (H, D), or None for a
            feed-forward network.
        norm: the LayerNorm before the dense part, or None if there is none.
        ffn: the memory FFN whose second half the look-up is, or None.
    """

    name: str
    layer: MemoryLayer
    source: nn.Module
    target: Callable[[dict[str, Any], Any], Tensor]
    free: Callable[[Tensor], Tensor]
    weight: Tensor | None
    norm: nn.Module | None
    ffn: MemoryFFN | None = None


class Watch:
    """Collects inputs or outputs of modules by forward hooks.

    `seen[name]` has one tensor per call, with one row per position: (B, D) or (B, H).
    """

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = {}
        self.hooks: list[Any] = []

    def _keep(self, name: str, value: Tensor) -> None:
        rows = value.detach().float().reshape(-1, value.size(-1))
        self.seen.setdefault(name, []).append(rows)

    def inputs(self, unit: Unit) -> None:
        hook = lambda module, args: self._keep(unit.name, args[0])
        self.hooks.append(unit.layer.register_forward_pre_hook(hook))

    def outputs(self, unit: Unit) -> None:
        hook = lambda module, args, out: self._keep(unit.name, out)
        self.hooks.append(unit.layer.register_forward_hook(hook))

    def targets(self, unit: Unit) -> None:
        hook = lambda module, args, kw, out: self._keep(unit.name, unit.target(kw, out))
        self.hooks.append(unit.source.register_forward_hook(hook, with_kwargs=True))

    @torch.no_grad()
    def run(self, model: nn.Module, samples: Sequence[Any]) -> dict[str, Tensor]:
        """Run `model` on the samples, remove the hooks, and return name -> collected rows."""
        try:
            for sample in samples:
                model(**sample["net_input"])
        finally:
            for hook in self.hooks:
                hook.remove()
        return {name: torch.cat(rows) for name, rows in self.seen.items()}


def variance_kept(
    ours: nn.Module, made: Sequence[Unit], samples: Sequence[Any], wanted: dict[str, Tensor]
) -> dict[str, float]:
    """Return 1 - |y - y'|^2 / |y - mean y|^2 of each look-up.

    y is the dense layer's output and y' the look-up's output within its model, so that the errors
    of earlier look-ups are included. 1 is an exact match, 0 is no better than the mean.
    """
    watch = Watch()
    for unit in made:
        watch.outputs(unit)
    found = watch.run(ours, samples)
    kept = {}
    for name, y in wanted.items():
        spread = (y - y.mean(0)).square().sum().clamp_min(1e-12)
        kept[name] = float(1 - (found[name] - y).square().sum() / spread)
    return kept


@torch.no_grad()
def directions(ffn: MemoryFFN, generator: torch.Generator) -> None:
    """Fill the first look-up of a memory FFN, whose output the second look-up hashes.

    Each table of the second look-up hashes t + delta values. Of these, t are the table's slice of
    the FFN's input, with unchanged signs, and delta are random projections of the whole input. What
    `--memory-ffn-embed-dim` adds beyond such tables are random projections too.
    """
    first, bits = ffn.first, ffn.second.rule.bits
    width = first.tables.size(2)
    weight = torch.randn(width, first.rule.width, generator=generator) / first.rule.width**0.5
    at = torch.arange(first.rule.width)
    row = at // first.rule.bits * bits + at % first.rule.bits
    at, row = at[row < width], row[row < width]
    weight[row] = 0
    weight[row, at] = 1
    first.fill(linear_tables(first, weight.to(first.tables.device)))


@torch.no_grad()
def start(made: Sequence[Unit], *, samples: int, seed: int) -> None:
    """Fill all look-ups without data, by a fit on normally distributed inputs.

    The inputs are standard normal values with the scale and bias of the dense model's preceding
    norm, if there is one.
    """
    generator = torch.Generator().manual_seed(seed)
    for unit in tqdm(made, desc="without data", unit="layer", disable=None):
        width = unit.layer.rule.width if unit.ffn is None else unit.ffn.first.rule.width
        x = torch.randn(samples, width, generator=generator).to(unit.layer.tables.device)
        if unit.norm is not None:
            x = x * unit.norm.weight.float() + unit.norm.bias.float()
        y = unit.free(x)
        if unit.ffn is not None:
            directions(unit.ffn, generator)
            x = unit.ffn.norm(unit.ffn.first(x.to(unit.ffn.first.tables.dtype)))
        prior = None if unit.weight is None else linear_tables(unit.layer, unit.weight)
        # for a linear layer the prior is close to the best fit, so it gets more weight
        fit(unit.layer, x, y, prior=prior, strength=8 if prior is None else 64)


@torch.no_grad()
def calibrate(
    ours: nn.Module, made: Sequence[Unit], samples: Sequence[Any], wanted: dict[str, Tensor]
) -> None:
    """Fit every look-up, in forward order, to the dense layer's outputs on real inputs.

    A look-up reads the outputs of the look-ups before it, so its fit also compensates their errors.
    """
    for unit in tqdm(made, desc="calibration", unit="layer", disable=None):
        watch = Watch()
        watch.inputs(unit)
        x = watch.run(ours, samples)[unit.name]
        fit(unit.layer, x, wanted[unit.name], prior=unit.layer.whole_tables())
