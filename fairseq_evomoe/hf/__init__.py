"""Exported models for transformers. Importing this registers them with its Auto classes.

    import fairseq_evomoe.hf
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained("folder")

The package's kernels compute experts and look-ups. Nothing in here imports fairseq.
"""

import importlib
import sys
from typing import Any


def _hide_broken_torchaudio() -> None:
    """Let transformers treat a torchaudio that cannot be loaded like one that is not there.

    fairseq asks for torchaudio, whose wheels need a GPU's libraries. Beside a torch for CPUs its
    import raises an OSError, and with it most of transformers cannot be imported.
    """
    try:
        importlib.import_module("torchaudio")
    except ImportError:
        pass
    except OSError:
        sys.modules["torchaudio"] = None  # type: ignore[assignment]
        import_utils = importlib.import_module("transformers.utils.import_utils")
        import_utils.is_torchaudio_available.cache_clear()


_hide_broken_torchaudio()

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from fairseq_evomoe.hf import experts, kernels  # noqa: E402
from fairseq_evomoe.hf.configuration_evomoe import (  # noqa: E402
    EvoMoEConfig,
    EvoMoELanguageModelConfig,
    EvoMoEMaskedLMConfig,
    EvoMoETranslationConfig,
)
from fairseq_evomoe.hf.masked_lm_evomoe import (  # noqa: E402
    EvoMoEForMaskedLM,
    EvoMoEForSequenceClassification,
)
from fairseq_evomoe.hf.modeling_evomoe import (  # noqa: E402
    EvoMoEForCausalLM,
    EvoMoEForConditionalGeneration,
)

__all__ = [
    "AUTO_CLASSES",
    "EvoMoEConfig",
    "EvoMoEForCausalLM",
    "EvoMoEForConditionalGeneration",
    "EvoMoEForMaskedLM",
    "EvoMoEForSequenceClassification",
    "EvoMoELanguageModelConfig",
    "EvoMoEMaskedLMConfig",
    "EvoMoETranslationConfig",
]

AUTO_CLASSES: dict[Any, dict[Any, Any]] = {
    EvoMoETranslationConfig: {AutoModelForSeq2SeqLM: EvoMoEForConditionalGeneration},
    EvoMoELanguageModelConfig: {AutoModelForCausalLM: EvoMoEForCausalLM},
    EvoMoEMaskedLMConfig: {
        AutoModelForMaskedLM: EvoMoEForMaskedLM,
        AutoModelForSequenceClassification: EvoMoEForSequenceClassification,
    },
}
"""Configuration -> transformers' classes that find a model of ours; the first is the usual one."""

for _config, _models in AUTO_CLASSES.items():
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    for _auto, _model in _models.items():
        _auto.register(_config, _model, exist_ok=True)
kernels.install()
experts.register()
