"""`--criterion moe_label_smoothed_cross_entropy`: translation loss plus the routing losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)

from fairseq_evomoe.criterions.output_loss import OutputLossMixin
from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig, RoutingMixin


@dataclass
class MoELabelSmoothedConfig(RoutingLossConfig, LabelSmoothedCrossEntropyCriterionConfig):
    """fairseq's flags and the weights of the routing losses."""


@register_criterion("moe_label_smoothed_cross_entropy", dataclass=MoELabelSmoothedConfig)
class MoELabelSmoothedCrossEntropyCriterion(
    RoutingMixin, OutputLossMixin, LabelSmoothedCrossEntropyCriterion
):
    """Label-smoothed cross entropy. In the logs, `loss` is the task loss, as for a dense model."""
