"""What fairseq needs to read its configuration by today's Hydra without a page of warnings."""

import logging
from typing import Any

import hydra
from fairseq.dataclass import utils
from omegaconf import DictConfig, OmegaConf

from fairseq_evomoe.compat.patching import patch


@patch(utils, "initialize", test="tests/test_compat.py")
def initialize_by_its_present_name(original: Any) -> Any:
    """Open fairseq's configuration by `hydra.initialize`; the old name warns at every command."""

    # commands that do not set up logging would print its internals
    logging.getLogger("hydra").setLevel(logging.INFO)

    def initialize(config_path: str | None = None) -> Any:
        # the path is relative to the file of the caller, one frame further away
        return hydra.initialize(config_path=config_path, version_base="1.1", caller_stack_depth=2)

    return initialize


@patch(utils, "compose", test="tests/test_compat.py")
def compose_by_its_present_name(original: Any) -> Any:
    """Compose it by `hydra.compose`, and leave its structure open as fairseq asks."""

    def compose(name: str, overrides: list[str], strict: bool | None = None) -> DictConfig:
        found = hydra.compose(name, overrides=overrides)
        if strict is not None:
            OmegaConf.set_struct(found, strict)
        return found

    return compose
