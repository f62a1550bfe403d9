"""Reading the slots: gated cross-attention inside the upper layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SlotLayer(nn.Module):
    """Multi-head cross-attention of the states over the slots, with a null entry.

    The read of LM2 (arXiv 2502.06049, section 2): `E_mem = softmax(Q K^T / sqrt(d)) V` with `Q` from the states and
    `K`, `V` from the slots, then the output gate `sigmoid(W_out E_mem) * E_mem`. Ours has more than one head, and a
    learned key and value beside the slots, so that a state may read nothing. What is read joins the residual stream
    times `gate`, (D,), which starts at zero: before training the layer gives its input bit for bit.

    Args:
        dim: D.
        heads: number of heads; must divide `dim`.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"slot heads ({heads}) must divide dim ({dim})")
        self.heads = heads
        self.norm = nn.RMSNorm(dim)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output_gate = nn.Linear(dim, dim)
        self.null = nn.Parameter(torch.zeros(2, dim))  # its key and its value
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, slots: Tensor) -> Tensor:
        """Give x with what was read from the slots.

        Args:
            x: (B, T, D).
            slots: (B, S, D).
        """
        B, T, D = x.shape
        null_key, null_value = self.null[:, None, None].expand(2, B, 1, D)
        query = self._split(self.query(self.norm(x)))  # (B, H, T, D / H)
        key = self._split(torch.cat([null_key, self.key(slots)], dim=1))  # (B, H, 1 + S, D / H)
        value = self._split(torch.cat([null_value, self.value(slots)], dim=1))
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(B, T, D)
        return x + self.gate * torch.sigmoid(self.output_gate(read)) * read

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
