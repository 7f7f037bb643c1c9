"""Gates by score in one op: noise, temperature, threshold, limit, weights.

Letters: T tokens, E experts. p = softmax((z + b + g) / tau) chooses, and softmax(z) or p weighs; g
is Gumbel(0, 1) noise times its strength, b a bias of the selection. The argmax is always active.
"""

import torch
from torch import Tensor

from fairseq_evomoe.kernels import backend, self_check
from fairseq_evomoe.kernels.gate.rule import (
    GateOutput,
    Rule,
    choose_experts,
    combine_weights,
    top_k_mask,
)
from fairseq_evomoe.kernels.gate.sums import routing_sums, unpack_sums, unsupported


def _by_triton(logits: Tensor, rule: Rule, bias: Tensor | None, sums: bool) -> GateOutput | None:
    """The gate in one pass by Triton; None if Triton does not serve this call."""
    name = backend.choose_backend(
        triton=lambda: unsupported(logits) or self_check.failure("gate", logits, _check),
        torch=backend.supported,
        reference=backend.supported,
    )
    if name != "triton":
        return None
    from fairseq_evomoe.kernels.gate.gate_triton import fused_gate

    # The seed is drawn on the host: it follows torch.manual_seed and no device waits.
    seed = torch.zeros((), dtype=torch.int64)
    if rule.noise is not None:
        seed = torch.randint(2**31 - 1, (), dtype=torch.int64)
    weights, active, probs, row = fused_gate(logits, rule, bias, seed, sums=sums)
    return GateOutput(weights, active, probs, unpack_sums(row) if sums else None)


def _check(device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The fused gate on 37 tokens and 5 experts beside torch's, for two kinds of rules."""
    from fairseq_evomoe.kernels.gate.gate_triton import fused_gate

    bias = self_check.draw(2, device, dtype, 5).detach()
    have, want = [], []
    for rule in (
        Rule(temperature=0.7, threshold=0.2, max_active=3, combine="straight"),
        Rule(exactly=2, combine="renorm"),
    ):
        z = self_check.draw(1, device, dtype, 37, 5)
        weights, active, _, row = fused_gate(
            z, rule, bias, torch.zeros((), dtype=torch.int64), sums=True
        )
        have += [active.float(), *self_check.with_gradients(weights, [z])]
        have.append(row)
        z = self_check.draw(1, device, dtype, 37, 5)
        with backend.use("torch"):
            output = dense_to_sparse(z, rule, bias)
            sums = routing_sums(z, output.probs, output.active)
        want += [output.active.float(), *self_check.with_gradients(output.weights, [z])]
        want.append(torch.cat([x.reshape(-1) for x in sums]))
    return have, want


def dense_to_sparse(
    logits: Tensor, rule: Rule, bias: Tensor | None = None, *, sums: bool = False
) -> GateOutput:
    """Choose and weigh experts by a rule.

    Args:
        logits: z, (T, E) float32.
        bias: b, (E,) float32, not differentiated; None means 0.
        sums: whether the caller will need the sums of the routing. They are returned if this pass
            can compute them for free.
    """
    output = _by_triton(logits, rule, bias, sums)
    if output is not None:
        return output
    probs = logits.softmax(-1)
    noise: Tensor | float = 0.0
    if rule.noise is not None:
        # -log(Exponential(1)) is Gumbel(0, 1)
        noise = -torch.empty_like(logits).exponential_().log() * rule.noise
    p = torch.softmax((logits + noise) / rule.temperature, -1)
    selection = p
    if bias is not None:
        selection = torch.softmax((logits + bias + noise) / rule.temperature, -1)
    active = choose_experts(selection, rule)
    return GateOutput(combine_weights(probs, p, active, rule.combine), active, probs, None)


def top_k(
    logits: Tensor, k: int, bias: Tensor | None = None, *, renorm: bool = False, sums: bool = False
) -> GateOutput:
    """The k experts of the largest z + b, weighed by softmax(z), with `renorm` divided by its sum.

    The other arguments are as for `dense_to_sparse`.
    """
    kind = "renorm" if renorm else "softmax"
    output = _by_triton(logits, Rule(exactly=k, combine=kind), bias, sums)
    if output is not None:
        return output
    probs = logits.softmax(-1)
    active = top_k_mask(logits if bias is None else logits + bias, k)
    return GateOutput(combine_weights(probs, probs, active, kind), active, probs, None)
