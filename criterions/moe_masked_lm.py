"""`--criterion moe_masked_lm`: masked-LM loss plus the routing losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss

from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig, RoutingMixin


@dataclass
class MoEMaskedLMConfig(RoutingLossConfig, MaskedLmConfig):
    """fairseq's flags and the weights of the routing losses."""


@register_criterion("moe_masked_lm", dataclass=MoEMaskedLMConfig)
class MoEMaskedLMCriterion(RoutingMixin, MaskedLmLoss):
    """Cross entropy of the masked tokens. In the logs, `loss` is the task loss alone."""
