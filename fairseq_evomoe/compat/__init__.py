"""Patches that fairseq needs to run on current versions of torch and with experts.

Each patch replaces one name in one of fairseq's modules, through the decorator `patching.patch`,
and says why. Where its reason is absent it is not applied, and applying it twice changes nothing.
No patch turns off torch's checks on what a checkpoint may contain. docs/compat.md lists them all.
"""

import atexit
import warnings

from fairseq_evomoe.compat import (
    averages,
    batches,
    expert_parallel,
    hydra,
    loggers,
    masters,
    running,
    saving,
    words,
)
from fairseq_evomoe.compat.patching import PATCHES

_NOISE = (
    "deprecated keyword in package header",
    "is validated against ConfigStore schema",
    "torch.cuda.amp.autocast",
    "mismatched key_padding_mask and attn_mask",
    "'pin_memory' argument is set as true",
)

__all__ = [
    "apply_patches",
    "averages",
    "expert_parallel",
    "hydra",
    "loggers",
    "masters",
    "running",
    "words",
]


def apply_patches() -> None:
    """Apply every patch. The plugin calls this at import, before fairseq parses the flags."""
    for each in PATCHES:
        each.apply()
    saving.allow_config_classes_in_checkpoints()
    atexit.register(batches.stop_loading_batches)
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=rf"(?s)\s*.*{text}")
