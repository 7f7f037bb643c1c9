"""`--task language_modeling_evomoe`: causal language modelling with the evolution of experts."""

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_evomoe.config import EvolutionConfig
from fairseq_evomoe.tasks.evolution import EvolutionMixin


@dataclass
class LanguageModelingEvoMoEConfig(EvolutionConfig, LanguageModelingConfig):
    """fairseq's flags of causal language modelling and the flags of the schedule."""


@register_task("language_modeling_evomoe", dataclass=LanguageModelingEvoMoEConfig)
class LanguageModelingEvoMoETask(EvolutionMixin, LanguageModelingTask):
    """fairseq's language_modeling task whose model evolves while it trains."""
