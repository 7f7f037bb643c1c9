"""Attention whose projections are look-ups (MemoryFormer, arXiv 2411.12992)."""

from contextvars import ContextVar
from typing import Any

from fairseq.modules import MultiheadAttention
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_evomoe.memory.config import MemoryConfig
from fairseq_evomoe.memory.layer import MemoryLayer, build_norm

_JOINT: ContextVar[Tensor | None] = ContextVar("joint_projection", default=None)
"""The joint projection between the calls of one forward pass, for each thread its own."""


def _joint() -> Tensor:
    joint = _JOINT.get()
    assert joint is not None, "keys and values are projected after queries"
    return joint


class MemoryAttention(MultiheadAttention):
    """fairseq's attention with look-ups for its projections (eq. 13).

    Self-attention hashes its input once and reads queries, keys and values from tables of width
    3 D. Attention over an encoder hashes the encoder's output once for keys and values, which
    incremental decoding then keeps. `--memory-out-proj` selects the output projection: none (the
    paper), dense or memory. All other arguments are those of fairseq's `MultiheadAttention`.

    Args:
        cfg: the flags.
    """

    def __init__(self, *args: Any, cfg: MemoryConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # fairseq's fast path reads weight matrices, which do not exist here
        self.skip_embed_dim_check = True
        linear = {n: self._modules.pop(n) for n in ("q_proj", "k_proj", "v_proj", "out_proj")}
        width = self.embed_dim
        if self.self_attention:
            self.qkv = MemoryLayer(width, 3 * width, cfg)
        else:
            if self.kdim != self.vdim:
                raise ValueError("--memory-attention: keys and values must have one width")
            self.q = MemoryLayer(width, width, cfg)
            self.kv = MemoryLayer(self.kdim, 2 * width, cfg)
        self.out: nn.Module
        if cfg.memory_out_proj == "memory":
            self.out_norm = build_norm(cfg, width)
            self.out = MemoryLayer(width, width, cfg)
        elif cfg.memory_out_proj == "dense":
            self.out = linear["out_proj"]
        self.projects = cfg.memory_out_proj

    def reset_parameters(self) -> None:
        """Do nothing: the linear maps that fairseq would initialise here are not kept."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As in fairseq; where only the output is wanted, torch's attention computes it.

        Args:
            query: (L, B, D); key, value: (S, B, D).
            key_padding_mask: (B, S), true at padding.
            attn_mask: (L, S) or (B * heads, L, S), added to the scores.
        """
        more = need_weights or need_head_weights or before_softmax or static_kv
        if (
            more
            or key is None
            or incremental_state is not None
            or self.bias_k is not None
            or self.add_zero_attn
            or self.use_xformers
        ):
            return super().forward(
                *(query, key, value, key_padding_mask, incremental_state, need_weights),
                *(static_kv, attn_mask, before_softmax, need_head_weights),
            )
        length, batch, width = query.shape
        rows = (self.q_proj(query), self.k_proj(key), self.v_proj(key))
        q, k, v = (x.view(len(x), batch, self.num_heads, -1).permute(1, 2, 0, 3) for x in rows)
        mask = attn_mask
        if mask is not None:
            shape = (batch, self.num_heads) if mask.dim() == 3 else (1, 1)
            mask = mask.view(*shape, *mask.shape[-2:]).to(q.dtype)
        if key_padding_mask is not None:
            pads = q.new_zeros(key_padding_mask.shape)
            pads.masked_fill_(key_padding_mask.bool(), float("-inf"))
            pads = pads[:, None, None]
            mask = pads if mask is None else mask + pads
        dropout = self.dropout_module
        active = dropout.training or dropout.apply_during_inference
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout.p if active else 0.0
        )
        return self.out_proj(attended.permute(2, 0, 1, 3).reshape(length, batch, width)), None

    # fairseq's forward pass calls the next three in this order, within one thread.

    def q_proj(self, query: Tensor) -> Tensor:
        if not self.self_attention:
            return self.q(query)
        joint = self.qkv(query)
        _JOINT.set(joint)
        return joint[..., : self.embed_dim].clone()

    def k_proj(self, key: Tensor) -> Tensor:
        if self.self_attention:
            return _joint()[..., self.embed_dim : 2 * self.embed_dim]
        joint = self.kv(key)
        _JOINT.set(joint)
        return joint[..., : self.embed_dim]

    def v_proj(self, value: Tensor) -> Tensor:
        joint = _joint()
        _JOINT.set(None)
        return joint[..., -self.embed_dim :]

    def out_proj(self, attended: Tensor) -> Tensor:
        if self.projects == "none":
            return attended
        return self.out(self.out_norm(attended) if self.projects == "memory" else attended)
