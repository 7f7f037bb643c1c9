"""Attention, layers and stacks of layers of an exported model.

Modules have the names that they have in fairseq's checkpoint. Letters: B sentences, L positions, S
positions that are attended to, D model width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_evomoe import EvoMoEConfig
from .feed_forward_evomoe import DenseFFN, MoELayer
from .look_up_evomoe import LookUp, LookUpFFN, Ngrams, build_norm
from .routing_evomoe import Routing


class Attention(nn.Module):
    """Attention whose projections are linear maps or look-ups.

    Args:
        kind: "linear" or "memory".
        memory_width: width of what is attended to, for attention over an encoder; None for
            self-attention.
        index: number of the layer, for the cache.
    """

    def __init__(
        self,
        config: EvoMoEConfig,
        kind: str,
        width: int,
        heads: int,
        *,
        memory_width: int | None = None,
        index: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.index, self.dropout = heads, index, config.attention_dropout
        self.cross, into = memory_width is not None, memory_width or width
        self.projects = "dense"
        if kind == "linear":
            self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
            self.k_proj, self.v_proj = nn.Linear(into, width), nn.Linear(into, width)
            return
        memory = config.memory
        bits, self.projects = memory["bits"], memory["out_proj"]
        if self.cross:
            self.q = LookUp(memory, width, width, bits)
            self.kv = LookUp(memory, into, 2 * width, bits)
        else:
            self.qkv = LookUp(memory, width, 3 * width, bits)
        self.out: nn.Module
        if self.projects == "memory":
            self.out_norm = build_norm(memory, width)
            self.out = LookUp(memory, width, width, bits)
        elif self.projects == "dense":
            self.out = nn.Linear(width, width)

    def _queries(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Queries of x, and keys and values if the same look-up gives them."""
        if hasattr(self, "qkv"):
            q, k, v = self.qkv(x).chunk(3, -1)
            return q, (k, v)
        return (self.q(x) if hasattr(self, "q") else self.q_proj(x)), None

    def _keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(self, "kv"):
            k, v = self.kv(x).chunk(2, -1)
            return k, v
        return self.k_proj(x), self.v_proj(x)

    def _split(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, heads, L, D / heads)."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, over: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor:
        """x (B, L, D) attends to itself, or to `over` (B, S, D).

        Args:
            mask: which positions may be seen, broadcast to (B, heads, L, S) bool, or None.
            cache: the keys and values of earlier positions, or None.
        """
        q, joint = self._queries(x)
        store = cache
        if isinstance(cache, EncoderDecoderCache):
            store = cache.cross_attention_cache if self.cross else cache.self_attention_cache
        if self.cross and store is not None and cache.is_updated.get(self.index):
            k, v = store.layers[self.index].keys, store.layers[self.index].values
        else:
            k, v = joint or self._keys(x if over is None else over)
            k, v = self._split(k), self._split(v)
            if store is not None:
                k, v = store.update(k, v, self.index)
                if self.cross:
                    cache.is_updated[self.index] = True
        y = F.scaled_dot_product_attention(
            self._split(q), k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        y = y.transpose(1, 2).reshape(x.shape)
        if hasattr(self, "out_proj"):
            return self.out_proj(y)
        if self.projects == "none":
            return y
        return self.out(self.out_norm(y) if self.projects == "memory" else y)


class Layer(GradientCheckpointingLayer):
    """A layer of an encoder or decoder.

    Args:
        side: description of the stack.
        index: number of the layer.
        memory_width: width of the encoder that it attends to, or None.
    """

    def __init__(
        self, config: EvoMoEConfig, side: dict[str, Any], index: int, memory_width: int | None
    ) -> None:
        super().__init__()
        about, width, heads = side["layers"][index], side["width"], side["heads"]
        self.first, self.dropout = side["normalize_before"], config.dropout
        self.self_attn = Attention(config, about["attention"], width, heads, index=index)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        if memory_width is not None:
            kind = about["attention"]
            self.encoder_attn = Attention(
                config, kind, width, heads, memory_width=memory_width, index=index
            )
            self.encoder_attn_layer_norm = nn.LayerNorm(width)
        kind = about["ffn"]
        if kind == "moe":
            self.moe_layer = MoELayer(config, width, about["ffn_width"], side["vocabulary"])
        elif kind == "memory":
            self.memory_ffn: nn.Module = LookUpFFN(config, width)
        elif kind == "beside":
            self.memory_ffn = DenseFFN(config, width, about["ffn_width"], beside=True)
        else:
            self.ffn = DenseFFN(config, width, about["ffn_width"], beside=False)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        over: Tensor | None = None,
        over_mask: Tensor | None = None,
        real: Tensor | None = None,
        ids: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """x (B, L, D) -> (B, L, D), and the routing of a layer with experts."""
        routing = None
        for name in ("self_attn", "encoder_attn", "final"):
            norm = getattr(self, f"{name}_layer_norm", None)
            if norm is None:
                continue
            h = norm(x) if self.first else x
            if name == "self_attn":
                h = self.self_attn(h, None, mask, cache)
            elif name == "encoder_attn":
                h = self.encoder_attn(h, over, over_mask, cache)
            elif hasattr(self, "moe_layer"):
                h, routing = self.moe_layer(h, real, ids)
            else:
                h = self.memory_ffn(h) if hasattr(self, "memory_ffn") else self.ffn(h)
            x = x + F.dropout(h, self.dropout, training=self.training)
            x = x if self.first else norm(x)
        return x, routing


class Positions(nn.Module):
    """fairseq's positional embeddings: learned, or sines and cosines of any length."""

    def __init__(self, width: int, number: int, pad: int, *, learned: bool) -> None:
        super().__init__()
        self.width, self.pad = width, pad
        self.weight = nn.Parameter(torch.zeros(number + pad + 1, width)) if learned else None
        self._sines = torch.zeros(0)

    def forward(self, places: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings of positions in the sentence, from 1; 0 is padding: (B, L) -> (B, L, D).

        Raises:
            ValueError: the model has learned fewer positions.
        """
        rows = places + self.pad
        if self.weight is not None:
            if rows.numel() and int(rows.max()) >= len(self.weight):
                raise ValueError(
                    f"the model has learned {len(self.weight) - self.pad - 1} positions, and the "
                    f"text has {int(places.max())}: shorten it"
                )
            return F.embedding(rows, self.weight).to(dtype)
        needed = int(rows.max()) + 1 if rows.numel() else 1
        if len(self._sines) < needed or self._sines.device != rows.device:
            self._sines = self._table(max(needed, 2 * len(self._sines))).to(rows.device)
        return F.embedding(rows, self._sines).to(dtype)

    def _table(self, number: int) -> Tensor:
        half = self.width // 2
        step = math.log(10000) / (half - 1)
        rates = torch.exp(torch.arange(half, dtype=torch.float) * -step)
        angles = torch.arange(number, dtype=torch.float)[:, None] * rates[None]
        table = torch.cat([angles.sin(), angles.cos()], 1)
        table = F.pad(table, (0, self.width % 2))
        table[self.pad] = 0
        return table


class Stack(nn.Module):
    """Embeddings and layers of an encoder or of a decoder.

    Args:
        side: its description, `config.encoder_stack` or `config.decoder_stack`.
        memory_width: width of the encoder that its layers attend to, or None.
        causal: whether a position sees only earlier ones.
    """

    def __init__(
        self,
        config: EvoMoEConfig,
        side: dict[str, Any],
        *,
        memory_width: int | None = None,
        causal: bool,
    ) -> None:
        super().__init__()
        self.side, self.causal, self.dropout = side, causal, config.dropout
        self.pad, self.unknown = config.pad_token_id, config.unk_token_id
        width, into = side["width"], side["input_width"]
        self.embed_tokens = nn.Embedding(side["vocabulary"], into, padding_idx=self.pad)
        if into != width:
            self.project_in_dim = nn.Linear(into, width, bias=False)
        if side["positions"]:
            self.embed_positions = Positions(
                width, side["positions"], self.pad, learned=side["learned_positions"]
            )
        if side["norm_embedding"]:
            self.layernorm_embedding = nn.LayerNorm(width)
        if config.memory and config.memory["ngram"]:
            self.ngrams = Ngrams(config.memory, width, self.pad)
        self.layers = nn.ModuleList(
            Layer(config, side, i, memory_width) for i in range(len(side["layers"]))
        )
        if side["final_norm"]:
            self.layer_norm = nn.LayerNorm(width)
        if side["output_width"] != width:
            self.project_out_dim = nn.Linear(width, side["output_width"], bias=False)

    def known(self, ids: Tensor) -> Tensor:
        """Token ids, with the unknown word in place of ids beyond the dictionary."""
        return ids.where(ids < self.embed_tokens.num_embeddings, self.unknown)

    def run(
        self,
        ids: Any,
        real: Tensor,
        *,
        embeds: Tensor | None = None,
        over: Tensor | None = None,
        over_real: Tensor | None = None,
        cache: Cache | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Routing]]:
        """Run the stack on the last L of P + L positions.

        Args:
            ids: (B, L) int64, or None if `embeds` (B, L, D) are given.
            real: which of the P + L positions are no padding, (B, P + L) bool.
            over, over_real: states of the encoder, (B, S, D), and which are no padding, (B, S).
            cache: keys and values of the P positions before.
            before: ids of the last positions before, for tables of n-grams, or None.

        Returns:
            states (B, L, D), the states before each layer and after the last, and the routing of
            each layer that has experts.

        Raises:
            ValueError: a part of the model reads ids, and there are none.
        """
        length = ids.size(1) if embeds is None else embeds.size(1)
        now = real[:, -length:]
        if ids is not None:
            ids = self.known(ids).masked_fill(~now, self.pad)
        x = self.side["embed_scale"] * (self.embed_tokens(ids) if embeds is None else embeds)
        if hasattr(self, "project_in_dim"):
            x = self.project_in_dim(x)
        if hasattr(self, "embed_positions"):
            places = (real.cumsum(1) * real)[:, -length:]
            x = x + self.embed_positions(places, x.dtype)
        if hasattr(self, "layernorm_embedding"):
            x = self.layernorm_embedding(x)
        if hasattr(self, "ngrams"):
            if ids is None:
                raise ValueError("this model reads n-grams of ids: call it with input_ids")
            past = real.size(1) - length
            if past and before is None:
                raise ValueError(
                    "this model reads n-grams of ids: with a cache, give the ids before the new "
                    f"ones as ids_before, (batch, {self.ngrams.length - 1})"
                )
            if before is not None:
                # real ones, of which there may be fewer than the tables read
                rows = F.pad(real[:, :past], (before.size(1), 0))[:, -before.size(1) :]
                before = self.known(before).masked_fill(~rows, self.pad)
            x = x + self.ngrams(ids, before).to(x.dtype)
        x = F.dropout(x, self.dropout, training=self.training)
        padded = not bool(now.all())
        if padded and not self.causal:
            x = x * now[..., None].to(x.dtype)
        mask = self._mask(real, length)
        over_mask = None if over_real is None else over_real[:, None, None, :]
        states, routings = [x], []
        for layer in self.layers:
            x, routing = layer(
                *(x, mask, over, over_mask, now if padded else None, ids),
                cache=cache,
            )
            states.append(x)
            if routing is not None:
                routings.append(routing)
        if hasattr(self, "layer_norm"):
            x = self.layer_norm(x)
        if hasattr(self, "project_out_dim"):
            x = self.project_out_dim(x)
        return x, states, routings

    def _mask(self, real: Tensor, length: int) -> Tensor | None:
        """Which positions each of the last L may see, (B or 1, 1, L, P + L) bool, or None."""
        total = real.size(1)
        mask = None
        if self.causal and length > 1:
            mask = torch.ones(length, total, dtype=torch.bool, device=real.device)
            mask = mask.tril(total - length)[None, None]
        if not bool(real.all()):
            pads = real[:, None, None, :]
            mask = pads if mask is None else mask & pads
        return mask
