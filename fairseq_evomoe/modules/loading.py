"""How an MoE layer reads its part of a checkpoint, and what it says when the two do not fit.

Letters: E experts.
"""

from typing import Any

from torch import Tensor

from fairseq_evomoe.modules.experts import Bank
from fairseq_evomoe.modules.gates.base import Gate
from fairseq_evomoe.parallel.sharded_files import local_part


def explain_mismatch(
    state: dict[str, Any], prefix: str, *, name: str, gate: Gate, experts: Bank
) -> list[str]:
    """Why a checkpoint's entries do not fit a layer, in terms of flags; empty if they fit.

    Args:
        state: the checkpoint's entries of all modules.
        prefix: what the layer's entries begin with.
        name: of the layer, for the messages.
    """
    part, parameter = next(iter(experts.named_parameters()))
    saved = state.get(f"{prefix}experts.{part}")
    if saved is None:
        return [
            f"{name}: the checkpoint has no such experts; evomoe-upcycle makes them from a dense "
            "one, --moe-freq and --moe-expert-type say which layers have which"
        ]
    errors = []
    has_bias, saved_bias = hasattr(gate, "token_bias"), f"{prefix}gate.token_bias" in state
    if has_bias != saved_bias:
        which, value = ("a", 3) if saved_bias else ("no", 0)
        errors.append(
            f"{name}: the checkpoint has {which} bias of the token id; give "
            f"--moe-gate-token-bias {value}"
        )
    counts = {parameter.size(0)}
    if experts.shard is not None:
        # a running average (--store-ema) is restored from this worker's own part as well
        counts = {experts.shard.total} | (set() if hasattr(parameter, "expert") else counts)
    if isinstance(saved, Tensor) and saved.size(0) not in counts:
        routed = saved.size(0) - int(experts.shared)
        errors.append(
            f"{name}: the checkpoint has {routed} experts; give --moe-expert-count {routed}"
        )
    return errors


def keep_local_experts(state: dict[str, Any], prefix: str, experts: Bank) -> None:
    """Cut a checkpoint's stacks of all experts down to those of this worker, in place."""
    if experts.shard is None:
        return
    timeline = state.get(f"{prefix}_extra_state")
    has_split = timeline is None or bool(timeline[3])
    for name, p in experts.named_parameters(f"{prefix}experts"):
        if name in state:
            state[name] = local_part(state[name], experts.shard, p.shape, has_split=has_split)
