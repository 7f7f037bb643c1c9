"""A recipe's fairseq-train flags as a YAML file for fairseq-hydra-train.

    bash recipes/wmt14_en_de/run.sh --model evomoe --print > flags
    python recipes/hydra_config.py flags > recipes/wmt14_en_de/evomoe.yaml

    fairseq-hydra-train --config-dir recipes/wmt14_en_de --config-name evomoe \\
        task.data=$PWD/work/wmt14_en_de/bin common.user_dir=$PWD/fairseq_evomoe \\
        checkpoint.save_dir=$PWD/work/hydra optimization.max_update=1000 ++common.cpu=true

Paths (`???` in the file) are left to the command line; what the file does not name takes ++ there.
Each flag stands in the group of fairseq's configuration that it
belongs to; what is not given is left to the defaults, which both commands share.
"""

import argparse
import ast
import shlex
import sys
from pathlib import Path
from typing import Any

GROUPS = (
    *("task", "model", "criterion", "optimizer", "lr_scheduler"),
    *("optimization", "dataset", "checkpoint", "common", "distributed_training"),
)
NAMES = {
    "task": "task",
    "arch": "model",
    "criterion": "criterion",
    "optimizer": "optimizer",
    "lr_scheduler": "lr_scheduler",
}
PATHS = {"task": "data", "common": "user_dir", "checkpoint": "save_dir"}
"""Group -> the path that the command line gives."""


def parse(flags: list[str]) -> dict[str, Any]:
    """{field: value} of a command line; a flag without a value is True."""
    found: dict[str, Any] = {}
    words = iter(range(len(flags)))
    for i in words:
        if not flags[i].startswith("--"):
            continue
        field = flags[i][2:].replace("-", "_")
        if i + 1 == len(flags) or flags[i + 1].startswith("--"):
            found[field] = True
            continue
        text = flags[next(words)]
        try:
            found[field] = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            found[field] = text
        if isinstance(found[field], tuple):
            # fairseq keeps Adam's betas as text
            found[field] = text
    return found


def grouped(fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{group: {field: value}}, by what fairseq's dataclasses of these names have."""
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    def fields_of(group: str) -> set[str]:
        name = next((fields.get(k) for k, g in NAMES.items() if g == group), None)
        if group == "task":
            cls = TASK_DATACLASS_REGISTRY[name]
        elif group == "model":
            # our models read theirs from the parser: what no other group has is the model's
            return set()
        elif group in REGISTRIES:
            cls = REGISTRIES[group]["dataclass_registry"][name]
        else:
            cls = FairseqConfig.__dataclass_fields__[group].type
        # a field that is interpolated from another group is set there
        own = cls.__dataclass_fields__.values()
        return {f.name for f in own if not str(f.default).startswith("${")}

    known = {group: fields_of(group) for group in GROUPS}
    found: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for field, value in fields.items():
        if field in PATHS.values():
            continue
        if field in NAMES:
            found[NAMES[field]] = {"_name": value} | found[NAMES[field]]
            continue
        home = next((g for g in GROUPS if field in known[g]), "model")
        found[home][field] = [value] if field in ("lr", "update_freq") else value
    for group, field in PATHS.items():
        found[group][field] = "???"
    return {group: values for group, values in found.items() if values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flags", type=Path, help="the command that run.sh --print printed")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from omegaconf import OmegaConf

    import fairseq_evomoe  # noqa: F401

    last = args.flags.read_text(encoding="utf-8").strip().splitlines()[-1]
    groups = grouped(parse(shlex.split(last)))
    print("# @package _group_\n# made by recipes/hydra_config.py from what run.sh --print prints")
    print(OmegaConf.to_yaml(OmegaConf.create(groups)), end="")


if __name__ == "__main__":
    main()
