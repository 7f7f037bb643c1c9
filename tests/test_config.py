"""config.py: placement of MoE layers, and flags that are refused before anything is built."""

from argparse import Namespace

import pytest
from omegaconf import OmegaConf

from fairseq_evomoe.config import MoEConfig
from fairseq_evomoe.modules.gates import GATES

GOOD = {"moe_freq": 2, "moe_expert_count": 4}


def test_every_second_layer_and_the_larger_frequency():
    """Layer i is MoE iff the frequency divides i + 1; a side's own flag wins if it is larger."""
    cfg = MoEConfig(moe_freq=2, decoder_moe_freq=3)
    assert [cfg.is_moe_layer("encoder", i) for i in range(4)] == [False, True, False, True]
    assert [cfg.is_moe_layer("decoder", i) for i in range(4)] == [False, False, True, False]
    assert not MoEConfig().is_moe_layer("encoder", 0)


@pytest.mark.parametrize("make", [lambda d: Namespace(**d), OmegaConf.create])
def test_reads_namespace_and_dictconfig(make):
    """The flags are read from a Namespace (command line) and from a DictConfig (hydra) alike."""
    cfg = MoEConfig.from_args(make({"moe_freq": 3, "encoder_moe_freq": 1, "dropout": 0.1}))
    assert (cfg.moe_freq, cfg.encoder_moe_freq, cfg.moe_gate) == (3, 1, "dts")


def test_threshold_is_relative_unless_parity():
    assert MoEConfig(**GOOD).threshold == pytest.approx(0.2 / 4)
    parity = MoEConfig(**GOOD, dts_parity=True, dts_combine="raw")
    assert parity.noise == "gumbel" and MoEConfig(**GOOD).noise == "annealed"
    assert parity.check(GATES).threshold == 0.001


@pytest.mark.parametrize(
    "change, flag",
    [
        ({"moe_freq": -1}, "--moe-freq"),
        ({"moe_expert_count": 0}, "--moe-expert-count"),
        ({"moe_expert_ffn_dim": -5}, "--moe-expert-ffn-dim"),
        ({"moe_gate": "oracle"}, "--moe-gate oracle"),
        ({"moe_gate": "topk", "moe_top_k": 5}, "--moe-top-k 5"),
        ({"moe_gate_init_std": -1.0}, "--moe-gate-init-std"),
        ({"dts_threshold": -0.1}, "--dts-threshold"),
        ({"dts_threshold": 4.0}, "--dts-threshold"),
        ({"dts_max_experts": 9}, "--dts-max-experts"),
        ({"dts_top_k": 0}, "--dts-top-k"),
        ({"dts_combine": "sum"}, "--dts-combine"),
        ({"dts_noise": "loud"}, "--dts-noise"),
        ({"dts_parity": True, "dts_combine": "renorm"}, "--dts-combine renorm"),
        ({"dts_parity": True, "dts_combine": "raw", "dts_top_k": 2}, "--dts-top-k"),
        ({"dts_parity": True, "dts_max_experts": 2}, "--dts-max-experts 2"),
        ({"dts_parity": True, "dts_noise": "annealed"}, "--dts-noise annealed"),
        ({"moe_eval_capacity_token_fraction": 0.25}, "--moe-eval-capacity-token-fraction"),
        ({"moe_gate": "topk", "moe_top1_expert": True}, "--moe-top1-expert"),
        ({"moe_gate": "switch", "moe_capacity_factor": -1.0}, "--moe-capacity-factor -1"),
        ({"moe_gate": "gshard", "moe_second_expert_policy": "best"}, "--moe-second-expert-policy"),
        ({"moe_gate": "gshard", "moe_expert_count": 1}, "--moe-expert-count 1"),
        ({"moe_gate": "hash", "moe_hash_mapping": "magic"}, "--moe-hash-mapping magic"),
        ({"moe_gate": "hash", "moe_balance_bias": 0.1}, "--moe-balance-bias 0.1"),
        ({"moe_gate": "switch", "moe_balance_bias": -0.1}, "--moe-balance-bias -0.1"),
        ({"moe_gate": "stable", "stable_distill_dim": 0}, "--stable-distill-dim 0"),
        ({"moe_gate": "expert_choice", "moe_choice_group": "all"}, "--moe-choice-group all"),
        ({"moe_gate": "expert_choice", "moe_choice_experts": 9.0}, "--moe-choice-experts 9"),
    ],
    ids=str,
)
def test_bad_flags_name_themselves(change, flag):
    """Each impossible value is refused with the flag's name in the message."""
    with pytest.raises(ValueError, match=flag):
        MoEConfig(**{**GOOD, **change}).check(GATES)


def test_flags_of_the_older_branch():
    """Flags of the older branch are accepted if possible; --moe-top1-expert selects switch."""
    cfg = MoEConfig(
        **GOOD,
        moe_top1_expert=True,
        moe_gating_use_fp32=True,
        use_moe_pad_mask=True,
        moe_eval_capacity_token_fraction=-1.0,
    )
    assert cfg.check(GATES).moe_gate == "switch"
