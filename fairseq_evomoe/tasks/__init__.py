"""The registered tasks."""

from fairseq_evomoe.tasks import translation_evomoe

__all__ = ["translation_evomoe"]
