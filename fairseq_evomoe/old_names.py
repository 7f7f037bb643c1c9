"""Flags of version 0.1.0 under the names and values of today.

Version 0.1.0 named some flags differently, and wrote "automatic", "no limit" and "never" as -1 or
0. Its command lines still work, with a warning, and its checkpoints are read as they are. This file
goes away in version 0.3.0, except for `upgrade_flags`.
"""

import logging
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from omegaconf import DictConfig, open_dict

logger = logging.getLogger(__name__)

NEW_NAMES = {
    "expert_type": "moe_expert_type",
    "moe_distill_dim": "stable_distill_dim",
    "moe_distill_loss_wt": "stable_distill_loss_wt",
}
"""Old name of a field -> its name today."""

UNSET = {
    "moe_expert_ffn_dim": (0,),
    "moe_capacity_factor": (0,),
    "dts_max_experts": (0,),
    "expert_parallel_size": (0,),
    "evo_spawn_update": (-1,),
    "dts_anneal_updates": (-1,),
    "dts_hard_update": (-1,),
    "stable_freeze_update": (-1,),
    "decoder_input_dim": (0,),
    "decoder_output_dim": (0,),
}
"""Field -> the values by which version 0.1.0 said what leaving the flag out says today."""

NEVER = ("dts_hard_update", "stable_freeze_update")
"""Fields in which version 0.1.0 wrote "never" as 0."""

BEYOND_ANY_TRAINING = 2**31 - 1
"""An update that no training reaches."""


def flag_of(name: str) -> str:
    """The flag of a field: "moe_freq" -> "--moe-freq"."""
    return "--" + name.replace("_", "-")


def warn_of_old_names(words: Iterable[str]) -> None:
    """Log which old names a command line uses, and what they are called today."""
    given = {word.split("=")[0] for word in words}
    for old, new in NEW_NAMES.items():
        if flag_of(old) in given:
            logger.warning(
                "%s is the old name of %s and will go away in version 0.3.0",
                *(flag_of(old), flag_of(new)),
            )


def upgrade_values(flags: Any, *, warn: bool = False) -> None:
    """Replace the special values -1 and 0 of version 0.1.0 in a configuration, in place.

    Args:
        flags: a Namespace, DictConfig, dataclass or mapping; fields that it lacks are left out.
        warn: whether to log each replacement, since the user has typed the old value.
    """
    for name, old_values in UNSET.items():
        value = read_flag(flags, name)
        if value in old_values and value is not False:
            if warn:
                logger.warning(
                    "%s %s: this value of version 0.1.0 means today that the flag is left out",
                    *(flag_of(name), value),
                )
            _set(flags, name, None)
    for name in NEVER:
        if read_flag(flags, name) == 0:
            if warn:
                logger.warning(
                    "%s 0: this value of version 0.1.0 meant never; today an update beyond "
                    "--max-update does",
                    flag_of(name),
                )
            _set(flags, name, BEYOND_ANY_TRAINING)
    capacity = read_flag(flags, "moe_capacity_factor")
    if read_flag(flags, "moe_gate") == "expert_choice" and capacity is not None:
        if warn:
            logger.warning(
                "--moe-capacity-factor %s: with --moe-gate expert_choice this flag of version "
                "0.1.0 is --moe-choice-experts today",
                capacity,
            )
        _set(flags, "moe_choice_experts", capacity)
        _set(flags, "moe_capacity_factor", None)


def upgrade_flags(flags: Any) -> None:
    """Bring the flags in a checkpoint of version 0.1.0 up to date, in place; others stay."""
    if flags is None:
        return
    old = {name: read_flag(flags, name) for name in NEW_NAMES}
    for name, value in old.items():
        if value is not None:
            _set(flags, NEW_NAMES[name], value)
            _delete(flags, name)
    upgrade_values(flags)


def upgrade_checkpoint(state: Mapping[str, Any]) -> None:
    """Bring all flags in a checkpoint of version 0.1.0 up to date, in place."""
    cfg = state.get("cfg") or {}
    for part in ("model", "task", "criterion"):
        upgrade_flags(cfg.get(part))


def read_flag(flags: Any, name: str, default: Any = None) -> Any:
    """Read one of a checkpoint's flags from a Namespace or a mapping."""
    if isinstance(flags, MutableMapping):
        return flags.get(name, default)
    return getattr(flags, name, default)


def _set(flags: Any, name: str, value: Any) -> None:
    with _open(flags):
        if isinstance(flags, MutableMapping):
            flags[name] = value
        else:
            setattr(flags, name, value)


def _delete(flags: Any, name: str) -> None:
    with _open(flags):
        if isinstance(flags, MutableMapping):
            del flags[name]
        else:
            delattr(flags, name)


def _open(flags: Any) -> AbstractContextManager[Any]:
    return open_dict(flags) if isinstance(flags, DictConfig) else nullcontext()
