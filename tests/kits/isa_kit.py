"""A fixture for tests of the C++ kernels: once for every instruction set that the machine has."""

import pytest
import torch

from fairseq_evomoe.kernels import native


def every_isa(module, op):
    """The fixture `isa`: `module.isa` names one set after the other.

    Args:
        module: the module in front of the kernels, with `unavailable` and `isa`.
        op: name of the op that returns the best set of the machine.
    """

    @pytest.fixture(params=native.ISAS)
    def isa(request, monkeypatch):
        assert not module.unavailable()
        number = native.ISAS.index(request.param)
        if number > getattr(torch.ops.evomoe, op)():
            pytest.skip(f"this machine has no {request.param}")
        monkeypatch.setattr(module, "isa", lambda: number)

    return isa
