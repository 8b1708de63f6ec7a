"""Multi-head self-attention with rotary position embedding (RoFormer, arXiv:2104.09864).

Rotating queries and keys by an angle proportional to their position makes the scores depend on distances
only. So a streaming cache can hold keys that are not rotated yet: positions are counted anew, from the oldest
cached frame, in every chunk.

Shapes: N batch, T frames, D model dimension, H heads, E channels of a head, M cached frames.
"""

from __future__ import annotations

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """cos and sin of position x frequency, computed in float64: a float32 angle of a late frame is coarse.

    The table is no buffer: it follows from `head_dim`, and as it grows with the longest utterance seen, the
    processes of a DDP run could not keep it in step.
    """

    def __init__(self, head_dim: int, max_len: int = 3000, base: float = 10000.0) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self._table = self._compute(max_len)

    def _compute(self, length: int) -> Tensor:
        frequency = self.base ** (-torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        return rotary_table(torch.outer(torch.arange(length, dtype=torch.float64), frequency))

    def forward(self, length: int, device: torch.device) -> Tensor:
        """(2, length, 1, 1, E) for the positions 0 .. length-1, see rotary_table."""
        if length > self._table.size(1) or self._table.device != device:
            # A table made in inference mode would be of no use to a backward pass ever after.
            with torch.inference_mode(False):
                if length > self._table.size(1):
                    self._table = self._compute(2 * int(length))
                self._table = self._table.to(device)
        return self._table[:, :length]


def rotary_table(angle: Tensor) -> Tensor:
    """angle (T, E/2) -> (2, T, 1, 1, E) float32: what a channel is multiplied with to rotate it, and what its
    partner is.
    """
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)]).float()[
        :, :, None, None
    ]


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the channel pairs (e, e + E/2) of x (N, T, any, H, E) by RotaryTable's (2, T, 1, 1, E)."""
    first, second = x.chunk(2, dim=-1)
    return x * table[0] + torch.cat([second, first], dim=-1) * table[1]


def attend_matmul(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k' / sqrt(E) + bias) v with q (N, H, Tq, E), k and v (N, H, Tk, E), bias broadcast to (N, H,
    Tq, Tk).
    """
    scores = torch.matmul(q * q.size(-1) ** -0.5, k.transpose(-2, -1))
    return torch.matmul((scores + bias).softmax(dim=-1).to(v.dtype), v)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same as attend_matmul in torch's own kernel, which torch 1.13 does not have."""
    if torch.onnx.is_in_onnx_export():  # the same graph from every torch
        return attend_matmul(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))


attend = attend_fused if hasattr(F, "scaled_dot_product_attention") else attend_matmul


class SelfAttention(nn.Module):
    """Self-attention whose heads need not add up to the model dimension, so that whole heads can be
    pruned.
    """

    def __init__(self, dim: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.inner_dim = num_heads * head_dim
        self.qkv = nn.Linear(dim, 3 * self.inner_dim)  # rows: queries, keys, values; each by head
        self.out = nn.Linear(self.inner_dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight, gain=1 / math.sqrt(2))
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor, rotary: Tensor, bias: Tensor) -> Tensor:
        """Attend from x (N, T, D) to itself.

        rotary: RotaryTable's (2, T, 1, 1, E); bias: broadcast to (N, H, T, T). Returns (N, T, D).
        """
        # Split, not sliced: the backward of slices fills and adds full-size tensors.
        qk, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).split([2, 1], dim=2)
        q, k = rotate(qk, rotary).unbind(2)
        return self._attend(q, k, v.squeeze(2), bias)

    def streaming(self, x: Tensor, rotary: Tensor, bias: Tensor, cache: Tensor) -> Tuple[Tensor, Tensor]:
        """Attend from a chunk x (N, T, D) to the M frames before it and itself.

        cache (N, M, 2HE): their keys, not rotated, and values. rotary: (2, M+T, 1, 1, E); bias: broadcast to
        (N, H, T, M+T). Returns (N, T, D) and the cache for the next chunk.
        """
        q, kv = self.qkv(x).split([self.inner_dim, 2 * self.inner_dim], dim=-1)
        kv = torch.cat([cache, kv], dim=1)
        q = q.unflatten(-1, (1, self.num_heads, self.head_dim))
        k, v = kv.unflatten(-1, (2, self.num_heads, self.head_dim)).split([1, 1], dim=2)
        q, k = rotate(q, rotary[:, cache.size(1) :]), rotate(k, rotary)
        return self._attend(q.squeeze(2), k.squeeze(2), v.squeeze(2), bias), kv[:, x.size(1) :]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """q (N, T, H, E), k and v (N, M+T, H, E) -> (N, T, D)."""
        # Under autocast the rotation has promoted q and k to float32.
        q, k = q.to(v.dtype), k.to(v.dtype)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias)
        return self.out(y.transpose(1, 2).flatten(2))
