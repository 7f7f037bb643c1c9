"""How E experts arise from the base expert. Letters: D model width, F hidden width, E experts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_evomoe.modules.experts import Bank, Part

MODES = ("drop", "mask", "noise", "copy")
_CHOICES = {
    "evo_diversify": MODES,
    "evo_diversify_grain": ("unit", "weight"),
    "evo_diversify_weights": ("auto", "fc1", "fc2", "both"),
    "evo_base_expert": ("exact", "diverse"),
}


@dataclass(frozen=True)
class SplitRule:
    """What makes the copies of the base expert different.

    Attributes:
        mode: `drop` re-initialises from the mean and standard deviation of the base's own weights
            (Drop-Upcycling, arXiv 2502.19261), `mask` silences (EvoMoE), `noise` adds noise *
            std(W) * N(0, 1) to every weight, `copy` changes nothing.
        ratio: share of hidden units, or of weights, for `drop` and `mask`.
        grain: `mask` and `drop` act on whole hidden units ("unit") or on single weights ("weight").
        weights: "fc1" (before the hidden units), "fc2" (behind them), "both", or "auto": for `mask`
            the side on which a silenced unit goes on learning, else both.
        noise: scale for `noise`.
        keep_base: expert 0 stays as it is; otherwise it becomes a copy like the others.
    """

    mode: str = "drop"
    ratio: float = 0.5
    grain: str = "unit"
    weights: str = "auto"
    noise: float = 0.1
    keep_base: bool = True

    @classmethod
    def from_flags(cls, cfg: Any, *, shared: bool = False) -> "SplitRule":
        """From `SplitConfig`'s flags; `shared`: `--moe-shared-expert` keeps the base expert.

        Raises:
            ValueError: a flag is out of range; the message names it and the fix.
        """
        for field, allowed in _CHOICES.items():
            if getattr(cfg, field) not in allowed:
                flag = "--" + field.replace("_", "-")
                raise ValueError(
                    f"{flag} {getattr(cfg, field)!r}: choose one of {', '.join(allowed)}"
                )
        if not 0 <= cfg.evo_diversify_ratio <= 1:
            raise ValueError(f"--evo-diversify-ratio {cfg.evo_diversify_ratio}: a share, 0 to 1")
        if not cfg.evo_diversify_noise >= 0:
            raise ValueError(f"--evo-diversify-noise {cfg.evo_diversify_noise}: must be >= 0")
        if shared and cfg.evo_base_expert == "diverse":
            raise ValueError(
                "--evo-base-expert diverse: --moe-shared-expert keeps the base expert as it is; "
                "leave one of the two out"
            )
        return cls(
            mode=cfg.evo_diversify,
            ratio=cfg.evo_diversify_ratio,
            grain=cfg.evo_diversify_grain,
            weights=cfg.evo_diversify_weights,
            noise=cfg.evo_diversify_noise,
            keep_base=cfg.evo_base_expert == "exact",
        )

    def acts_on(self, part: Part, silence: str) -> bool:
        """Whether a parameter may change; `silence` is the side that its bank silences."""
        where = self.weights
        if where == "auto":
            where = silence if self.mode == "mask" else "both"
        return self.mode != "copy" and part.side is not None and where in (part.side, "both")


class Split:
    """One layer's split: the same decision for weights, masters and optimizer state.

    Args:
        rule: what makes copies different.
        bank: the experts, whose parts and sizes are read.
        seed: makes the split the same on every worker and in every repetition.
    """

    def __init__(self, rule: SplitRule, bank: Bank, *, seed: int) -> None:
        self.rule, self.seed = rule, seed
        self.parts, self.silence = bank.parts, bank.silence
        hidden = bank.hidden
        # (entry of the stacked parameters, expert), for what is not the base itself
        self.copies = [(i, e) for i, e in enumerate(bank.slots) if e > 0 or not rule.keep_base]
        self.units = torch.zeros(bank.count, hidden, dtype=torch.bool)
        if rule.mode in ("mask", "drop") and rule.grain == "unit":
            for i, e in self.copies:
                chosen = torch.randperm(hidden, generator=self._generator(e))
                self.units[i, chosen[: round(rule.ratio * hidden)]] = True

    def _generator(self, expert: int, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + 7919 * expert + 104729 * salt)

    def replaced(self, name: str, shape: torch.Size) -> Tensor:
        """Entries of parameter `name` that are not the base's, bool, of the stacked shape."""
        part = self.parts[name]
        nothing = torch.zeros(1, dtype=torch.bool).expand(shape)
        if self.rule.mode not in ("mask", "drop") or not self.rule.acts_on(part, self.silence):
            return nothing
        if self.rule.grain == "weight":
            chosen = torch.zeros(shape, dtype=torch.bool)
            # a bias is no connection: as in unstructured pruning, only matrices are masked
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
        """Fill a stacked parameter (E, ...) from its first entry, the base expert, in place."""
        base = stacked[0].float().cpu().clone()
        replaced = self.replaced(name, stacked.shape)
        for i, e in self.copies:
            new = base.clone()
            draw = torch.randn(base.shape, generator=self._generator(e, 1 + self._salt(name)))
            if self.rule.mode == "noise" and self.rule.acts_on(self.parts[name], self.silence):
                new += self.rule.noise * base.std() * draw
            elif self.rule.mode == "drop":
                new = torch.where(replaced[i], base.mean() + base.std() * draw, new)
            else:
                new.masked_fill_(replaced[i], 0)
            stacked[i].copy_(new)

    @torch.no_grad()
    def moments_(self, name: str, stacked: Tensor) -> None:
        """Give every expert the base's optimizer moments (E, ...), zero where weights are new."""
        stacked[1:] = stacked[:1].clone()
        stacked.masked_fill_(self.replaced(name, stacked.shape).to(stacked.device), 0)


@dataclass(frozen=True)
class Diversity:
    """How different the experts of a bank are.

    Attributes:
        drift: |mean of the experts' outputs - base's output| / |base's output| on some inputs.
        weights: mean cosine of two experts' weights without biases, over all pairs.
        outputs: mean cosine of two experts' outputs.
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
    """Compare the experts of `bank` on x (T, D), where the base expert gave `base` (T, D)."""
    outputs = torch.stack([bank.one(e, x).float() for e in range(bank.count)])
    base = base.float()
    drift = (outputs.mean(0) - base).norm() / base.norm().clamp_min(1e-12)
    matrices = [p.flatten(1).float() for p in bank.parameters() if p.dim() > 2]
    return Diversity(
        float(drift), _mean_cosine(torch.cat(matrices, 1)), _mean_cosine(outputs.flatten(1))
    )


def _mean_cosine(rows: Tensor) -> float:
    if len(rows) < 2:
        return 1.0
    unit = torch.nn.functional.normalize(rows, dim=1)
    gram = unit @ unit.t()
    return float((gram.sum() - gram.trace()) / (len(rows) * (len(rows) - 1)))
