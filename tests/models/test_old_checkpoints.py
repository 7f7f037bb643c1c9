"""Checkpoints of version 0.1.0 load, give the outputs that version gave, and continue training.

`version_0_1_0/` holds checkpoints of tiny models on the toy corpus. Their names end with their
number of updates: the experts split after 4, the hard stage begins after 10. `expected.json`
says with which flags they were trained, and what version 0.1.0 itself computed from them.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import USER_DIR, train
from fairseq import checkpoint_utils

FOLDER = Path(__file__).parent / "version_0_1_0"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
CASES = EXPECTED["cases"]


def test_every_stage_of_every_family_is_covered():
    """There is a checkpoint before the split, one after it and one of the hard stage."""
    assert {f"{f}-{n}" for f in ("translation", "lm", "mlm") for n in (2, 8, 12)} <= set(CASES)
    assert {path.stem for path in FOLDER.glob("*.pt")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_version_0_1_0(toy, name):
    """The logits of two sentences, one of them padded, are those that version 0.1.0 gave."""
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(FOLDER / f"{name}.pt")], arg_overrides={"data": str(toy / CASES[name]["data"])}
    )
    model.eval()
    with torch.no_grad():
        if "translation_evomoe" in CASES[name]["flags"]:
            ids = torch.tensor([[4, 9, 7, 5, 2], [1, 1, 8, 6, 2]])
            logits, _ = model(ids, ids.ne(1).sum(1), ids)
        else:
            logits, _ = model(torch.tensor([[4, 9, 7, 5, 2], [8, 6, 2, 1, 1]]))
    found = logits[..., 4:9].flatten()
    assert torch.allclose(found, torch.tensor(CASES[name]["logits"]), atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_training_continues_as_in_version_0_1_0(toy, tmp_path, name):
    """With the flags of that version, the next three updates have the losses of that version."""
    case = CASES[name]
    updates = [n for n, _ in case["updates"]]
    rows = train(
        *(str(toy / case["data"]), "--user-dir", str(USER_DIR)),
        *(*case["flags"], *EXPECTED["common"]),
        *("--restore-file", str(FOLDER / f"{name}.pt"), "--save-dir", str(tmp_path), "--no-save"),
        *("--max-update", str(updates[-1])),
    )
    assert [row["num_updates"] for row in rows] == updates
    for row, (_, loss) in zip(rows, case["updates"], strict=True):
        assert row["loss"] == pytest.approx(loss, abs=2e-3)
