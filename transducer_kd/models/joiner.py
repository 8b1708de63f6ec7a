"""Joins an encoder frame and a decoder state into token logits.

Shapes: J joiner_dim, V vocabulary; the leading dimensions broadcast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Joiner(nn.Module):
    """output_linear(tanh(encoder_proj(encoder_out) + decoder_proj(decoder_out)))"""

    def __init__(self, encoder_dim: int, decoder_dim: int, joiner_dim: int, vocab_size: int) -> None:
        super().__init__()
        self.encoder_proj = nn.Linear(encoder_dim, joiner_dim)
        self.decoder_proj = nn.Linear(decoder_dim, joiner_dim)
        self.output_linear = nn.Linear(joiner_dim, vocab_size)
        for layer in (self.encoder_proj, self.decoder_proj, self.output_linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        # tanh shrinks what it passes on: without this the first logits are nearly flat and learning is slow.
        with torch.no_grad():
            self.output_linear.weight.mul_(2.0)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        """encoder_out (..., encoder_dim) and decoder_out (..., decoder_dim) -> logits (..., V).

        With project_input False both are already projected, (..., J): the pruned loss projects before it
        gathers.
        """
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))
