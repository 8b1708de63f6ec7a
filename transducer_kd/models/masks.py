"""Which frames may look at which: padding and chunk masks, as additive attention biases.

Shapes: N batch, T encoder frames (T' in the rest of the package), H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the score of a forbidden pair. It is finite, so a row in which everything is forbidden (a padded
# query far behind the end of its utterance) stays free of NaN; it fits float16; and exp(-1e4) is exactly zero
# in every floating type, so a forbidden frame has no influence at all.
FORBIDDEN = -1.0e4


def valid_mask(lens: Tensor, max_len: int) -> Tensor:
    """(N, max_len) bool, True on the frames before `lens` (N,)."""
    return torch.arange(max_len, device=lens.device) < lens.unsqueeze(1)


def chunk_mask(num_frames: int, chunk_size: int, left_context: int, device: torch.device) -> Tensor:
    """(T, T) bool, True where query i may see key j.

    A query in the chunk that starts at frame s sees the keys in [s - left_context, s + chunk_size).
    """
    frame = torch.arange(num_frames, device=device)
    start = (frame // chunk_size * chunk_size).unsqueeze(1)
    return (frame >= start - left_context) & (frame < start + chunk_size)


def attention_bias(allowed: Tensor) -> Tensor:
    """float32 bias of the same shape as bool `allowed`: 0 where it is True, FORBIDDEN elsewhere."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill(~allowed, FORBIDDEN)


def sequence_bias(lens: Tensor, num_frames: int, chunk_size: int, left_context: int) -> Tensor:
    """Bias for a whole padded batch, to add to scores (N, H, T, T).

    `chunk_size` 0 means full context: (N, 1, 1, T), padding only. Otherwise (N, 1, T, T), padding and chunks.
    """
    allowed = valid_mask(lens, num_frames)[:, None, None, :]
    if chunk_size > 0:
        allowed = allowed & chunk_mask(num_frames, chunk_size, left_context, lens.device)
    return attention_bias(allowed)
