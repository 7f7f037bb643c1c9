"""How tables are stored, and how the optimizer knows them."""

from typing import ClassVar

from torch import Tensor, nn

from fairseq_evomoe.kernels.lookup.score import quantise
from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.modules.stored import StoredWeights


def mark_param_group(tables: nn.Parameter, cfg: MemoryConfig) -> None:
    """Mark tables for a parameter group of their own with `--memory-weight-decay`.

    The marks are those of fairseq's composite optimizer, which copies them to fp32 masters.
    `compat.running.own_weight_decay` makes every other optimizer respect them.
    """
    tables.param_group = "memory"  # type: ignore[attr-defined]
    tables.optim_overrides = {  # type: ignore[attr-defined]
        "optimizer": {"weight_decay": cfg.memory_weight_decay}
    }


class StoredTables(StoredWeights):
    """Base class of layers with tables (K, N, H), as `--memory-tables` stores them.

    Attributes:
        tables: a parameter, or a buffer of a smaller dtype for inference.
        converted: whether it is a buffer.
        row_scale: (K, N) float32, the scales of int8 rows, or None.
    """

    large: ClassVar[tuple[str, ...]] = ("tables",)
    scales: ClassVar[tuple[str, ...]] = ("row_scale",)
    tables: Tensor
    row_scale: Tensor | None
    converted: bool

    def store(self, tables: Tensor, cfg: MemoryConfig) -> None:
        """Keep these tables (K, N, H) float32."""
        self.converted = cfg.memory_tables != "trained"
        self.register_buffer("row_scale", None)
        if cfg.memory_tables == "trained":
            self.tables = nn.Parameter(tables)
            mark_param_group(self.tables, cfg)
        elif cfg.memory_tables == "int8":
            small, self.row_scale = quantise(tables)
            self.register_buffer("tables", small)
        else:
            stored = tables.bfloat16() if cfg.memory_tables == "bf16" else tables
            self.register_buffer("tables", stored)
        self.use_large_pages()

    def refuse_training(self) -> None:
        """Stop a training pass whose tables would not learn.

        Raises:
            ValueError: the tables are converted, and this is a pass in training.
        """
        if self.training and self.converted:
            raise ValueError(
                "--memory-tables bf16, fp32 and int8 are for inference; train the checkpoint that "
                "evomoe-export made them from"
            )
