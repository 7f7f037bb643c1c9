"""What a forward pass of an MoE layer tells the criterion: its losses and counts.

Letters: L positions, B sentences, T real tokens, D model width, E experts.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fairseq_evomoe.modules.gates.base import Gate
from fairseq_evomoe.modules.plan import Phase, RoutingPlan, TokenBatch
from fairseq_evomoe.modules.records import (
    LOSSES,
    RoutingRecord,
    current_log,
    with_zero_grads,
)


def account_base(
    y: Tensor, tokens: TokenBatch | None, *, gate: Gate, phase: Phase, name: str
) -> Tensor:
    """Record a forward pass of the base expert alone; y (L, B, D) is returned.

    All real tokens count as the first expert's load, and the routing losses are 0.
    """
    log = current_log()
    if log is not None:
        rows = None if tokens is None else tokens.real
        count = y.size(0) * y.size(1) if rows is None else rows.numel()
        load = torch.zeros(gate.cfg.moe_expert_count, device=y.device)
        load[0] = count
        losses = torch.zeros(len(LOSSES), device=y.device)
        log.records.append(
            RoutingRecord(
                name=name,
                stage=phase.stage,
                temperature=phase.temperature,
                tokens=load[0].clone(),
                load=load,
                entropy=losses[0],
                dropped=losses[0],
                losses=losses,
            )
        )
    return _with_all_grads(y, gate, phase, recorded=log is not None)


def account_plan(y: Tensor, plan: RoutingPlan, *, gate: Gate, phase: Phase, name: str) -> Tensor:
    """Record a routed forward pass; y (T, D) is returned."""
    log = current_log()
    if log is not None:
        load, entropy = plan.sums.load, plan.sums.entropy.detach()
        log.records.append(
            RoutingRecord(
                name=name,
                stage=phase.stage,
                temperature=phase.temperature,
                tokens=load.new_tensor(len(plan.probs)),
                load=load,
                entropy=entropy,
                dropped=load.sum() - plan.active.sum(),
                losses=routing_losses(plan, gate),
                first=None if gate.training else first_experts(plan),
            )
        )
    return _with_all_grads(y, gate, phase, recorded=log is not None)


def first_experts(plan: RoutingPlan) -> Tensor:
    """The active expert with the largest weight for each token, (T,) int64."""
    return plan.weights.masked_fill(~plan.active, -torch.inf).argmax(-1)


def routing_losses(plan: RoutingPlan, gate: Gate) -> Tensor:
    """The losses named by `records.LOSSES`, unweighted, (4,) float32; differentiable.

    With `--moe-balance-all-ranks` the load in the balance loss is that of all workers.
    """
    load = gate.expert_load(plan)
    if gate.training and gate.cfg.moe_balance_all_ranks and dist.is_initialized():
        load = load.clone()
        dist.all_reduce(load)
    zero = load.new_zeros(())
    return torch.stack(
        [
            gate.balance_loss(plan, load),
            plan.means.z,
            plan.means.entropy,
            zero if plan.distill_loss is None else plan.distill_loss,
        ]
    )


def _with_all_grads(y: Tensor, gate: Gate, phase: Phase, *, recorded: bool) -> Tensor:
    """Give every parameter of the gate a gradient, whether the output depends on it or not."""
    if not (gate.training and torch.is_grad_enabled()):
        return y
    # Without routing losses a gate whose weights are constant would get no gradient at all.
    unused = gate.unused_parameters(phase) if recorded else gate.parameters()
    unused = [p for p in unused if p.requires_grad]
    return with_zero_grads(y, *unused) if unused else y
