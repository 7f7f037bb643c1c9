"""kernels/transformer/matmul.py: float32 products on CPUs by torch's library or by oneDNN."""

import threading

import pytest
import torch

from fairseq_evomoe.kernels.transformer import matmul
from fairseq_evomoe.kernels.transformer.matmul import Measured, by_onednn, choose, measure, products


@pytest.fixture(autouse=True)
def unchosen(monkeypatch, tmp_path):
    """No choice has been made in this process or on this machine yet, and none is left behind."""
    monkeypatch.setenv("EVOMOE_CACHE", str(tmp_path / "cache"))
    choose.cache_clear()
    yield
    choose.cache_clear()


def test_the_setting_holds_inside_alone():
    """Blocks nest, the setting ends with the last of them, an error included."""
    before = torch.get_float32_matmul_precision()
    with products("torch"):
        assert not by_onednn() and torch.get_float32_matmul_precision() == before
    with products("onednn"), products("onednn"):
        assert by_onednn() and torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(KeyError), products("onednn"):
        raise KeyError
    assert not by_onednn() and torch.get_float32_matmul_precision() == before


def test_blocks_of_two_threads():
    """The setting stays until the last thread leaves its block."""
    inside, leave = threading.Event(), threading.Event()

    def other():
        with products("onednn"):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with products("onednn"):
        thread.start()
        inside.wait(10)
    assert by_onednn() and torch.get_float32_matmul_precision() == "medium"
    leave.set()
    thread.join()
    assert not by_onednn() and torch.get_float32_matmul_precision() == "highest"


def test_the_measurement():
    """It compares real products, and torch's own are as exact as float32 can be."""
    found = measure(64, 3)
    assert found.gain > 0 and found.error > 0
    assert not by_onednn()


@pytest.mark.parametrize(
    ("found", "way"),
    [
        (Measured(2.0, 1.1), "onednn"),
        (Measured(1.05, 1.1), "torch"),  # the gain is too small
        (Measured(4.0, 2000.0), "torch"),  # rounded to bfloat16
    ],
)
def test_auto_takes_what_is_fast_and_exact(found, way, monkeypatch, caplog):
    """A faster way that is less exact is never taken, and one log line says what was measured."""
    monkeypatch.setattr(matmul, "measure", lambda: found)
    with caplog.at_level("INFO"):
        assert choose("auto") == choose("auto") == way
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"float32 products on this CPU: {way} ") and "--cpu-matmul" in line


def test_forced_ways(monkeypatch):
    """A forced way is not measured; oneDNN needs a torch that has it."""
    monkeypatch.setattr(matmul, "measure", lambda: 1 / 0)
    assert [choose(way) for way in matmul.WAYS] == list(matmul.WAYS)
    choose.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose("auto") == "torch"
    with pytest.raises(ValueError, match="--cpu-matmul onednn"):
        choose("onednn")


def test_every_process_chooses_the_same(monkeypatch, tmp_path):
    """What was measured first holds: a run that is resumed makes its products as before."""
    monkeypatch.setattr(matmul, "measure", lambda: Measured(1.21, 1.0))
    assert choose("auto") == "onednn"
    choose.cache_clear()
    monkeypatch.setattr(matmul, "measure", lambda: Measured(1.19, 1.0))
    assert choose("auto") == "onednn"
    choose.cache_clear()
    monkeypatch.setattr(matmul, "_processor", lambda: "another")
    assert choose("auto") == "torch"
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # figures that are damaged are measured anew; where nothing can be kept, nothing is
    choose.cache_clear()
    for path in (tmp_path / "cache").iterdir():
        path.write_text("{")
    assert choose("auto") == "torch"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOMOE_CACHE", str(tmp_path / "file/cache"))
    choose.cache_clear()
    assert choose("auto") == "torch"
