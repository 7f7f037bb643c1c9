"""recipes/*/evomoe.yaml: fairseq-hydra-train and the shell recipe build the same configuration."""

import shlex
import sys

import pytest
from conftest import ROOT, USER_DIR, run, tool
from hydra.core.global_hydra import GlobalHydra
from hydra.experimental import compose, initialize_config_dir
from omegaconf import OmegaConf
from recipe_kit import recipe

PAIRS = ("wmt14_en_de", "wmt14_en_fr", "wmt17_en_de", "iwslt14_de_en", "multi30k")
TEXTS = ("wikitext103", "openwebtext")
RECIPES = [(r, "evomoe", ()) for r in PAIRS]
RECIPES += [(r, t, ("--task", t)) for r in TEXTS for t in ("lm", "mlm")]
"""(recipe, its YAML, further flags of the shell recipe)."""
PATHS = {"data", "user_dir", "save_dir", "no_progress_bar"}


def from_shell(name, folder, *options_):
    """The configuration that fairseq-train builds from the flags that the recipe prints."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    printed = recipe(name, "--model", "evomoe", "--print", "--out", folder, *options_)
    words = shlex.split(printed.splitlines()[-1])[1:]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    return convert_namespace_to_omegaconf(args)


def from_yaml(name, yaml):
    """The configuration that fairseq-hydra-train builds from the recipe's YAML."""
    from fairseq.dataclass.initialize import add_defaults, hydra_init

    hydra_init()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(ROOT / "recipes" / name)):
        cfg = compose("config")
        own = OmegaConf.load(ROOT / "recipes" / name / f"{yaml}.yaml")
        OmegaConf.set_struct(cfg, False)
        cfg = OmegaConf.merge(cfg, own)
    add_defaults(cfg)
    return cfg


@pytest.mark.parametrize(("name", "file", "told"), RECIPES, ids=[f"{r}-{y}" for r, y, _ in RECIPES])
def test_both_build_the_same_configuration(name, file, told, tmp_path):
    """Every field of every group is equal, and so are the model's name and its own flags."""
    shell, yaml = from_shell(name, tmp_path, *told), from_yaml(name, file)
    groups = ("task", "criterion", "optimizer", "lr_scheduler", "optimization", "dataset")
    for group in (*groups, "checkpoint", "common", "distributed_training"):
        ours = OmegaConf.to_container(OmegaConf.create(shell[group]), resolve=False)
        theirs = OmegaConf.to_container(yaml[group], resolve=False)
        for key, value in theirs.items():
            interpolated = isinstance(value, str) and value.startswith("${")
            if key not in PATHS and not interpolated:
                assert ours[key] == value, (group, key)
    flags = OmegaConf.to_container(yaml.model)
    named = "_name" if "_name" in shell.model else "arch"
    assert flags.pop("_name") == getattr(shell.model, named)
    for key, value in flags.items():
        if not str(value).startswith("${"):
            assert getattr(shell.model, key) == value, key
    width = {"evomoe": "share_all_embeddings", "lm": "decoder_layers", "mlm": "encoder_layers"}
    assert {"moe_expert_count", width[file]} <= flags.keys()


@pytest.mark.parametrize(
    ("where", "sides"),
    [
        ("multi30k/evomoe", ("encoder", "decoder")),
        ("wikitext103/lm", ("decoder",)),
        ("wikitext103/mlm", ("encoder",)),
    ],
)
def test_the_files_train(where, sides, toy, tmp_path):
    """fairseq-hydra-train trains each kind of file at small sizes, as hydra_config.py says."""
    name, file = where.split("/")
    sizes = {"embed_dim": 32, "ffn_embed_dim": 64, "layers": 2, "attention_heads": 2}
    data = toy / ("bin" if file == "evomoe" else "mono")
    overrides = {
        **{f"++model.{side}_{k}": v for side in sides for k, v in sizes.items()},
        **{"task.data": data, "common.user_dir": USER_DIR, "checkpoint.save_dir": tmp_path / "s"},
        **{"optimization.max_update": 3, "++common.cpu": "true", "common.log_interval": 1},
        **{"++dataset.num_workers": 0, "hydra.run.dir": tmp_path},
    }
    if file != "evomoe":
        overrides["task.tokens_per_sample"] = 64
    command = (tool("fairseq-hydra-train"), "--config-dir", ROOT / "recipes" / name)
    said = run(*command, "--config-name", file, *(f"{k}={v}" for k, v in overrides.items()))
    said += "".join(p.read_text() for p in tmp_path.glob("*.log"))
    assert "moe_active_experts" in said and (tmp_path / "s/checkpoint_last.pt").exists()
    said = run(*command, "--config-name", file, f"hydra.run.dir={tmp_path}", ok=False)
    assert "user_dir" in said or "data" in said


def test_a_flag_goes_where_it_belongs():
    """Each flag goes to the group whose dataclass has it; lr becomes a list, betas stay text."""
    sys.path.insert(0, str(ROOT / "recipes/steps"))
    import hydra_config

    words = "--task translation_evomoe --arch transformer_evomoe --optimizer adam --lr 5e-4"
    words += " --adam-betas '(0.9, 0.98)' --criterion moe_cross_entropy --lr-scheduler fixed"
    words += " --evo-spawn-update 3 --max-update 9 --seed 2 --moe-freq 2 --no-epoch-checkpoints"
    found = hydra_config.grouped(hydra_config.parse(shlex.split(words)))
    assert found["task"] == {"_name": "translation_evomoe", "evo_spawn_update": 3, "data": "???"}
    assert found["optimization"] == {"lr": [5e-4], "max_update": 9}
    assert found["optimizer"] == {"_name": "adam", "adam_betas": "(0.9, 0.98)"}
    assert found["model"] == {"_name": "transformer_evomoe", "moe_freq": 2}
    assert found["common"] == {"seed": 2, "user_dir": "???"}
    assert found["checkpoint"] == {"no_epoch_checkpoints": True, "save_dir": "???"}
