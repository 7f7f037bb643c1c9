"""EvoMoE mixture-of-experts training for fairseq: load with `--user-dir fairseq_evomoe`."""

import logging
import os

_here = os.path.dirname(os.path.realpath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):
    # a checkout, linked to or not, keeps kernels/ and criterions/ beside this folder; a wheel
    # has them inside
    __path__.append(os.path.dirname(_here))

__version__ = "0.1.0"

_logs_unset = not logging.getLogger().handlers

from fairseq_evomoe import compat  # noqa: E402

compat.mend()

from fairseq_evomoe.parallel import shards  # noqa: E402

shards.install()

from fairseq_evomoe import criterions, models, tasks  # noqa: E402

if _logs_unset:
    # importing fairseq's wav2vec has turned on the debugging output of every library
    logging.getLogger().setLevel(logging.INFO)

__all__ = ["__version__", "compat", "criterions", "models", "tasks"]
