"""What layers say to TorchScript, which cannot express them."""

from typing import Any

import torch
from torch import nn


class NotScriptable(nn.Module):
    """Base class of layers that torch.jit can neither script nor trace.

    The number of rows of an expert is known only when it runs. A trace would keep the numbers of
    its example for ever, and give wrong results without an error.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # torch.jit.trace would compile the properties before it runs anything
        names = {n for c in cls.__mro__ for n, v in vars(c).items() if isinstance(v, property)}
        cls.__jit_unused_properties__ = sorted(names)  # type: ignore[attr-defined]

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script calls this on every module before it compiles anything.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(self._refusal("torch.jit.script"))

    def refuse_tracing(self) -> None:
        """Raise an error under torch.jit.trace; layers call this first in their forward pass."""
        if torch.jit.is_tracing():
            raise RuntimeError(self._refusal("torch.jit.trace"))

    def _refusal(self, function: str) -> str:
        return (
            f"{function}: a model with {type(self).__name__} layers has no TorchScript form; use "
            "torch.compile or torch.export on the layer, or a dense model (--moe-freq 0)"
        )
