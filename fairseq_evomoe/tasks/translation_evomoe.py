"""`--task translation_evomoe`: translation with the evolution of experts."""

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_evomoe.config import EvolutionConfig
from fairseq_evomoe.tasks.evolution import EvolutionMixin


@dataclass
class TranslationEvoMoEConfig(EvolutionConfig, TranslationConfig):
    """fairseq's translation flags and the schedule's."""


@register_task("translation_evomoe", dataclass=TranslationEvoMoEConfig)
class TranslationEvoMoETask(EvolutionMixin, TranslationTask):
    """fairseq's translation task whose model evolves while it trains."""
