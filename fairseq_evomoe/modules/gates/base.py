"""What all gates have in common, and the registry of gates.

Letters: T tokens, D model width, E experts, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.config import EvolutionConfig, MoEConfig
from fairseq_evomoe.modules import losses
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.modules.torchscript import NotScriptable
from fairseq_evomoe.schedule import EvolutionSchedule, Stage, resolve_schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GateContext:
    """The place of a gate in a model.

    Attributes:
        dim: model width D.
        name: name of the layer, such as "encoder.1".
        generator: random generator for initial weights, so that the global random stream stays as
            in a dense model.
        causal: whether a position must not depend on later ones.
        dictionary: fairseq's dictionary of the layer's tokens, or None if it is unknown.
    """

    dim: int
    name: str
    generator: torch.Generator
    causal: bool = False
    dictionary: Any = None

    def vocabulary(self, flag: str) -> int:
        """Number of words, for a gate that needs to know them.

        Raises:
            ValueError: the dictionary is unknown; the message names `flag`.
        """
        if self.dictionary is None:
            raise ValueError(f"{flag}: layer {self.name} does not know its dictionary")
        return len(self.dictionary)


class Gate(NotScriptable):
    """A rule that decides which experts see a token, and with which weights.

    Everything that the package needs to know about a gate is in its class: which flags it has, how
    many experts it needs, what happens to it after an update. A new gate is one file with a
    subclass under `register_gate`.

    Args:
        cfg: the flags; `cfg.moe_expert_count` is E.
        context: place of the gate in the model.
    """

    evolves: ClassVar[bool] = False
    """True if training starts from one base expert unless flags say otherwise."""
    changes_over_time: ClassVar[bool] = False
    """True if the rule follows the schedule. Training without a schedule is then an error."""
    needs_losses: ClassVar[tuple[str, ...]] = ()
    """The routing losses, of `records.LOSSES`, without which the gate cannot be trained."""
    balanced_by_loss: ClassVar[bool] = True
    """False if the load is even or fixed by construction, so that no balance loss is trained."""
    has_router: ClassVar[bool] = True
    """False if nothing about the choice of experts is learned."""
    can_lose_experts: ClassVar[bool] = True
    """False if each expert has tokens that no other expert could take over."""
    flags: ClassVar[tuple[str, ...]] = ()
    """The flags, of those that belong to single gates, that this gate reads."""

    def __init__(self, cfg: MoEConfig, context: GateContext) -> None:
        super().__init__()
        self.cfg = cfg

    @classmethod
    def check(cls, cfg: MoEConfig) -> None:
        """Refuse flags that this gate cannot serve, and warn of those that have no effect.

        Raises:
            ValueError: names the flag and the fix.
        """
        cfg.need(
            "--moe-balance-bias" in cls.flags or not cfg.moe_balance_bias,
            "--moe-balance-bias",
            f"--moe-gate {cfg.moe_gate} does not choose by score; leave it out",
        )
        cfg.need(
            "--moe-capacity-factor" in cls.flags or cfg.moe_capacity_factor is None,
            "--moe-capacity-factor",
            f"--moe-gate {cfg.moe_gate} has no capacity; leave it out",
        )
        cfg.need(
            "--moe-gate-token-bias" in cls.flags or not cfg.token_bias,
            "--moe-gate-token-bias",
            f"--moe-gate {cfg.moe_gate} has no use for it; leave it out",
        )
        cfg.need(
            not cfg.moe_batch_prioritized_routing
            or ("--moe-capacity-factor" in cls.flags and cfg.moe_capacity_factor is not None),
            "--moe-batch-prioritized-routing",
            "acts where a capacity drops tokens: give --moe-gate switch or gshard a "
            "--moe-capacity-factor",
        )
        usual = MoEConfig()
        for flag in sorted({f for gate in GATES.values() for f in gate.flags} - set(cls.flags)):
            if cfg.given(flag) not in (usual.given(flag), None, 0):
                logger.warning(
                    "%s %s has no effect with --moe-gate %s",
                    *(flag, cfg.given(flag), cfg.moe_gate),
                )

    @classmethod
    def schedule(cls, flags: EvolutionConfig) -> EvolutionSchedule:
        """The schedule that the flags of a task describe for this kind of gate.

        Raises:
            ValueError: a flag is out of range; the message names it and the fix.
        """
        return resolve_schedule(
            spawn=cls.spawn_update(flags),
            anneal=0,
            hard=None,
            has_hard_stage=False,
            max_update=flags.max_update,
        )

    @classmethod
    def spawn_update(cls, flags: EvolutionConfig) -> int | None:
        """`--evo-spawn-update`, by default 0 for gates that do not evolve; None is automatic."""
        return flags.evo_spawn_update if cls.evolves or flags.evo_spawn_update is not None else 0

    @classmethod
    def min_experts(cls, cfg: MoEConfig) -> int:
        """The smallest number of experts with which a layer's flags still make sense."""
        return 1

    @classmethod
    def experts_per_token(cls, cfg: MoEConfig, stage: Stage) -> float:
        """Routed experts that a token uses in evaluation: exact, or the largest possible number."""
        return cfg.moe_expert_count

    def forward(self, x: Tensor, phase: Phase, tokens: TokenBatch | None = None) -> RoutingPlan:
        """Route T real tokens: x (T, D) of any float dtype -> RoutingPlan in float32."""
        raise NotImplementedError

    def check_ready(self) -> None:
        """Refuse to start training if something is missing that a checkpoint would bring.

        Raises:
            ValueError: names the flag and the fix.
        """

    def expert_load(self, plan: RoutingPlan) -> Tensor:
        """Pairs of each expert that the balance loss counts, before any capacity, (E,) float32."""
        return plan.sums.load

    def balance_loss(self, plan: RoutingPlan, load: Tensor) -> Tensor:
        """The balance loss of a plan, scalar; `load` (E,) is that of one worker or of all."""
        return losses.balance_loss(plan.means.probs, load)

    def unused_parameters(self, phase: Phase) -> Sequence[nn.Parameter]:
        """Parameters on which the layer's output does not depend in this phase."""
        return list(self.parameters()) if phase.stage == Stage.DIVERSIFY else []

    def after_update(self, phase: Phase, load: Callable[[], Tensor]) -> str:
        """Change what is not learnt by gradients, after every update.

        Args:
            load: gives the pairs of each expert during the update, (E,), summed over micro-batches
                and workers. Every worker must call it, or none.

        Returns:
            what happened, for the log; "" if nothing is worth a line.
        """
        return ""

    def prune(self, state: dict[str, Tensor], prefix: str, experts: Tensor) -> None:
        """Cut the gate's entries of a model's state down to some experts, in place.

        Args:
            prefix: what the names of the entries begin with.
            experts: the experts that stay, int64, ascending.
        """

    @classmethod
    def flags_after_pruning(cls, cfg: MoEConfig, experts: int) -> dict[str, Any]:
        """Fields of the configuration that change when so many experts stay."""
        return {"moe_expert_count": experts}


