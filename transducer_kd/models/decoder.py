"""Prediction networks of the transducer: what has been emitted -> decoder_out.

StatelessDecoder sees only the last `context_size` tokens (arXiv:2109.07513); LstmDecoder sees all of them.
Both share the step interface of the searches: `init_state`, then `step` with the last token of every
hypothesis, blank first. A state is a tuple of tensors whose dimension 0 is the hypothesis: `tuple(s[index]
for s in state)` picks some.

Shapes: N batch or hypotheses, U tokens, D decoder_dim, V vocabulary. Blank (0) and -1 (before the start)
    embed to zero.
"""

from __future__ import annotations

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.config import DecoderConfig
from transducer_kd.models.conformer import depthwise_conv
from transducer_kd.models.lstm import LstmState, TokenLstm

BLANK_ID = 0


class StatelessDecoder(nn.Module):
    """Embedding, a convolution of each channel over the last `context_size` tokens, ReLU."""

    def __init__(self, cfg: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.context_size = cfg.context_size
        self.decoder_dim = cfg.decoder_dim
        self.embedding = nn.Embedding(vocab_size, cfg.decoder_dim, padding_idx=BLANK_ID)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv = nn.Conv1d(cfg.decoder_dim, cfg.decoder_dim, cfg.context_size, groups=cfg.decoder_dim)
        nn.init.normal_(self.conv.weight, std=1 / math.sqrt(cfg.context_size))
        nn.init.zeros_(self.conv.bias)

    def forward(self, y: Tensor) -> Tensor:
        """y (N, U) int64, starting with blank -> (N, U, D)."""
        return self._convolve(F.pad(y, (self.context_size - 1, 0), value=-1))

    def forward_context(self, y: Tensor) -> Tensor:
        """y (N, context_size), the last tokens, -1 before the start -> (N, D)."""
        return self._convolve(y).squeeze(1)

    def _convolve(self, y: Tensor) -> Tensor:
        # The blank's embedding is the padding row, which is zero and stays so: -1 may share it.
        embedded = self.dropout(self.embedding(y.clamp(min=BLANK_ID)))
        return F.relu(depthwise_conv(embedded, self.conv.weight, self.conv.bias))

    def init_state(self, num: int, device: torch.device) -> Tuple[Tensor, ...]:
        """The tokens before the last one, (N, context_size-1), all -1."""
        return (torch.full((num, self.context_size - 1), -1, dtype=torch.int64, device=device),)

    def step(self, y: Tensor, state: Tuple[Tensor, ...]) -> Tuple[Tensor, Tuple[Tensor, ...]]:
        """y (N,) int64, the last tokens -> decoder_out (N, D) and the state for the next step."""
        context = torch.cat([state[0], y.unsqueeze(1)], dim=1)
        return self.forward_context(context), (context[:, 1:],)


class LstmDecoder(nn.Module):
    """Embedding and LSTM over all tokens so far."""

    def __init__(self, cfg: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.decoder_dim = cfg.decoder_dim
        self.lstm = TokenLstm(vocab_size, cfg.decoder_dim, cfg.num_layers, cfg.dropout, BLANK_ID)

    def forward(self, y: Tensor) -> Tensor:
        """y (N, U) int64, starting with blank -> (N, U, D)."""
        return self.lstm(y)[0]

    def init_state(self, num: int, device: torch.device) -> LstmState:
        """(h, c), each (N, L, D), of zeros."""
        return self.lstm.init_state(num, device)

    def step(self, y: Tensor, state: LstmState) -> Tuple[Tensor, LstmState]:
        """y (N,) int64, the last tokens -> decoder_out (N, D) and the state for the next step."""
        out, state = self.lstm(y.unsqueeze(1), state)
        return out.squeeze(1), state
