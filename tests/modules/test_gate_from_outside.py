"""A gate of a user's own: a class outside the package, registered under a name, trains a model."""

import pytest
import torch
from conftest import build, train, train_args, valid_batch
from fairseq import checkpoint_utils

from fairseq_evomoe.modules.gates.base import GATES, ScoreGate, mask_of, register_gate
from fairseq_evomoe.modules.moe_layer import moe_layers
from fairseq_evomoe.modules.plan import RoutingPlan

pytestmark = pytest.mark.slow


class RunnerUpGate(ScoreGate):
    """Each token goes to its second-best expert, with that expert's probability as the weight."""

    flags = (*ScoreGate.flags, "--moe-top-k")

    @classmethod
    def min_experts(cls, cfg):
        return 2

    @classmethod
    def experts_per_token(cls, cfg, stage):
        return 1

    def route(self, logits, phase, tokens):
        probs = logits.softmax(-1)
        second = self.scores(logits).topk(2, dim=-1).indices[:, 1]
        active = mask_of(second, logits.size(1))
        return RoutingPlan(
            weights=probs * active, active=active, probs=probs, logits=logits, max_active=1
        )


@pytest.fixture(autouse=True)
def registered():
    register_gate("runner_up")(RunnerUpGate)
    yield
    del GATES["runner_up"]


def test_a_run_trains_with_it(toy, tmp_path):
    """Losses fall, the metrics count its experts, and the checkpoint loads with its outputs."""
    flags = ("--moe-gate", "runner_up", "--moe-balance-bias", 0.01, "--max-update", 25)
    rows = train(*train_args(toy, tmp_path, *flags))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    assert {row["moe_active_experts"] for row in rows} == {1}
    path = str(tmp_path / "checkpoint_last.pt")
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([path])
    (_name, layer), *_ = moe_layers(model)
    assert isinstance(layer.gate, RunnerUpGate) and layer.gate.bias_steps.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        logits, _ = model(**valid_batch(task)["net_input"])
    assert torch.isfinite(logits).all()


def test_its_own_limits_are_enforced(toy):
    """What the gate says of itself decides which flags are refused."""
    for flags, message in (
        (("--moe-expert-count", 1), "--moe-expert-count 1"),
        (("--moe-capacity-factor", 2), "--moe-capacity-factor 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            build(toy, "--moe-gate", "runner_up", *flags)


def test_a_name_is_taken_once_and_flags_must_exist():
    """A second class under one name, or a flag that does not exist, is refused."""

    class Other(ScoreGate):
        pass

    class Misspelt(ScoreGate):
        flags = ("--moe-topk",)

    with pytest.raises(ValueError, match="--moe-gate runner_up is registered already"):
        register_gate("runner_up")(Other)
    with pytest.raises(ValueError, match="there is no --moe-topk"):
        register_gate("misspelt")(Misspelt)
