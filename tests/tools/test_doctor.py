"""tools/doctor.py: what works here, what is missing, and what to do about it."""

import pytest
import torch
from conftest import DEVICE

from fairseq_evomoe.kernels import backend, self_check
from fairseq_evomoe.kernels.experts import few_rows
from fairseq_evomoe.tools import doctor

pytestmark = pytest.mark.slow


def test_this_installation_is_well(capsys):
    """Every line is good here, and the training through all stages has the expected loss."""
    doctor.main([])
    lines = capsys.readouterr().out.splitlines()
    assert not [x for x in lines if x.startswith("BAD")]
    for start in (
        f"ok  torch: {torch.__version__}",
        "ok  fairseq.data.data_utils_fast: compiled",
        "ok  processor: ",
        "ok  look-ups on CPUs: built, for ",
        "ok  experts for few tokens: built, for ",
        "ok  attention and loss: built, for ",
        "ok  float32 products: by ",
        "ok  training, 20 updates: loss ",
    ):
        assert any(x.startswith(start) for x in lines), start


def test_what_is_missing_comes_with_advice(monkeypatch, capsys):
    """What not everybody needs is no error: a compiler, pictures, a GPU."""
    monkeypatch.setattr(few_rows, "unavailable", lambda: "no C++ compiler\nmore")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    real = doctor.version

    def version(name):
        if name == "matplotlib":
            raise doctor.PackageNotFoundError
        return real(name)

    monkeypatch.setattr(doctor, "version", version)
    doctor.main(["--no-training"])
    said = capsys.readouterr().out
    assert "--  C++ compiler: none\n      -> install one" in said
    assert "--  experts for few tokens: no C++ compiler\n      -> torch serves instead" in said
    assert "--  matplotlib: not installed\n      -> pictures and pages" in said


def test_what_everybody_needs_is_an_error(monkeypatch, capsys):
    """A wrong loss, or a package that nothing works without, ends with exit status 1."""
    monkeypatch.setattr(doctor, "EXPECTED", 3.0)
    with pytest.raises(SystemExit) as error:
        doctor.main([])
    assert error.value.code == 1
    out, err = capsys.readouterr()
    assert "BAD training, 20 updates: loss " in out and "-> report this" in out
    assert "evomoe-doctor: 1 thing that every user needs did not work" in err


def test_kernels_for_gpus(triton_can, monkeypatch):
    """Each kernel's self-check has a line. It runs on a GPU if there is one, otherwise in Triton's
    interpreter; a kernel that fails comes with advice."""
    monkeypatch.setattr(self_check, "_FOUND", {})
    device = "cuda:0" if DEVICE == "cuda" else "cpu"
    with backend.use("" if DEVICE == "cuda" else "triton"):
        found = {f.what: f for f in doctor.checked_kernels(device)}
    assert {"gate, float32", "routing sums, float32", "experts, fused, bfloat16"} <= set(found)
    assert any(name.startswith("look-up, Triton") for name in found)
    assert not any(f.advice for f in found.values())
    key = ("gate", torch.device(device), torch.float32)
    monkeypatch.setitem(self_check._FOUND, key, "it failed")
    with backend.use("torch"):
        lines = [str(f) for f in doctor.checked_kernels(device)]
    assert any(x.startswith("--  gate, float32: it failed\n      -> torch serves") for x in lines)
