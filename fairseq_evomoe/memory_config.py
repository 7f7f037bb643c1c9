"""The flags of look-up layers, `--memory-*`, as a dataclass; what a model is, as in `config.py`."""

import math
from dataclasses import dataclass
from typing import Self

from fairseq_evomoe.config import Flags, option


@dataclass
class MemoryConfig(Flags):
    """Where look-up layers stand in for linear ones (MemoryFormer), and what they are."""

    memory_ffn: bool = option(False, "look-up layers in the place of dense feed-forward networks")
    memory_attention: bool = option(False, "look-up layers in the place of attention's projections")
    memory_layers: str = option(
        "all", "which layers of encoder and decoder they are in: all, or numbers from 0 like 0,2,3"
    )
    memory_bits: int = option(8, "values hashed to one row, tau: a table has 2^tau rows")
    memory_delta: int = option(2, "more bits in the second look-up of a memory FFN")
    memory_score: str = option(
        "prob", "weight of a row: prob (the paper), abs_prob (the official code) or l1"
    )
    memory_temperature: float = option(1.0, "temperature of the scores prob and abs_prob")
    memory_norm: str = option("layer", "normalisation inside: layer (LayerNorm) or rms (RMSNorm)")
    memory_out_proj: str = option(
        "none", "output projection of memory attention: none (the paper), dense or memory"
    )
    memory_lr_scale: float = option(
        3.0, "learning rate of the tables, in units of --lr, under Adam"
    )
    memory_tables: str = option(
        "trained",
        "storage of tables: trained, or bf16 or int8 as evomoe-export --tables has them",
    )
    memory_weight_decay: float = option(
        0.0, "weight decay of the tables, instead of --weight-decay"
    )

    def layers(self) -> set[int] | None:
        """Numbers of the layers with look-ups; None: all."""
        if self.memory_layers == "all":
            return None
        return {int(n) for n in self.memory_layers.split(",")}

    def at(self, index: int) -> bool:
        """Whether layer `index` (from 0) has look-ups, of attention or of the FFN."""
        chosen = self.layers()
        return chosen is None or index in chosen

    def check(self) -> Self:
        """Refuse what cannot work, before anything is built.

        Raises:
            ValueError: names the flag and the fix.
        """
        listed = all(n.strip().isdigit() for n in self.memory_layers.split(","))
        self.need(
            listed or self.memory_layers == "all", "--memory-layers", "give all, or numbers: 0,2,3"
        )
        self.need(
            1 <= self.memory_bits <= 16, "--memory-bits", "choose 1 to 16 (tables of 2 to 65536)"
        )
        self.need(
            0 <= self.memory_delta <= 16 - self.memory_bits,
            "--memory-delta",
            f"with --memory-bits {self.memory_bits} choose 0 to {16 - self.memory_bits}",
        )
        for flag, allowed in (
            ("--memory-score", ("prob", "abs_prob", "l1")),
            ("--memory-norm", ("layer", "rms")),
            ("--memory-tables", ("trained", "bf16", "int8")),
            ("--memory-out-proj", ("none", "dense", "memory")),
        ):
            self.need(self.given(flag) in allowed, flag, f"choose {', '.join(allowed)}")
        for flag in ("--memory-temperature", "--memory-lr-scale"):
            self.need(0 < self.given(flag) < math.inf, flag, "must be a number > 0")
        self.need(
            0 <= self.memory_weight_decay < math.inf, "--memory-weight-decay", "must be 0 or more"
        )
        return self
