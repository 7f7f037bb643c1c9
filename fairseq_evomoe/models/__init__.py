"""The registered models and their architectures."""

from fairseq_evomoe.models import roberta_evomoe, transformer_evomoe, transformer_lm_evomoe

__all__ = ["roberta_evomoe", "transformer_evomoe", "transformer_lm_evomoe"]
