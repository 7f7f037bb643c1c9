"""The registered models and their architectures."""

from fairseq_evomoe.models import transformer_evomoe

__all__ = ["transformer_evomoe"]
