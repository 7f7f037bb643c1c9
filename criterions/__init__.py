"""The registered criterions."""

from fairseq_evomoe.criterions import moe_cross_entropy, moe_label_smoothed_cross_entropy

__all__ = ["moe_cross_entropy", "moe_label_smoothed_cross_entropy"]
