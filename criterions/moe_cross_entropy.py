"""`--criterion moe_cross_entropy`: cross entropy plus the routing losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import (
    CrossEntropyCriterion,
    CrossEntropyCriterionConfig,
)

from fairseq_evomoe.criterions.output_loss import OutputLossMixin
from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig, RoutingMixin


@dataclass
class MoECrossEntropyConfig(RoutingLossConfig, CrossEntropyCriterionConfig):
    """fairseq's flags and the weights of the routing losses."""


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(RoutingMixin, OutputLossMixin, CrossEntropyCriterion):
    """Cross entropy. In the logs, `loss` is the task loss alone, as for a dense model."""
