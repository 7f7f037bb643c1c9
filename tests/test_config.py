"""config.py: where MoE layers stand, and flags that are refused before anything is built."""

from argparse import Namespace

import pytest
from omegaconf import OmegaConf

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates import GATES

GOOD = dict(moe_freq=2, moe_expert_count=4)


def test_every_second_layer_and_the_larger_frequency():
    """Layer i is MoE iff (i + 1) is a multiple; a side's own flag wins when larger."""
    cfg = MoEConfig(moe_freq=2, decoder_moe_freq=3)
    assert [cfg.is_moe_layer("encoder", i) for i in range(4)] == [False, True, False, True]
    assert [cfg.is_moe_layer("decoder", i) for i in range(4)] == [False, False, True, False]
    assert not MoEConfig().is_moe_layer("encoder", 0)


@pytest.mark.parametrize("make", [lambda d: Namespace(**d), OmegaConf.create])
def test_reads_namespace_and_dictconfig(make):
    """fairseq hands over a Namespace from the command line, a DictConfig from hydra."""
    cfg = MoEConfig.from_args(make({"moe_freq": 3, "encoder_moe_freq": 1, "dropout": 0.1}))
    assert (cfg.moe_freq, cfg.encoder_moe_freq, cfg.moe_gate) == (3, 1, "dts")


def test_threshold_is_relative_unless_parity():
    assert MoEConfig(**GOOD).threshold == pytest.approx(0.2 / 4)
    parity = MoEConfig(**GOOD, dts_parity=True, dts_combine="raw", dts_noise="gumbel")
    assert parity.check(GATES).threshold == 0.001


@pytest.mark.parametrize(
    "change, flag",
    [
        (dict(moe_freq=-1), "--moe-freq"),
        (dict(moe_expert_count=0), "--moe-expert-count"),
        (dict(moe_expert_ffn_dim=-5), "--moe-expert-ffn-dim"),
        (dict(moe_gate="oracle"), "--moe-gate oracle"),
        (dict(moe_gate="topk", moe_top_k=5), "--moe-top-k 5"),
        (dict(moe_gate_init_std=-1.0), "--moe-gate-init-std"),
        (dict(dts_threshold=-0.1), "--dts-threshold"),
        (dict(dts_threshold=4.0), "--dts-threshold"),
        (dict(dts_max_experts=9), "--dts-max-experts"),
        (dict(dts_top_k=0), "--dts-top-k"),
        (dict(dts_combine="sum"), "--dts-combine"),
        (dict(dts_noise="loud"), "--dts-noise"),
        (dict(dts_parity=True, dts_combine="renorm"), "--dts-combine renorm"),
        (dict(dts_parity=True), "--dts-noise annealed"),
        (dict(dts_parity=True, dts_combine="raw", dts_top_k=2), "--dts-top-k"),
        (dict(dts_parity=True, dts_combine="raw"), "--dts-noise annealed"),
        (dict(moe_eval_capacity_token_fraction=0.25), "--moe-eval-capacity-token-fraction"),
        (dict(moe_gate="topk", moe_top1_expert=True), "--moe-top1-expert"),
        (dict(moe_gate="switch", moe_capacity_factor=-1.0), "--moe-capacity-factor -1"),
        (dict(moe_gate="gshard", moe_second_expert_policy="best"), "--moe-second-expert-policy"),
        (dict(moe_gate="gshard", moe_expert_count=1), "--moe-expert-count 1"),
        (dict(moe_gate="hash", moe_hash_mapping="magic"), "--moe-hash-mapping magic"),
        (dict(moe_gate="hash", moe_balance_bias=0.1), "--moe-balance-bias 0.1"),
        (dict(moe_gate="switch", moe_balance_bias=-0.1), "--moe-balance-bias -0.1"),
        (dict(moe_gate="stable", moe_distill_dim=0), "--moe-distill-dim 0"),
        (dict(moe_gate="expert_choice", moe_choice_group="all"), "--moe-choice-group all"),
        (dict(moe_gate="expert_choice", moe_capacity_factor=9.0), "--moe-capacity-factor 9"),
    ],
    ids=str,
)
def test_bad_flags_name_themselves(change, flag):
    """Each impossible value is refused with the flag's name in the message."""
    with pytest.raises(ValueError, match=flag):
        MoEConfig(**{**GOOD, **change}).check(GATES)


def test_flags_of_the_older_branch():
    """What can be honoured is: --moe-top1-expert is the switch gate."""
    cfg = MoEConfig(
        **GOOD,
        moe_top1_expert=True,
        moe_gating_use_fp32=True,
        use_moe_pad_mask=True,
        moe_eval_capacity_token_fraction=-1.0,
    )
    assert cfg.check(GATES).moe_gate == "switch"
