"""`--task masked_lm_evomoe`: masked language modelling with the evolution of experts."""

from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

from fairseq_evomoe.config import EvolutionConfig
from fairseq_evomoe.tasks.evolution import EvolutionMixin


@dataclass
class MaskedLMEvoMoEConfig(EvolutionConfig, MaskedLMConfig):
    """fairseq's flags of masked language modelling and the flags of the schedule."""


@register_task("masked_lm_evomoe", dataclass=MaskedLMEvoMoEConfig)
class MaskedLMEvoMoETask(EvolutionMixin, MaskedLMTask):
    """fairseq's masked_lm task whose model evolves while it trains."""
