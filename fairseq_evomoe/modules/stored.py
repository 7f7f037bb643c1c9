"""How layers with large weights keep them: in large pages, and in int8 for inference."""

from collections.abc import Callable
from typing import ClassVar, Self

from torch import Tensor

from fairseq_evomoe.kernels.pages import large_pages
from fairseq_evomoe.modules.torchscript import NotScriptable


class StoredWeights(NotScriptable):
    """Base class of layers whose weights are read row by row.

    On a CPU the weights lie in large pages, in which random rows are found faster.

    Attributes:
        large: names of these weights, parameters or buffers.
        scales: names of the buffers that hold the scales of int8 rows; a scale may be None.
    """

    large: ClassVar[tuple[str, ...]] = ()
    scales: ClassVar[tuple[str, ...]] = ()

    def use_large_pages(self) -> None:
        """Move the weights to large pages, for example after they were created."""
        for name in self.large:
            large_pages(getattr(self, name), now=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast as torch does, but keep the scales of int8 rows in float32."""
        exact = {name: self._buffers.get(name) for name in self.scales}
        super()._apply(fn, recurse)
        for name, scale in exact.items():
            moved = self._buffers.get(name)
            if scale is not None and moved is not None:
                self._buffers[name] = scale.to(moved.device)
        self.use_large_pages()
        return self
