"""Tiles of (token, expert) that the Triton kernels of gate and routing share.

Letters: T tokens, E experts, B tokens per program, W = E rounded up to a power of two.
"""

import triton
import triton.language as tl

NUMBERS_PER_PROGRAM = 2048
"""Numbers of a (token, expert) tile that fit a program's registers."""


@triton.jit
def token_tile(tokens, experts, B: tl.constexpr, W: tl.constexpr):
    """This program's tokens (B,), all experts (W,), the mask (B, W), offsets of its pairs."""
    t = tl.program_id(0) * B + tl.arange(0, B)
    e = tl.arange(0, W)
    inside = (t < tokens)[:, None] & (e < experts)[None, :]
    return t, e, inside, t.to(tl.int64)[:, None] * experts + e[None, :]


def tile_shape(
    experts: int, *, numbers: int = NUMBERS_PER_PROGRAM, max_tokens: int = 256
) -> dict[str, int]:
    """B and W of a program that holds at most so many numbers and tokens."""
    width = triton.next_power_of_2(experts)
    return {"B": max(1, min(max_tokens, numbers // width)), "W": width}
