"""The capacity of experts: how many pairs an expert takes, and which it drops.

Letters: T tokens, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fairseq_evomoe.config import MoEConfig


def capacity(cfg: MoEConfig, tokens: int, choices: int) -> int:
    """Return C = ceil(factor * choices * T / E), the pairs that an expert takes.

    The formula is that of arXiv 2006.16668, section 2.2.
    """
    assert cfg.moe_capacity_factor is not None, "callers have checked that there is a limit"
    pairs = cfg.moe_capacity_factor * choices * tokens / cfg.moe_expert_count
    return -int(-pairs // 1)


def within_capacity(
    choices: Sequence[Tensor], limit: int, *, priority: Tensor | None = None
) -> list[Tensor]:
    """Drop the pairs beyond each expert's `limit`.

    First choices are served before second ones. Choices of equal rank are served in order of
    position, or of falling `priority` (batch-prioritised routing, arXiv 2106.05974).

    Args:
        choices: first, second ... choices, each (T, E) bool.
        limit: number of pairs that an expert takes.
        priority: (T,), or None to serve tokens by position.

    Returns:
        the choices that remain, each (T, E) bool.
    """
    taken = torch.zeros_like(choices[0][:1], dtype=torch.int64).sum(0)
    kept: list[Tensor] = []
    for chosen in choices:
        if priority is None:
            place = chosen.cumsum(0)
        else:
            order = priority.sort(descending=True, stable=True).indices
            place = torch.empty_like(chosen, dtype=torch.int64)
            place[order] = chosen[order].cumsum(0)
        kept.append(chosen & (place + taken <= limit))
        # as in GShard, a second choice queues behind all first ones, including dropped ones
        taken = taken + chosen.sum(0)
    return kept
