"""BASE: every expert gets the same number of tokens. Letters: T tokens, E experts."""

import logging

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.kernels.gate import top_k_mask
from fairseq_evomoe.modules.gates.base import ScoreGate, Site, mask_of
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch

try:
    from fairseq import libbase
except ImportError:
    libbase = None

logger = logging.getLogger(__name__)


class BaseGate(ScoreGate):
    """Balanced assignment while training, the nearest expert in evaluation (arXiv 2103.16716).

    z = h W, rows of W orthogonal of norm 0.1 at first. Training: the assignment of tokens to
    experts that maximises sum_t z_{t, a(t)} with at most ceil(T / E) tokens an expert (eq. 2), so a
    token's expert depends on its batch. Evaluation: a(t) = argmax_e z_te. Output: the paper's
    a (h + f(h)) + (1 - a) h with a = sigmoid(z) is h + a f(h): with the residual outside, the
    combine weight is sigmoid(z). There is no balance loss; the metric is logged.
    """

    takes_bias = False

    def __init__(self, cfg: MoEConfig, site: Site) -> None:
        super().__init__(cfg, site)
        nn.init.orthogonal_(self.weight, gain=0.1, generator=site.generator)
        if libbase is None:
            logger.warning("fairseq.libbase is missing: BASE assigns with SciPy, which is slower")

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        if self.training:
            active = mask_of(balanced_assignment(logits.detach()), logits.size(1))
        else:
            active = top_k_mask(logits, 1)
        weights, probs = torch.sigmoid(logits) * active, logits.softmax(-1)
        return RoutingPlan(weights, active, probs, logits, at_most=1)

    def balance(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        return super().balance(plan, load).detach()


def balanced_assignment(scores: Tensor) -> Tensor:
    """The expert of each token: at most ceil(T / E) tokens an expert, the sum of scores maximal.

    fairseq's auction where it is compiled (within 0.1 % of the maximum, milliseconds); else
    SciPy's exact solver (a second for 4096 tokens).

    Args:
        scores: (T, E) float32; what is not finite counts as the lowest.

    Returns:
        (T,) int64.
    """
    tokens, experts = scores.shape
    if tokens == 0 or experts == 1:
        return torch.zeros(tokens, dtype=torch.int64, device=scores.device)
    ok = scores.isfinite()
    lowest = torch.where(ok, scores, torch.inf).min()
    scores = torch.where(ok, scores, lowest if lowest < torch.inf else 0.0)
    rows = -(-tokens // experts)
    # tokens that do not exist fill the experts up; all experts are the same to them
    scores = torch.cat([scores, scores.new_zeros(rows * experts - tokens, experts)])
    solve = _scipy if libbase is None else _auction
    return solve(scores, rows)[:tokens]


def _auction(scores: Tensor, rows: int) -> Tensor:
    order = libbase.balanced_assignment(scores.clone()).view(-1)
    # among equal scores the auction may hand a token out twice and forget another
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
