"""EvoMoE mixture-of-experts training for fairseq. Load it with `--user-dir fairseq_evomoe`."""

import logging
import os

_here = os.path.dirname(os.path.realpath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):
    # in a checkout (also one reached through a link) kernels/ and criterions/ lie beside this
    # folder; in a wheel they lie inside it
    __path__.append(os.path.dirname(_here))

__version__ = "0.2.0"

_logs_unset = not logging.getLogger().handlers

from fairseq_evomoe import compat  # noqa: E402

compat.apply_patches()

from fairseq_evomoe import criterions, models, tasks  # noqa: E402

if _logs_unset:
    # importing fairseq's wav2vec turns on the debugging output of every library
    logging.getLogger().setLevel(logging.INFO)

__all__ = ["__version__", "compat", "criterions", "models", "tasks"]
