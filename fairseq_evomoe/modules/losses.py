"""Balance losses: pure functions of a gate's plan. Letters: T tokens, E experts."""

from torch import Tensor


def balance_loss(mean: Tensor, load: Tensor) -> Tensor:
    """Load-balance loss, invariant to how many experts are active.

    The loss is E * sum_e f_e P_e (eq. 4 of arXiv 2101.03961), where f_e is the expert's fraction of
    the active pairs instead of tokens and P_e is its mean clean probability. It is 1 at perfect
    balance in every stage.

    Args:
        mean: clean gate probability of each expert, mean over the tokens, (E,) float32.
        load: number of active pairs of each expert, (E,), on any scale; not differentiated.

    Returns:
        scalar float32.
    """
    share = load.float() / load.sum().clamp(min=1)
    return len(mean) * (share * mean).sum()


def official_balance_loss(weights: Tensor, active: Tensor) -> Tensor:
    """The balance loss of EvoMoE's official code: E sum_e mean_t(w_te) mean_t(1[e active for t]).

    Both factors grow with the number of active experts. While all experts are active, the loss is E
    and has no gradient.

    Args:
        weights: combine weights, (T, E) float32, 0 where inactive.
        active: (T, E) bool.

    Returns:
        scalar float32; 0 when there is no token.
    """
    if weights.size(0) == 0:
        return weights.sum()
    return weights.size(1) * (weights.mean(0) * active.float().mean(0)).sum()
