"""recipes/*/evomoe.yaml: fairseq-hydra-train and the shell recipe build the same configuration."""

import shlex
import sys

import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental import compose, initialize_config_dir
from omegaconf import OmegaConf
from recipe_kit import recipe

RECIPES = ("wmt14_en_de", "wmt14_en_fr", "wmt17_en_de", "iwslt14_de_en", "multi30k")
PATHS = {"data", "user_dir", "save_dir", "no_progress_bar"}


def from_shell(name, folder):
    """The configuration that fairseq-train makes of the flags that the recipe prints."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    printed = recipe(name, "--model", "evomoe", "--print", "--out", folder).splitlines()[-1]
    words = shlex.split(printed)[1:]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    return convert_namespace_to_omegaconf(args)


def from_yaml(name):
    """The configuration that fairseq-hydra-train makes of the recipe's YAML."""
    from fairseq.dataclass.initialize import add_defaults, hydra_init

    hydra_init()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(ROOT / "recipes" / name)):
        cfg = compose("config")
        own = OmegaConf.load(ROOT / "recipes" / name / "evomoe.yaml")
        OmegaConf.set_struct(cfg, False)
        cfg = OmegaConf.merge(cfg, own)
    add_defaults(cfg)
    return cfg


@pytest.mark.parametrize("name", RECIPES)
def test_both_build_the_same_configuration(name, tmp_path):
    """Every field of every group, and the model that both name with its own flags."""
    shell, yaml = from_shell(name, tmp_path), from_yaml(name)
    groups = ("task", "criterion", "optimizer", "lr_scheduler", "optimization", "dataset")
    for group in (*groups, "checkpoint", "common", "distributed_training"):
        ours = OmegaConf.to_container(OmegaConf.create(shell[group]), resolve=False)
        theirs = OmegaConf.to_container(yaml[group], resolve=False)
        for key, value in theirs.items():
            interpolated = isinstance(value, str) and value.startswith("${")
            if key not in PATHS and not interpolated:
                assert ours[key] == value, (group, key)
    flags = OmegaConf.to_container(yaml.model)
    assert flags.pop("_name") == shell.model.arch
    for key, value in flags.items():
        assert getattr(shell.model, key) == value, key
    assert {"dropout", "moe_expert_count", "share_all_embeddings"} <= flags.keys()


def test_a_flag_goes_where_it_belongs():
    """Groups are found by fairseq's own dataclasses; lr becomes a list, betas stay text."""
    sys.path.insert(0, str(ROOT / "recipes"))
    import hydra_config

    words = "--task translation_evomoe --arch transformer_evomoe --optimizer adam --lr 5e-4"
    words += " --adam-betas '(0.9, 0.98)' --criterion moe_cross_entropy --lr-scheduler fixed"
    words += " --evo-spawn-update 3 --max-update 9 --seed 2 --moe-freq 2 --no-epoch-checkpoints"
    found = hydra_config.grouped(hydra_config.parse(shlex.split(words)))
    assert found["task"] == {"_name": "translation_evomoe", "evo_spawn_update": 3}
    assert found["optimization"] == {"lr": [5e-4], "max_update": 9}
    assert found["optimizer"] == {"_name": "adam", "adam_betas": "(0.9, 0.98)"}
    assert found["model"] == {"_name": "transformer_evomoe", "moe_freq": 2}
    assert found["common"] == {"seed": 2} and found["checkpoint"] == {"no_epoch_checkpoints": True}
