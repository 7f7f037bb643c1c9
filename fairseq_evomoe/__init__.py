"""EvoMoE mixture-of-experts training for fairseq. Load it with `--user-dir fairseq_evomoe`."""

import importlib.util
import logging
import os

_here = os.path.dirname(os.path.realpath(__file__))
if not os.path.isdir(os.path.join(_here, "kernels")):
    # in a checkout (also one reached through a link) kernels/ and criterions/ lie beside this
    # folder; in a wheel they lie inside it
    __path__.append(os.path.dirname(_here))

__version__ = "0.2.0"

# Without fairseq, which nothing in `hf` and `kernels` needs, exported models can still be loaded.
if importlib.util.find_spec("fairseq") is not None:
    _logs_unset = not logging.getLogger().handlers

    from fairseq_evomoe import compat

    compat.apply_patches()

    from fairseq_evomoe import criterions, models, tasks

    if _logs_unset:
        # importing fairseq's wav2vec turns on the debugging output of every library
        logging.getLogger().setLevel(logging.INFO)

    __all__ = ["__version__", "compat", "criterions", "models", "tasks"]