GATES: dict[str, type[Gate]] = {}
"""Value of `--moe-gate` -> class."""


def register_gate(name: str) -> Callable[[type[Gate]], type[Gate]]:
    """Make a gate available as `--moe-gate NAME`.

    Raises:
        ValueError: the name is taken, or the class names a flag that does not exist.
    """

    def register(gate: type[Gate]) -> type[Gate]:
        if GATES.get(name, gate) is not gate:
            raise ValueError(f"--moe-gate {name} is registered already: {GATES[name]}")
        known = {f.name for f in fields(MoEConfig)}
        for flag in gate.flags:
            if flag[2:].replace("-", "_") not in known:
                raise ValueError(f"{gate.__name__}.flags: there is no {flag}")
        GATES[name] = gate
        return gate

    return register


class ScoreGate(Gate):
    """A gate with a linear router z = W_g x in float32, and a rule (`route`) that each gate states.

    Softmax over a few logits is where half precision loses the ranking of experts. So logits and
    probabilities are float32 whatever the model's dtype (Switch, arXiv 2101.03961, section 2.4).

    With `--moe-balance-bias` u, experts are chosen by z + b and weighted by z alone. After every
    update b_e += u sign(mean load - load_e), with the load of all micro-batches and workers (arXiv
    2408.15664; there the scores are probabilities, here they are logits, so that any rule can use
    b).

    With `--moe-gate-token-bias` s, z = W_g x + U[token id], where U (V, E) is learned and initially
    drawn from N(0, s). A word then tends to the same experts from the first update on, as with a
    hash gate, and context refines the choice as the router learns.
    """

    flags: ClassVar[tuple[str, ...]] = ("--moe-balance-bias", "--moe-gate-token-bias")
    bias_steps: Tensor

    def __init__(self, cfg: MoEConfig, context: GateContext) -> None:
        super().__init__(cfg, context)
        weight = torch.randn(cfg.moe_expert_count, context.dim, generator=context.generator)
        self.weight = nn.Parameter(weight * cfg.moe_gate_init_std)
        if cfg.moe_balance_bias:
            # b in steps of u, because integers stay exact under .half()
            self.register_buffer("bias_steps", torch.zeros(len(weight), dtype=torch.int64))
        if cfg.token_bias:
            vocabulary = context.vocabulary("--moe-gate-token-bias")
            bias = torch.randn(vocabulary, len(weight), generator=context.generator)
            self.token_bias = nn.Parameter(bias * cfg.token_bias)

    def token_bias_factor(self, phase: Phase) -> float:
        """Fraction of the token bias that is added in this phase, 0 to 1."""
        return 1.0

    def forward(self, x: Tensor, phase: Phase, tokens: TokenBatch | None = None) -> RoutingPlan:
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            if self.cfg.token_bias:
                if tokens is None:
                    raise ValueError("--moe-gate-token-bias: this layer was given no token ids")
                token_bias = F.embedding(tokens.token, self.token_bias.float())
                logits = logits + self.token_bias_factor(phase) * token_bias
            return self.route(logits, phase, tokens)

    def route(self, logits: Tensor, phase: Phase, tokens: TokenBatch | None) -> RoutingPlan:
        """Turn logits (T, E) float32 into the plan."""
        raise NotImplementedError

    @property
    def bias(self) -> Tensor | None:
        """The bias that balancing adds to the logits for the choice, (E,) float32, or None."""
        u = self.cfg.moe_balance_bias
        return u * self.bias_steps.float() if u else None

    def scores(self, logits: Tensor) -> Tensor:
        """The scores that experts are chosen by, (T, E): logits, plus the balancing bias if any."""
        bias = self.bias
        return logits if bias is None else logits + bias

    @property
    def needs_sums(self) -> bool:
        """Whether routing losses will follow; evaluation seldom keeps a record."""
        return self.training and not torch.compiler.is_compiling()

    @torch.no_grad()
    def after_update(self, phase: Phase, load: Callable[[], Tensor]) -> str:
        """Move the balancing bias by a step towards even load."""
        if self.cfg.moe_balance_bias:
            counts = load().double().to(self.bias_steps.device)
            self.bias_steps += (counts.mean() - counts).sign().long()
        return ""

    def prune(self, state: dict[str, Tensor], prefix: str, experts: Tensor) -> None:
        prune_rows(state, prefix, ("weight", "bias_steps"), experts)
        if f"{prefix}token_bias" in state:
            state[f"{prefix}token_bias"] = state[f"{prefix}token_bias"][:, experts].clone()


def prune_rows(
    state: dict[str, Tensor], prefix: str, names: Iterable[str], experts: Tensor
) -> None:
    """Keep some rows, one per expert, of the entries that there are, in place."""
    for name in names:
        if prefix + name in state:
            state[prefix + name] = state[prefix + name][experts].clone()


def sigmoid(logits: Tensor) -> Tensor:
    """The sigmoid of float32 logits, whose last bit does not depend on a token's place.

    torch computes the last few elements of a tensor by other instructions than the rest.
    """
    return torch.sigmoid(logits.double()).float()


def mask_of(expert: Tensor, experts: int) -> Tensor:
    """Turn one expert per token into a mask: (T,) int64 -> (T, E) bool."""
    mask = torch.zeros(len(expert), experts, dtype=torch.bool, device=expert.device)
    return mask.scatter_(1, expert[:, None], True)
