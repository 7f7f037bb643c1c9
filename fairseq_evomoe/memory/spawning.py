"""Parts of a model that are dense at first and become look-ups in the middle of a training."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fairseq_evomoe.modules.records import with_zero_grads


class Spawning(nn.Module):
    """Base class of such parts. A part that was never dense has no state of this.

    Attributes:
        was_dense: whether the part was dense at the start of the training.
        is_dense: whether it still is.
        spawned: whether it has become a look-up, as a buffer, scalar bool, so that a checkpoint
            knows it; only a part that was dense has it.
    """

    was_dense = False
    is_dense = False
    spawned: Tensor

    def begin_dense(self) -> None:
        """Be dense from the start, until `become_look_up`."""
        self.was_dense = True
        self.register_buffer("spawned", torch.zeros((), dtype=torch.bool))
        self._set_dense(True)

    def become_look_up(self) -> None:
        """Compute by look-ups from now on; the tables are filled by the caller."""
        self.spawned.fill_(True)
        self._set_dense(False)

    def _set_dense(self, is_dense: bool) -> None:
        self.is_dense = is_dense

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.was_dense:
            self._set_dense(not bool(self.spawned))


def with_grads_of_idle(y: Tensor, *idle: Tensor | None) -> Tensor:
    """Return y; with several workers, give parameters that do not take part a gradient of zero.

    On one worker they have no gradient, so that the optimizer leaves them alone and steps them from
    the moment of the change on like new ones. With several, DDP demands one.
    """
    parameters = [p for p in idle if p is not None]
    if torch.is_grad_enabled() and dist.is_initialized() and dist.get_world_size() > 1:
        # a copy, because fairseq's attention scales its queries in place
        return with_zero_grads(y, *parameters).clone()
    return y
