"""The flags of look-up layers, `--memory-*`, as a dataclass that belongs to the models."""

import math
from dataclasses import dataclass
from typing import Optional, Self

from fairseq.dataclass.constants import StrEnum

from fairseq_evomoe.options import Flags, option


class Score(StrEnum):
    """Values of `--memory-score`."""

    prob = "prob"
    abs_prob = "abs_prob"
    l1 = "l1"


class Norm(StrEnum):
    """Values of `--memory-norm`."""

    layer = "layer"
    rms = "rms"


class OutputProjection(StrEnum):
    """Values of `--memory-out-proj`."""

    none = "none"
    dense = "dense"
    memory = "memory"


class TableStorage(StrEnum):
    """Values of `--memory-tables`."""

    trained = "trained"
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


@dataclass
class MemoryConfig(Flags):
    """Where look-up layers replace linear layers (MemoryFormer), and how they are built."""

    memory_ffn: bool = option(False, "replace dense feed-forward networks by look-up layers")
    memory_parallel: bool = option(
        False,
        "put one look-up beside the feed-forward networks of --memory-ffn, which stay, instead of "
        "two in their place",
    )
    memory_attention: bool = option(False, "replace the projections of attention by look-up layers")
    memory_layers: str = option(
        "all", "which layers of encoder and decoder use look-ups: all, or numbers from 0 like 0,2,3"
    )
    memory_bits: int = option(
        8, "number of values hashed to one row (tau in the paper); a table has 2^tau rows"
    )
    memory_delta: int = option(2, "number of additional bits in the second look-up of a memory FFN")
    memory_ffn_embed_dim: Optional[int] = option(
        None,
        "hidden width of a memory FFN; with more of it, the second look-up has more tables "
        "(default: bits + delta for each table of the first look-up, as in the paper)",
    )
    memory_score: Score = option(
        "prob", "how a row is weighted: prob (the paper), abs_prob (the official code) or l1"
    )
    memory_temperature: float = option(1.0, "temperature of the scores prob and abs_prob")
    memory_norm: Norm = option(
        "layer", "normalisation between look-ups: layer (LayerNorm) or rms (RMSNorm)"
    )
    memory_out_proj: OutputProjection = option(
        "none", "output projection of memory attention: none (the paper), dense or memory"
    )
    memory_lr_scale: float = option(3.0, "learning rate of the tables relative to --lr, under Adam")
    memory_linear: bool = option(
        False,
        "give each table a linear part that learns from every token; for inference it is added to "
        "the rows and costs nothing",
    )
    memory_straight_through: bool = option(
        False, "let the signs of --memory-linear pass a straight-through gradient to the input"
    )
    memory_spawn_update: int = option(
        0,
        "update at which layers that are dense until then become look-ups, with tables fitted to "
        "them; 0 means look-ups from the start",
    )
    memory_dropout: float = option(
        0.0, "probability that a token does not read a table during training (abs_prob and l1)"
    )
    memory_ngram: int = option(
        0,
        "add a row that is found by the ids of the last so many tokens to the input of the layers, "
        "on both sides; 2 to 4, or 0 for none",
    )
    memory_ngram_rows: int = option(65536, "number of rows of the n-gram tables")
    memory_ngram_mapped: bool = option(
        False,
        "leave the n-gram tables in the checkpoint's file and read the rows that are needed from "
        "there, as evomoe-export --ngrams mapped writes them",
    )
    memory_tables: TableStorage = option(
        "trained",
        "how tables are stored: trained, or fp32, bf16 or int8 as evomoe-export --tables writes "
        "them",
    )
    memory_weight_decay: float = option(
        0.0, "weight decay of the tables, used instead of --weight-decay"
    )

    def layers(self) -> set[int] | None:
        """Return the numbers of the layers with look-ups, or None if all layers have them."""
        if self.memory_layers == "all":
            return None
        return {int(n) for n in self.memory_layers.split(",")}

    def covers(self, index: int) -> bool:
        """Return whether layer `index` (from 0) has look-ups, in attention or in the FFN."""
        chosen = self.layers()
        return chosen is None or index in chosen

    def hidden_width(self, width: int) -> int:
        """Return the hidden width of a memory FFN whose input has this width."""
        wide = self.memory_bits + self.memory_delta
        return self.memory_ffn_embed_dim or wide * -(-width // self.memory_bits)

    def check(self) -> Self:
        """Refuse values that cannot work, before anything is built.

        Raises:
            ValueError: the message names the flag and the fix.
        """
        listed = all(n.strip().isdigit() for n in self.memory_layers.split(","))
        self.need(
            listed or self.memory_layers == "all",
            "--memory-layers",
            "give all, or layer numbers such as 0,2,3",
        )
        self.need(
            1 <= self.memory_bits <= 16, "--memory-bits", "choose 1 to 16 (tables of 2 to 65536)"
        )
        self.need(
            0 <= self.memory_delta <= 16 - self.memory_bits,
            "--memory-delta",
            f"with --memory-bits {self.memory_bits} choose 0 to {16 - self.memory_bits}",
        )
        self.need(
            self.memory_ffn_embed_dim is None or self.memory_ffn_embed_dim >= 1,
            "--memory-ffn-embed-dim",
            "must be 1 or more",
        )
        self.need_choice("--memory-score", Score)
        self.need_choice("--memory-norm", Norm)
        self.need_choice("--memory-tables", TableStorage)
        self.need_choice("--memory-out-proj", OutputProjection)
        for flag in ("--memory-temperature", "--memory-lr-scale"):
            self.need(0 < self.given(flag) < math.inf, flag, "must be a number > 0")
        self.need(
            self.memory_linear or not self.memory_straight_through,
            "--memory-straight-through",
            "it is the gradient of the linear part: give --memory-linear too",
        )
        self.need(
            self.memory_tables == "trained" or not self.memory_linear,
            "--memory-tables",
            "converted tables have no linear part: leave out --memory-linear",
        )
        self.need(self.memory_spawn_update >= 0, "--memory-spawn-update", "must be 0 or more")
        if self.memory_spawn_update:
            self.need(
                self.memory_linear,
                "--memory-spawn-update",
                "the linear part is the dense layer that tables grow from: give --memory-linear",
            )
            self.need(
                not self.memory_parallel,
                "--memory-spawn-update",
                "look-ups beside dense layers replace nothing: leave out --memory-parallel",
            )
            self.need(
                not self.memory_attention or self.memory_out_proj != "none",
                "--memory-spawn-update",
                "dense attention has an output projection: give --memory-out-proj dense or memory",
            )
        self.need(
            self.memory_ffn or not self.memory_parallel,
            "--memory-parallel",
            "says where the look-ups of --memory-ffn are: give that flag too",
        )
        self.need(
            self.memory_ngram in (0, 2, 3, 4), "--memory-ngram", "choose 2, 3 or 4, or 0 for none"
        )
        self.need(self.memory_ngram_rows >= 1, "--memory-ngram-rows", "must be 1 or more")
        self.need(
            self.memory_tables != "trained" or not self.memory_ngram_mapped,
            "--memory-ngram-mapped",
            "tables in training lie in memory: evomoe-export --ngrams mapped converts a checkpoint",
        )
        self.need(0 <= self.memory_dropout < 1, "--memory-dropout", "must be from 0 to below 1")
        self.need(
            self.memory_dropout == 0 or self.memory_score != "prob",
            "--memory-dropout",
            "needs a score that can be 0: give --memory-score abs_prob or l1",
        )
        self.need(
            0 <= self.memory_weight_decay < math.inf, "--memory-weight-decay", "must be 0 or more"
        )
        return self
