"""What every gate shares. Letters: T tokens, D model width, E experts, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules import losses
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch
from fairseq_evomoe.schedule import Stage


@dataclass(frozen=True)
class Site:
    """Where a gate stands.

    Attributes:
        dim: model width D.
        name: of the layer, "encoder.1".
        generator: draws initial weights, so that the global stream stays as in a dense model.
        causal: a position must not depend on later ones.
        dictionary: fairseq's, of the tokens that pass here; None where nobody knows.
    """

    dim: int
    name: str
    generator: torch.Generator
    causal: bool = False
    dictionary: Any = None


class Gate(nn.Module):
    """A rule that says which experts see a token, with which weights.

    Args:
        cfg: the flags; `cfg.moe_expert_count` is E.
        site: where the gate stands.
    """

    evolves = False
    """True where training starts, unless flags say otherwise, from one base expert."""
    changes_over_time = False
    """True where the rule follows the schedule: training without one is a mistake."""
    takes_capacity = False
    """True where `--moe-capacity-factor` means something."""
    takes_bias = False
    """True where `--moe-balance-bias` can act: experts are chosen by score."""
    takes_token_bias = False
    """True where `--moe-gate-token-bias` can act: there are logits."""

    def __init__(self, cfg: MoEConfig, site: Site) -> None:
        super().__init__()
        self.cfg = cfg

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        """Refuse flags that this gate cannot serve.

        Raises:
            ValueError: names the flag and the fix.
        """
        cfg.need(
            cls.takes_bias or not cfg.moe_balance_bias,
            "--moe-balance-bias",
            f"--moe-gate {cfg.moe_gate} does not choose by score; leave it out",
        )
        cfg.need(
            cls.takes_capacity or not cfg.moe_capacity_factor,
            "--moe-capacity-factor",
            f"--moe-gate {cfg.moe_gate} has no capacity; leave it out",
        )
        cfg.need(
            not cfg.moe_batch_prioritized_routing
            or (cfg.moe_capacity_factor > 0 and cfg.moe_gate in ("switch", "gshard")),
            "--moe-batch-prioritized-routing",
            "acts where a capacity drops tokens: give --moe-gate switch or gshard a "
            "--moe-capacity-factor",
        )
        two = cfg.moe_gate == "gshard"
        for flag, usual in (
            ("--moe-second-expert-policy", two or cfg.moe_second_expert_policy == "sampling"),
            (
                "--moe-normalize-gate-prob-before-dropping",
                two or not cfg.moe_normalize_gate_prob_before_dropping,
            ),
        ):
            cfg.need(usual, flag, f"--moe-gate {cfg.moe_gate} has no second expert; give gshard")
        cfg.need(
            cls.takes_token_bias or not cfg.moe_gate_token_bias,
            "--moe-gate-token-bias",
            f"--moe-gate {cfg.moe_gate} has no use for it; leave it out",
        )

    def forward(self, x: Tensor, clock: Clock, tokens: TokenBatch | None = None) -> RoutingPlan:
        """Route T real tokens: x (T, D) of any float dtype -> RoutingPlan, float32."""
        raise NotImplementedError

    def ready(self) -> None:
        """Refuse to start training with something missing that a checkpoint would bring.

        Raises:
            ValueError: names the flag and the fix.
        """

    def load(self, plan: RoutingPlan) -> Tensor:
        """Pairs of each expert that the balance loss counts, (E,) float32, capacity aside."""
        return plan.sums.load

    def balance(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        """The balance loss of a plan, scalar; `load` (E,), of one or of all workers."""
        return losses.balance_loss(plan.means.probs, load)

    def idle(self, clock: Clock) -> Sequence[nn.Parameter]:
        """Parameters that play no part at this time; DDP wants a gradient for them all the same."""
        return list(self.parameters()) if clock.stage == Stage.DIVERSIFY else []


class ScoreGate(Gate):
    """Linear router z = W_g x in float32, then a rule (`route`) that each gate states.

    Softmax over a few logits is where half precision loses the ranking of experts, so logits and
    probabilities are float32 whatever the model's dtype (Switch, arXiv 2101.03961, section 2.4).

    `--moe-balance-bias` u: experts are chosen by z + b and weighed by z alone; after every update
    b_e += u sign(mean load - load_e), with the load of all micro-batches and workers (arXiv
    2408.15664; there the scores are probabilities, here logits, so that any rule can use b).

    `--moe-gate-token-bias` s: z = W_g x + U[token id], U (V, E) learned and drawn from N(0, s). A
    word then tends to the same experts from the first update on, as under a hash gate, and context
    refines the choice as the router learns.
    """

    takes_bias = True
    takes_token_bias = True
    bias_steps: Tensor

    def __init__(self, cfg: MoEConfig, site: Site) -> None:
        super().__init__(cfg, site)
        weight = torch.randn(cfg.moe_expert_count, site.dim, generator=site.generator)
        self.weight = nn.Parameter(weight * cfg.moe_gate_init_std)
        if cfg.moe_balance_bias:
            # b in steps of u: integers stay exact under .half()
            self.register_buffer("bias_steps", torch.zeros(len(weight), dtype=torch.int64))
            self.seen: Tensor | None = None
            self.counting = True
        if cfg.moe_gate_token_bias:
            if site.dictionary is None:
                raise ValueError(f"--moe-gate-token-bias: {site.name} does not know its dictionary")
            words = torch.randn(len(site.dictionary), len(weight), generator=site.generator)
            self.token_bias = nn.Parameter(words * cfg.moe_gate_token_bias)

    def token_share(self, clock: Clock) -> float:
        """How much of the token bias counts at this time, 0 to 1."""
        return 1.0

    def forward(self, x: Tensor, clock: Clock, tokens: TokenBatch | None = None) -> RoutingPlan:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            if self.cfg.moe_gate_token_bias:
                if tokens is None:
                    raise ValueError("--moe-gate-token-bias: this layer was given no token ids")
                words = F.embedding(tokens.token, self.token_bias.float())
                logits = logits + self.token_share(clock) * words
            plan = self.route(logits, clock, tokens)
        if self.cfg.moe_balance_bias and self.training and self.counting:
            load = plan.wanted.sum(0)
            self.seen = load if self.seen is None else self.seen + load
        return plan

    def route(self, logits: Tensor, clock: Clock, tokens: TokenBatch | None) -> RoutingPlan:
        """(T, E) logits, float32 -> the plan."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        """What balancing adds to the logits for the choice, (E,) float32; None where it is off."""
        u = self.cfg.moe_balance_bias
        return u * self.bias_steps.float() if u else None

    def scores(self, logits: Tensor) -> Tensor:
        """What experts are chosen by, (T, E): the logits, with the balancing bias where on."""
        bias = self.bias
        return logits if bias is None else logits + bias

    @property
    def wants_sums(self) -> bool:
        """Whether routing losses will follow; evaluation seldom keeps a record."""
        return self.training and not torch.compiler.is_compiling()

    def forget_skipped(self) -> None:
        """Before a batch: drop the load of an update that fairseq has skipped.

        A router without a gradient is at an update's first batch, and has nothing to remember.
        """
        if self.cfg.moe_balance_bias and self.weight.grad is None:
            self.seen = None

    @torch.no_grad()
    def move_bias(self, all_reduce: Any = None) -> None:
        """Step the bias by the load seen since the last step, summed by `all_reduce` in place."""
        seen = torch.zeros_like(self.bias_steps) if self.seen is None else self.seen
        if all_reduce is not None:
            all_reduce(seen)
        load = seen.double()
        self.bias_steps += (load.mean() - load).sign().long()
        self.seen = None


def mask_of(expert: Tensor, experts: int) -> Tensor:
    """One expert a token as a mask: (T,) int64 -> (T, E) bool."""
    mask = torch.zeros(len(expert), experts, dtype=torch.bool, device=expert.device)
    return mask.scatter_(1, expert[:, None], True)


def capacity(cfg: MoEConfig, tokens: int, choices: int) -> int:
    """C = ceil(factor * choices * T / E) pairs an expert (arXiv 2006.16668, section 2.2)."""
    share = cfg.moe_capacity_factor * choices * tokens / cfg.moe_expert_count
    return -int(-share // 1)


def within_capacity(
    choices: Sequence[Tensor], limit: int, *, priority: Tensor | None = None
) -> list[Tensor]:
    """Drop the pairs beyond each expert's `limit`.

    First choices go before second ones, and among them tokens in order of position, or of falling
    `priority` (batch-prioritised routing, arXiv 2106.05974).

    Args:
        choices: first, second ... choices, each (T, E) bool.
        limit: pairs that an expert takes.
        priority: (T,); None: by position.

    Returns:
        the choices that remain, each (T, E) bool.
    """
    taken = torch.zeros_like(choices[0][:1], dtype=torch.int64).sum(0)
    kept = []
    for chosen in choices:
        if priority is None:
            place = chosen.cumsum(0)
        else:
            order = priority.sort(descending=True, stable=True).indices
            place = torch.empty_like(chosen, dtype=torch.int64)
            place[order] = chosen[order].cumsum(0)
        kept.append(chosen & (place + taken <= limit))
        # as in GShard, a second choice queues behind all first ones, dropped or not
        taken = taken + chosen.sum(0)
    return kept
