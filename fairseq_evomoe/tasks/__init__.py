"""The registered tasks."""

from fairseq_evomoe.tasks import language_modeling_evomoe, masked_lm_evomoe, translation_evomoe

__all__ = ["language_modeling_evomoe", "masked_lm_evomoe", "translation_evomoe"]
