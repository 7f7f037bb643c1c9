"""The MoE layer that stands in for a Transformer's feed-forward network.

Letters: L positions, B sentences, T real tokens, D model width, E experts.
"""

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.memory_config import MemoryConfig
from fairseq_evomoe.modules.experts import Bank, ExpertBank
from fairseq_evomoe.modules.gates import GATES, Site
from fairseq_evomoe.modules.memory_experts import MemoryBank
from fairseq_evomoe.modules.plan import Clock, RoutingPlan, TokenBatch
from fairseq_evomoe.modules.records import LOSSES, RecordingLayer, RoutingRecord, attach, touch
from fairseq_evomoe.modules.split import Split, SplitRule
from fairseq_evomoe.parallel.mesh import share_of
from fairseq_evomoe.parallel.shards import own_part
from fairseq_evomoe.schedule import EvolutionSchedule, Stage


class EvoMoELayer(RecordingLayer):
    """Gate and experts through the stages of EvoMoE (arXiv 2112.14397).

    1. DIVERSIFY: the base expert alone, on every position: a dense layer, to the bit.
    2. Otherwise padding is left out and the gate plans the T real tokens (float32).
    3. The experts compute the plan's active pairs and combine them, dropless.
    4. While training, the routing losses join the graph (`records.attach`); inside
       `records.recording` the layer keeps a `RoutingRecord`.

    Time: `follow` gives the layer its schedule, fairseq calls `set_num_updates`. Stage and
    temperature are saved with the weights, since generation has neither.

    Args:
        fc1, fc2: the dense layer's linear maps, which become the base expert.
        cfg: the flags.
        memory: the flags of look-ups, for `--expert-type memory`.
        name: unique in the model, "encoder.1"; part of every seed.
        activation, dropout: between the maps.
        causal: the layer is in a decoder.
        dictionary: of the tokens that pass here; None where nobody knows.
    """

    def __init__(
        self,
        fc1: nn.Linear,
        fc2: nn.Linear,
        *,
        cfg: MoEConfig,
        memory: MemoryConfig | None = None,
        name: str,
        activation,
        dropout: float,
        causal: bool = False,
        dictionary: Any = None,
    ) -> None:
        super().__init__(name)
        self.cfg = cfg
        # `initial_seed` is --seed; reading it leaves the global stream as in a dense model
        generator = torch.Generator().manual_seed(self._seed(torch.initial_seed()))
        site = Site(fc1.in_features, name, generator, causal=causal, dictionary=dictionary)
        self.gate = GATES[cfg.moe_gate](cfg, site)
        common: dict[str, Any] = {
            "num_experts": cfg.moe_expert_count + cfg.moe_shared_expert,
            "dropout": dropout,
            "generator": generator,
            "shared": cfg.moe_shared_expert,
        }
        self.experts: Bank
        if cfg.expert_type == "memory":
            self.experts = MemoryBank(fc1.in_features, memory or MemoryConfig(), **common)
        else:
            self.experts = ExpertBank(fc1, fc2, activation=activation, **common)
        share = share_of(int(common["num_experts"]), shared=cfg.moe_shared_expert)
        # what the first entry of this worker's experts is until the split
        self._base: dict[str, Tensor] = {}
        if share is not None:
            self._base = {n: p.detach()[0].clone() for n, p in self.experts.named_parameters()}
            self.experts.keep(share)
        self.schedule: EvolutionSchedule | None = None
        self.num_updates, self.spawned = 0, True
        self._saved: Clock | None = None
        self.tokens: TokenBatch | None = None

    def _seed(self, seed: int) -> int:
        return (seed * 1000003 + zlib.crc32(self.name.encode())) % 2**62

    # -- time

    @property
    def spawned(self) -> bool:
        """Whether the base expert has split."""
        return self._spawned

    @spawned.setter
    def spawned(self, yes: bool) -> None:
        self._spawned = yes
        if self.experts.share is not None:
            self.experts.share.split = yes

    def follow(self, schedule: EvolutionSchedule) -> None:
        """Take the stages from `schedule`; before the split unless it lies at update 0."""
        self.schedule, self.spawned = schedule, schedule.spawn == 0
        if not self.spawned:
            for name, base in self._base.items():
                self.experts.get_parameter(name).data[0] = base
        self._base = {}

    def set_num_updates(self, num_updates: int) -> None:
        """fairseq's hook: called with the number of finished updates, in any order."""
        self.num_updates = num_updates

    @property
    def clock(self) -> Clock:
        """Stage and temperature of the next forward pass."""
        if self.schedule is None:
            return self._saved or Clock(Stage.SPARSIFY, 1.0)
        if not self.spawned:
            return Clock(Stage.DIVERSIFY, self.schedule.start, warmth=1.0)
        # a restart that resets the updates must not go back behind a split that has happened
        n = self.num_updates
        stage = max(self.schedule.stage(n), Stage.SPARSIFY)
        return Clock(stage, self.schedule.temperature(n), self.schedule.warmth(n))

    def get_extra_state(self) -> Tensor:
        """Float64 [updates, stage, temperature, spawned, warmth]: exact under .half()."""
        clock = self.clock
        state = [self.num_updates, clock.stage, clock.temperature, self.spawned, clock.warmth]
        return torch.tensor(state, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        num_updates, stage, temperature, spawned, *warmth = state.tolist()
        clock = Clock(Stage(int(stage)), temperature, *warmth)
        self.restore(int(num_updates), clock, spawned=bool(spawned))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """torch's hook, to say in our words what does not fit. args[-1]: its list of errors."""
        part, own = next(iter(self.experts.named_parameters()))
        saved = state_dict.get(f"{prefix}experts.{part}")
        counts = {own.size(0)}
        if self.experts.share is not None:
            # a running average (--store-ema) is restored from this worker's own part as well
            counts = {self.experts.share.total} | (set() if hasattr(own, "expert") else counts)
        bias, held = hasattr(self.gate, "token_bias"), f"{prefix}gate.token_bias" in state_dict
        if saved is not None and bias != held:
            which, value = ("a", 3) if held else ("no", 0)
            args[-1].append(
                f"{self.name}: the checkpoint has {which} bias of the token id; give "
                f"--moe-gate-token-bias {value}"
            )
        if saved is None:
            args[-1].append(
                f"{self.name}: the checkpoint has no such experts; evomoe-upcycle makes them from "
                "a dense one, --moe-freq and --expert-type say which layers have which"
            )
        elif isinstance(saved, Tensor) and saved.size(0) not in counts:
            shared = int(self.cfg.moe_shared_expert)
            args[-1].append(
                f"{self.name}: the checkpoint has {saved.size(0) - shared} experts; give "
                f"--moe-expert-count {saved.size(0) - shared}"
            )
        elif self.experts.share is not None:
            clock = state_dict.get(f"{prefix}_extra_state")
            split = clock is None or bool(clock[3])
            for name, p in self.experts.named_parameters(f"{prefix}experts"):
                if name in state_dict:
                    state_dict[name] = own_part(
                        state_dict[name], self.experts.share, p.shape, split=split
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def restore(self, num_updates: int, clock: Clock, *, spawned: bool) -> None:
        """Stand where a checkpoint says: `clock` holds unless a schedule is followed."""
        self.num_updates, self.spawned, self._saved = num_updates, spawned, clock

    def reset_normal_(self, std: float) -> None:
        """BERT's initial weights for the experts, as fairseq gives them to its linear layers."""
        generator = torch.Generator().manual_seed(self._seed(torch.initial_seed()) + 1)
        if isinstance(self.experts, ExpertBank):
            base = self.experts.reset_normal_(std, generator)
            self._base = base if self._base else {}

    def split(self, rule: SplitRule, *, seed: int) -> Split:
        """How the base expert splits here; the caller applies it and sets `spawned`."""
        return Split(rule, self.experts, seed=self._seed(seed))

    # -- data

    def forward(self, x: Tensor) -> Tensor:
        """(L, B, D) -> (L, B, D); rows of padding are 0 after the diversify stage."""
        unscheduled = self.schedule is None and self._saved is None
        timed = self.gate.changes_over_time or self.cfg.moe_balance_bias
        if self.training and unscheduled and timed:
            what = f"--moe-gate {self.cfg.moe_gate}"
            if not self.gate.changes_over_time:
                what = f"--moe-balance-bias {self.cfg.moe_balance_bias}"
            raise ValueError(
                f"{what} changes over time and this task sets no schedule: train with --task "
                "translation_evomoe, language_modeling_evomoe or masked_lm_evomoe, or start from a "
                "checkpoint that was"
            )
        clock = self.clock
        if clock.stage == Stage.DIVERSIFY:
            return self._diversify(x, clock)

        flat = x.reshape(-1, x.size(-1))
        real = self.tokens.real if self.tokens is not None else None
        states = flat if real is None else flat.index_select(0, real)
        plan = self.gate(states, clock, self.tokens)
        y = self.experts(states, plan).to(x.dtype)
        y = self._account(y, plan, clock)
        if real is not None:
            y = torch.zeros_like(flat).index_copy(0, real, y)
        return y.view_as(x)

    def _diversify(self, x: Tensor, clock: Clock) -> Tensor:
        y = self.experts.base(x)
        if self.recording:
            flat = x.size(0) * x.size(1)
            real = self.tokens.real if self.tokens is not None else None
            tokens = x.new_tensor(flat if real is None else real.numel(), dtype=torch.float32)
            load = torch.zeros(self.cfg.moe_expert_count, device=x.device)
            load[0] = tokens
            nothing = torch.zeros(len(LOSSES), device=x.device)
            self.record = RoutingRecord(
                *(self.name, clock.stage, clock.temperature, tokens, load),
                *(nothing[0], nothing[0], nothing),
            )
        return self._touch_idle(y, clock)

    def _touch_idle(self, y: Tensor, clock: Clock) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return y
        idle = [p for p in self.gate.idle(clock) if p.requires_grad]
        return touch(y, *idle) if idle else y

    def _account(self, y: Tensor, plan: RoutingPlan, clock: Clock) -> Tensor:
        training = self.training and torch.is_grad_enabled()
        if not (training or self.recording):
            return y
        y = self._touch_idle(y, clock)
        if torch.compiler.is_compiling():
            if self.recording:
                raise RuntimeError(
                    "torch.compile: routing losses and metrics do not pass through a compiled MoE "
                    "layer; compile for inference, or train with a criterion of fairseq's own"
                )
            return y
        share = self.gate.load(plan)
        if self.training and self.cfg.moe_balance_all_ranks and dist.is_initialized():
            share = share.clone()
            dist.all_reduce(share)
        values = torch.stack(
            [
                self.gate.balance(plan, share),
                plan.means.z,
                plan.means.entropy,
                share.new_zeros(()) if plan.distill is None else plan.distill,
            ]
        )
        if self.recording:
            load, spread = plan.sums.load, plan.sums.entropy.detach()
            tokens = load.new_tensor(len(plan.probs))
            dropped = load.sum() - plan.active.sum()
            self.record = RoutingRecord(
                *(self.name, clock.stage, clock.temperature, tokens, load),
                *(spread, dropped, values.detach()),
            )
        return attach(y, values, self.port) if training else y


def moe_layers(model: nn.Module) -> list[tuple[str, EvoMoELayer]]:
    """The MoE layers of a model, wrapped for data parallel or not, with their module names."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, EvoMoELayer)]
