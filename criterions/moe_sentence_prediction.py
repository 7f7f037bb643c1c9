"""`--criterion moe_sentence_prediction`: loss of a classifier plus the routing losses."""

from dataclasses import dataclass

from fairseq.criterions import register_criterion
from fairseq.criterions.sentence_prediction import (
    SentencePredictionConfig,
    SentencePredictionCriterion,
)

from fairseq_evomoe.criterions.routing_metrics import RoutingLossConfig, RoutingMixin


@dataclass
class MoESentencePredictionConfig(RoutingLossConfig, SentencePredictionConfig):
    """fairseq's flags and the weights of the routing losses."""


@register_criterion("moe_sentence_prediction", dataclass=MoESentencePredictionConfig)
class MoESentencePredictionCriterion(RoutingMixin, SentencePredictionCriterion):
    """Cross entropy (or squared error) of labels. In the logs, `loss` is the task loss alone."""
