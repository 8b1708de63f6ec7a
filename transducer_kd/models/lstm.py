"""LSTM over tokens: what the LSTM prediction network and the second pass (LAS) are built on.

Shapes: N batch, U tokens, D dimension, L layers.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor, nn

LstmState = Tuple[Tensor, Tensor]


class TokenLstm(nn.Module):
    """Embedding and LSTM. Its state is batch-first, so that a search picks hypotheses by `s[index]`."""

    def __init__(self, vocab_size: int, dim: int, num_layers: int, dropout: float, blank_id: int = 0) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.dim = dim
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=blank_id)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.LSTM(
            dim, dim, num_layers, batch_first=True, dropout=dropout if num_layers > 1 else 0.0
        )

    def init_state(self, num: int, device: torch.device) -> LstmState:
        """(h, c), each (N, L, D), of zeros."""
        zeros = torch.zeros(num, self.num_layers, self.dim, device=device)
        return zeros, zeros.clone()

    def forward(self, y: Tensor, state: Optional[LstmState] = None) -> Tuple[Tensor, LstmState]:
        """y (N, U) int64 -> (N, U, D) and the state after the last token."""
        carried = None if state is None else tuple(s.transpose(0, 1).contiguous() for s in state)
        out, (h, c) = self.lstm(self.dropout(self.embedding(y)), carried)
        return out, (h.transpose(0, 1), c.transpose(0, 1))
