"""Hashed tables of n-grams: rows that are found by the ids of the last tokens.

Letters: B sentences, L positions, D model width, N rows, K hashes.

A Transformer spends its first layers on joining neighbouring pieces into words. A table that is
read by the ids of the last n tokens has that for the price of one row per token, before any layer
runs. Neither of the two papers has it; see Clark et al., "Canine", arXiv 2103.06874 (hashes), and
arXiv 2601.07372 (n-grams as memory). Each of K hashes reads a K-th of the width from a table of its
own, so that two n-grams seldom share all of their row.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.storage import StoredTables

HASHES = 4
_MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5)
"""Odd constants with well spread bits, those of Weyl sequences and of xxHash; one per hash."""

_STATES: ContextVar[Tensor | None] = ContextVar("ngram_states", default=None)
"""What the tables add to the input of the layers in this forward pass, (B, L, D)."""


def hashed(ids: Tensor, length: int, rows: int, pad: int) -> Tensor:
    """Row numbers of the n-gram that ends at each position: (B, L) int64 -> (K, B, L) int64.

    Positions before the first are padding, and so padding on the left changes nothing.

    Args:
        ids: token ids.
        length: n.
        rows: N.
        pad: id of padding.
    """
    padded = F.pad(ids, (length - 1, 0), value=pad)
    found = []
    for mix in _MIX[:HASHES]:
        # multiplication of int64 wraps around, on every device in the same way
        factor = mix - 2**64 if mix >= 2**63 else mix
        code = torch.zeros_like(ids)
        for back in range(length):
            code = (code ^ padded[:, length - 1 - back : padded.size(1) - back]) * factor
            code = code ^ ((code >> 29) & (2**35 - 1))
        found.append((code & (2**62 - 1)) % rows)
    return torch.stack(found)


class NgramTables(StoredTables):
    """x + sqrt(D) [T_1[h_1], ..., T_K[h_K]], where h_k are hashes of the last n token ids.

    The tables start at 0, so that the model starts as one without them. The factor sqrt(D) is that
    of fairseq's token embeddings, whose learning rate the tables therefore share.

    Args:
        width: D.
        cfg: the flags.
        pad: id of padding.
    """

    def __init__(self, width: int, cfg: MemoryConfig, *, pad: int) -> None:
        super().__init__()
        if width % HASHES:
            raise ValueError(
                f"--memory-ngram {cfg.memory_ngram}: a width of {width} cannot be split among "
                f"{HASHES} hashes; give a multiple of {HASHES}"
            )
        self.length, self.pad, self.factor = cfg.memory_ngram, pad, width**0.5
        self.mapped = cfg.memory_ngram_mapped
        shape = (HASHES, cfg.memory_ngram_rows, width // HASHES)
        if self.mapped:
            # one value stands for all until the checkpoint's own tables take its place
            self.store(torch.zeros(1, 1, 1), cfg)
            self.tables = self.tables.expand(shape)
            if self.row_scale is not None:
                self.row_scale = self.row_scale.expand(shape[:2])
        else:
            self.store(torch.zeros(shape), cfg)

    def use_large_pages(self) -> None:
        """Do nothing with mapped tables, which the system would have to read for it."""
        if not self.mapped:
            super().use_large_pages()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.mapped:
            for name in ("tables", "row_scale"):
                found = state_dict.get(prefix + name)
                if found is not None and found.shape == getattr(self, name).shape:
                    # taken as it is; torch then copies it onto itself, which does nothing
                    setattr(self, name, found)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        k, n, w = self.tables.shape
        return f"length={self.length}, hashes={k}, rows={n}, width={k * w}"

    def forward(self, ids: Tensor, *, last: bool = False) -> Tensor:
        """What is added to the states of the positions: (B, L) int64 -> (B, L, D), or (B, 1, D).

        Args:
            ids: token ids from the start of the sentences on.
            last: whether only the last position is wanted, as in incremental decoding.
        """
        self.refuse_tracing()
        self.refuse_training()
        if last:
            ids = ids[:, -self.length :]
        at = hashed(ids, self.length, self.tables.size(1), self.pad)
        if last:
            at = at[..., -1:]
        parts = []
        for k in range(len(at)):
            part = F.embedding(at[k], self.tables[k])
            if self.row_scale is not None:
                part = part * self.row_scale[k][at[k]][..., None]
            parts.append(part)
        return torch.cat(parts, -1) * self.factor


class AddNgrams(nn.Module):
    """Stands in for the dropout of a stack's embedded input, and adds what the tables gave before.

    Args:
        dropout: fairseq's module.
    """

    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        added = _STATES.get()
        return self.dropout(x if added is None else x + added.to(x.dtype), inplace)


@contextmanager
def adding(states: Tensor | None) -> Iterator[None]:
    """Within, `AddNgrams` adds these states (B, L, D) in this thread."""
    token = _STATES.set(states)
    try:
        yield
    finally:
        _STATES.reset(token)
