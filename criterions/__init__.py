"""The registered criterions."""

from fairseq_evomoe.criterions import (
    moe_cross_entropy,
    moe_label_smoothed_cross_entropy,
    moe_masked_lm,
    moe_sentence_prediction,
)

__all__ = [
    "moe_cross_entropy",
    "moe_label_smoothed_cross_entropy",
    "moe_masked_lm",
    "moe_sentence_prediction",
]
