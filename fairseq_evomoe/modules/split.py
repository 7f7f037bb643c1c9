"""How E experts arise from the base expert.

Letters: D model width, F hidden width, E experts.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_evomoe.modules.experts import Bank, Part
from fairseq_evomoe.options import Diversify, values_of


@dataclass(frozen=True, kw_only=True)
class SplitRule:
    """What makes the copies of the base expert different.

    Attributes:
        mode: `drop` re-initialises weights from the mean and standard deviation of the base's own
            (Drop-Upcycling, arXiv 2502.19261), `mask` sets weights to zero (EvoMoE), `noise` adds
            noise * std(W) * N(0, 1) to every weight, and `copy` changes nothing.
        ratio: fraction of hidden units, or of weights, that `drop` and `mask` change.
        grain: `mask` and `drop` act on whole hidden units ("unit") or on single weights ("weight").
        weights: "fc1" (before the hidden units), "fc2" (behind them), "both", or "auto". For `mask`
            "auto" is the side on which a masked unit goes on learning, otherwise both.
        noise: scale of the noise in mode `noise`.
        keep_base: whether expert 0 stays as it is; otherwise it becomes a copy like the others.
    """

    mode: str = "drop"
    ratio: float = 0.5
    grain: str = "unit"
    weights: str = "auto"
    noise: float = 0.1
    keep_base: bool = True

    @classmethod
    def from_flags(cls, cfg: Any) -> "SplitRule":
        """Read the rule from the flags of `SplitConfig`.

        Raises:
            ValueError: a flag is out of range; the message names it and the fix.
        """
        mode = str(cfg.evo_diversify)
        modes = values_of(Diversify)
        if mode not in modes:
            raise ValueError(f"--evo-diversify {mode!r}: choose one of {', '.join(modes)}")
        if not 0 <= cfg.evo_diversify_ratio <= 1:
            raise ValueError(
                f"--evo-diversify-ratio {cfg.evo_diversify_ratio}: must be a fraction, 0 to 1"
            )
        if not cfg.evo_diversify_noise >= 0:
            raise ValueError(f"--evo-diversify-noise {cfg.evo_diversify_noise}: must be >= 0")
        return cls(mode=mode, ratio=cfg.evo_diversify_ratio, noise=cfg.evo_diversify_noise)

    def acts_on(self, part: Part, mask_side: str) -> bool:
        """Whether a parameter may change; `mask_side` is the side that `mask` changes."""
        where = self.weights
        if where == "auto":
            where = mask_side if self.mode == "mask" else "both"
        return self.mode != "copy" and part.side is not None and where in (part.side, "both")


class Split:
    """The split of one layer: one decision for weights, fp32 masters and optimizer state.

    Args:
        rule: how the copies are made different.
        bank: the experts; only the roles and sizes of their parameters are read.
        seed: seed that makes the split the same on every worker and in every repetition.

    Raises:
        ValueError: the base expert is shared, and the rule would change it.
    """

    def __init__(self, rule: SplitRule, bank: Bank, *, seed: int) -> None:
        if bank.shared and not rule.keep_base:
            raise ValueError("a shared expert stays as it is: it cannot become a copy like others")
        self.rule, self.seed = rule, seed
        self.parts, self.mask_side = bank.parts, bank.mask_side
        self.dims = {name: p.dim() for name, p in bank.named_parameters()}
        hidden = bank.hidden
        # (entry of the stacked parameters, expert) of every expert that becomes a changed copy
        self.copies = [(i, e) for i, e in enumerate(bank.expert_ids) if e > 0 or not rule.keep_base]
        self.units = torch.zeros(bank.count, hidden, dtype=torch.bool)
        if rule.mode in ("mask", "drop") and rule.grain == "unit":
            for i, e in self.copies:
                chosen = torch.randperm(hidden, generator=self._generator(e))
                self.units[i, chosen[: round(rule.ratio * hidden)]] = True

    def _generator(self, expert: int, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 7919 * expert + 104729 * salt)

    def replaced(self, name: str, shape: torch.Size) -> Tensor:
        """Entries of parameter `name` that drop or mask replaces, bool, of the stacked shape."""
        part = self.parts[name]
        nothing = torch.zeros(1, dtype=torch.bool).expand(shape)
        if self.rule.mode not in ("mask", "drop") or not self.rule.acts_on(part, self.mask_side):
            return nothing
        if self.rule.grain == "weight":
            chosen = torch.zeros(shape, dtype=torch.bool)
            # a bias is not a connection: as in unstructured pruning, only matrices are masked
            for i, e in self.copies if len(shape) > 2 else ():
                draw = torch.rand(shape[1:], generator=self._generator(e, 11 + self._salt(name)))
                chosen[i] = draw < self.rule.ratio
            return chosen
        if part.axis is None:
            return nothing
        place = [self.units.size(0)] + [1] * (len(shape) - 1)
        place[part.axis] = self.units.size(1)
        return self.units.view(place).expand(shape)

    def _salt(self, name: str) -> int:
        return list(self.parts).index(name)

    @torch.no_grad()
    def weights_(self, name: str, stacked: Tensor) -> None:
        """Fill a stacked parameter (E, ...) in place from its first entry, the base expert."""
        base = stacked[0].float().cpu().clone()
        replaced = self.replaced(name, stacked.shape)
        for i, e in self.copies:
            new = base.clone()
            draw = torch.randn(base.shape, generator=self._generator(e, 1 + self._salt(name)))
            if self.rule.mode == "noise" and self.rule.acts_on(self.parts[name], self.mask_side):
                new += self.rule.noise * base.std() * draw
            elif self.rule.mode == "drop":
                new = torch.where(replaced[i], base.mean() + base.std() * draw, new)
            else:
                new.masked_fill_(replaced[i], 0)
            stacked[i].copy_(new)

    @torch.no_grad()
    def moments_(self, name: str, stacked: Tensor) -> None:
        """Give every expert the base's optimizer moments (E, ...), and 0 where weights are new.

        A factored moment, which has one axis less than the weights, is copied as a whole.
        """
        stacked[1:] = stacked[:1].clone()
        if stacked.dim() == self.dims[name]:
            stacked.masked_fill_(self.replaced(name, stacked.shape).to(stacked.device), 0)

    @torch.no_grad()
    def apply(
        self,
        bank: Bank,
        *,
        master: Callable[[nn.Parameter], Tensor] = lambda p: p.data,
        moments: Callable[[nn.Parameter], Iterable[Tensor]] = lambda p: (),
    ) -> None:
        """Split the experts of a bank: weights, fp32 masters and optimizer state.

        Args:
            master: maps a parameter to the float32 master that the optimizer steps.
            moments: maps a parameter to its moments, each (E, ...).
        """
        for name, parameter in bank.named_parameters():
            weights = master(parameter)
            self.weights_(name, weights)
            if weights is not parameter.data:
                parameter.copy_(weights)
            for moment in moments(parameter):
                self.moments_(name, moment)


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """How different the experts of a bank are.

    Attributes:
        drift: |mean of the experts' outputs - base's output| / |base's output| on some inputs.
        weights: mean cosine of two experts' weights without biases, over all pairs of experts.
        outputs: mean cosine of two experts' outputs, over all pairs of experts.
    """

    drift: float
    weights: float
    outputs: float

    def __str__(self) -> str:
        return (
            f"output drift {self.drift:.4f}, mean pairwise cosine of weights {self.weights:.4f}, "
            f"of outputs {self.outputs:.4f}"
        )


@torch.no_grad()
def diversity(bank: Bank, x: Tensor, base: Tensor) -> Diversity:
    """Compare the experts of `bank` on x (T, D). Before the split the output was `base` (T, D)."""
    outputs = torch.stack([bank.run_expert(e, x).float() for e in range(bank.count)])
    base = base.float()
    drift = (outputs.mean(0) - base).norm() / base.norm().clamp_min(1e-12)
    matrices = [p.flatten(1).float() for p in bank.parameters() if p.dim() > 2]
    return Diversity(
        drift=float(drift),
        weights=_mean_cosine(torch.cat(matrices, 1)),
        outputs=_mean_cosine(outputs.flatten(1)),
    )


def _mean_cosine(rows: Tensor) -> float:
    if len(rows) < 2:
        return 1.0
    unit = torch.nn.functional.normalize(rows, dim=1)
    gram = unit @ unit.t()
    return float((gram.sum() - gram.trace()) / (len(rows) * (len(rows) - 1)))
