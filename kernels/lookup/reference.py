"""The reference of the look-up: plain torch, one table after another, gradients by autograd.

Letters: B rows, K tables, N = 2^t rows per table of t bits, H output width.
"""

import torch
from torch import Tensor


def lookup(z: Tensor, tables: Tensor, *, score: str, temperature: float = 1.0) -> Tensor:
    """y_b = sum_k p(z_bk) T_k[code(z_bk)], table after table; see `lookup.lookup`."""
    wide = z if z.dtype == torch.float64 else z.float()
    y = wide.new_zeros(z.size(0), tables.size(-1))
    # d|z| / dz is +1 at 0, where autograd would say 0
    size = torch.where(z >= 0, wide, -wide)
    for k in range(z.size(1)):
        code = sum((z[:, k, i] >= 0).long() << i for i in range(z.size(2)))
        p = torch.sigmoid(2 / temperature * size[:, k]).prod(-1)
        if score == "abs_prob":
            p = size[:, k].sum(-1) * p
        elif score == "l1":
            p = size[:, k].mean(-1)
        y = y + p[:, None] * tables[k][code].to(wide.dtype)
    return y.to(z.dtype)
