"""What fairseq needs to run on today's torch, each mend with its reason.

A mend is applied only where its fault is present, touches one name in one fairseq module, and is
safe to apply twice. Nothing here turns off torch's checks on what a checkpoint may contain.
"""

import atexit
import warnings

from fairseq_evomoe.compat import batches, running, saving

_NOISE = (
    "deprecated keyword in package header",
    "is validated against ConfigStore schema",
    "strict flag in the compose API",
    "torch.cuda.amp.autocast",
    "mismatched key_padding_mask and attn_mask",
    "'pin_memory' argument is set as true",
)


def mend() -> None:
    """Apply every mend. Called once, when the plugin is imported, before fairseq parses a flag."""
    saving.allow_config_classes_in_checkpoints()
    saving.average_weights_alone()
    saving.copy_checkpoints_whole()
    saving.name_damaged_checkpoints()
    batches.keep_last_batch()
    batches.keep_numpy_compat()
    batches.keep_place_in_epoch()
    atexit.register(batches.stop_loading_batches)
    running.keep_bf16_off_tpu()
    running.start_cpu_workers()
    running.own_weight_decay()
    running.find_nan_in_any_model()
    running.shorten_progress_bar()
    for text in _NOISE:
        warnings.filterwarnings("ignore", message=rf"(?s)\s*.*{text}")
