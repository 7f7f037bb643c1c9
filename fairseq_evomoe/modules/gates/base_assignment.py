"""BASE: every expert gets the same number of tokens. Letters: T tokens, E experts."""

import logging

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate.rule import top_k_mask
from fairseq_evomoe.modules.gates.base import (
    GateContext,
    ScoreGate,
    mask_of,
    register_gate,
    sigmoid,
)
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import Stage

try:
    from fairseq import libbase
except ImportError:
    libbase = None

logger = logging.getLogger(__name__)


@register_gate("base")
class BaseGate(ScoreGate):
    """Balanced assignment during training, best-scoring expert in evaluation (arXiv 2103.16716).

    z = h W, where the rows of W are orthogonal with norm 0.1 at first. In training, tokens are
    assigned to experts such that sum_t z_{t, a(t)} is largest with at most ceil(T / E) tokens per
    expert (eq. 2), so a token's expert depends on its batch. In evaluation, a(t) = argmax_e z_te.
    The paper's output a (h + f(h)) + (1 - a) h with a = sigmoid(z) equals h + a f(h). Since the
    residual is added outside this layer, the combine weight is sigmoid(z). No balance loss is
    trained; its value is only logged.
    """

    flags = ("--moe-gate-token-bias",)
    balanced_by_loss = False

    def __init__(self, cfg: MoEConfig, context: GateContext) -> None:
        super().__init__(cfg, context)
        nn.init.orthogonal_(self.weight, gain=0.1, generator=context.generator)
        if libbase is None:
            logger.warning(
                "fairseq.libbase is missing, so BASE assigns tokens with SciPy, which is slower; "
                "fairseq compiled on this machine has it (EVOMOE_FAIRSEQ=build at the set-up)"
            )

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        return 1

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        if self.training:
            active = mask_of(balanced_assignment(logits.detach()), logits.size(1))
        else:
            active = top_k_mask(logits, 1)
        weights, probs = sigmoid(logits) * active, logits.softmax(-1)
        return RoutingPlan(weights=weights, active=active, probs=probs, logits=logits, max_active=1)

    def balance_loss(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        return super().balance_loss(plan, load).detach()


def balanced_assignment(scores: Tensor) -> Tensor:
    """Choose each token's expert such that the sum of scores is largest.

    An expert gets at most ceil(T / E) tokens. If fairseq's auction is compiled, it is used (within
    0.1 % of the maximum, in milliseconds), otherwise SciPy's exact solver (a second for 4096
    tokens).

    Args:
        scores: (T, E) float32; non-finite values count as the lowest finite one.

    Returns:
        expert of each token, (T,) int64.
    """
    tokens, experts = scores.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=scores.device)
    ok = scores.isfinite()
    lowest = torch.where(ok, scores, torch.inf).min()
    scores = torch.where(ok, scores, lowest if lowest < torch.inf else 0.0)
    rows = -(-tokens // experts)
    # dummy tokens, whose scores are the same for all experts, fill the experts up
    scores = torch.cat([scores, scores.new_zeros(rows * experts - tokens, experts)])
    solve = _scipy if libbase is None else _auction
    return solve(scores, rows)[:tokens]


def _auction(scores: Tensor, rows: int) -> Tensor:
    order = libbase.balanced_assignment(scores.clone()).view(-1)
    # among equal scores the auction may assign one token twice and leave out another
    count = order.bincount(minlength=order.numel())
    if int(count.max()) > 1:
        first = torch.zeros_like(order, dtype=torch.bool)
        place = torch.full_like(order, order.numel()).scatter_reduce_(
            0, order, torch.arange(order.numel(), device=order.device), "amin"
        )
        first[place[count > 0]] = True
        order = order.masked_scatter(~first, (count == 0).nonzero().squeeze(1))
    expert = torch.empty_like(order)
    slots = torch.arange(order.numel() // rows, device=order.device)
    expert[order] = slots.repeat_interleave(rows)
    return expert


def _scipy(scores: Tensor, rows: int) -> Tensor:
    gain = np.repeat(scores.double().cpu().numpy(), rows, axis=1)
    _, slot = linear_sum_assignment(gain, maximize=True)
    return torch.from_numpy(slot // rows).to(scores.device)
