"""Functions of torch that training on a CPU exchanges for faster ones of the same meaning.

Modules of torch and fairseq look them up in torch.nn.functional when they are called.
"""

import threading
from contextlib import AbstractContextManager
from typing import Any

from torch.nn import functional as F

from fairseq_evomoe.kernels.transformer.attention import attention, torch_attention
from fairseq_evomoe.kernels.transformer.dropout import dropout, torch_dropout

EXCHANGED = {
    "scaled_dot_product_attention": (torch_attention, attention),
    "dropout": (torch_dropout, dropout),
}
"""Name in torch.nn.functional -> torch's function and ours."""


class _Exchange:
    """Exchanges the functions while at least one block needs it, in whatever thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1
            for name, (_, ours) in EXCHANGED.items():
                setattr(F, name, ours)

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                for name, (theirs, _) in EXCHANGED.items():
                    setattr(F, name, theirs)


_EXCHANGE = _Exchange()


def are_fast() -> bool:
    """Whether a block of `fast_functions` is open, in this thread or in another."""
    return F.scaled_dot_product_attention is attention


def fast_functions() -> AbstractContextManager[None]:
    """Within, torch's modules and functions train with `EXCHANGED` where that is faster.

    Other threads that compute meanwhile get results as good, but other units in their dropout.
    """
    return _EXCHANGE
