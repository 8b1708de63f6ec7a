"""Conformer encoder (arXiv:2005.08100), one class for full-context and streaming use.

A layer is feed-forward / self-attention / convolution / feed-forward, each a residual branch that normalises
its own input; one norm ends the encoder. All norms are LayerNorm: nothing is averaged over a batch or kept
from training, so that padding, batch mates and the other mode cannot leak in.

Streaming mode (chunk_size > 0) sees [s - left_context, s + chunk_size) from the chunk that starts at s, and
the depthwise convolutions lose their taps of the future: of cnn_module_kernel taps, the first K_s =
cnn_module_kernel//2+1 (past and present) remain. `forward` computes it for a whole utterance with masks,
`streaming_forward` chunk by chunk with caches; the two agree.

Shapes: N batch, T feature frames, T' encoder frames, C mel bins, D encoder_dim, L layers.
"""

from __future__ import annotations

import math
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.config import EncoderConfig
from transducer_kd.models.attention import RotaryTable, SelfAttention
from transducer_kd.models.masks import attention_bias, sequence_bias, valid_mask
from transducer_kd.models.subsampling import (
    LOOKAHEAD_FRAMES,
    MIN_FEATURE_FRAMES,
    SUBSAMPLING_FACTOR,
    ConvSubsampling,
    subsampled_lens,
)


class StreamingState(NamedTuple):
    """What a stream carries from chunk to chunk."""

    cached_attn: Tensor  # (L, left_context, N, 2HE) keys and values of the attention
    cached_conv: Tensor  # (L, K_s - 1, N, D) inputs of the depthwise convolution
    processed_lens: Tensor  # (N,) int64, encoder frames seen so far


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each channel convolved by itself, without padding: x (N, T, D), weight (D, 1, K) -> (N, T-K+1, D).

    Written as a 2-D convolution of height 1, because that takes (N, T, D) as it lies in memory (channels
    last), which on a CPU is several times faster than a 1-D convolution.
    """
    y = F.conv2d(x.transpose(1, 2).unsqueeze(2), weight.unsqueeze(2), bias, groups=weight.size(0))
    return y.squeeze(2).transpose(1, 2)


class FeedForward(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, dim)
        nn.init.xavier_uniform_(self.hidden.weight)
        nn.init.zeros_(self.hidden.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(x)))


class ConvModule(nn.Module):
    """Gated pointwise convolution, depthwise convolution, norm, SiLU, pointwise convolution."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, kernel, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        nn.init.normal_(self.depthwise.weight, std=1 / math.sqrt(kernel))
        nn.init.zeros_(self.depthwise.bias)

    def forward(
        self, x: Tensor, padding: Optional[Tensor], causal: bool, cache: Optional[Tensor] = None
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """x (N, T, D); padding (N, T, 1) bool or None; cache (N, K_s-1, D), causal only. Returns (N, T, D),
        new cache.
        """
        x = F.glu(self.gate(x), dim=-1)
        if padding is not None:
            x = x.masked_fill(padding, 0.0)
        past = self.kernel // 2
        new_cache = None
        if cache is None:
            x = F.pad(x, (0, 0, past, 0 if causal else past))
        else:
            x = torch.cat([cache, x], dim=1)
            new_cache = x[:, x.size(1) - past :]
        weight = self.depthwise.weight[..., : past + 1] if causal else self.depthwise.weight
        x = depthwise_conv(x, weight, self.depthwise.bias)
        return self.out(F.silu(self.norm(x))), new_cache


class ConformerLayer(nn.Module):
    """One macaron layer; see the module's docstring."""

    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        dim = cfg.encoder_dim
        self.ff1_norm = nn.LayerNorm(dim)
        self.ff1 = FeedForward(dim, cfg.feedforward_dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, cfg.num_heads, cfg.channels_per_head)
        self.conv_norm = nn.LayerNorm(dim)
        self.conv = ConvModule(dim, cfg.cnn_module_kernel)
        self.ff2_norm = nn.LayerNorm(dim)
        self.ff2 = FeedForward(dim, cfg.feedforward_dim)
        self.dropout = cfg.dropout
        # A residual stream that sums 4L branches keeps its scale when each branch starts small; in a toy task
        # it also began to emit tokens after two thirds of the updates.
        for branch in (self.ff1, self.attention, self.conv, self.ff2):
            nn.init.xavier_uniform_(branch.out.weight, gain=1 / math.sqrt(4 * cfg.num_layers))
            nn.init.zeros_(branch.out.bias)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor,
        bias: Tensor,
        padding: Optional[Tensor],
        causal: bool,
        dropout: Optional[float] = None,
    ) -> Tensor:
        """x (N, T', D); rotary, bias: see SelfAttention; padding (N, T', 1) bool; dropout: None for the
        configured one. Returns (N, T', D).
        """
        dropout = self.dropout if dropout is None else dropout
        x = self._add_half(x, self.ff1(self.ff1_norm(x)), dropout)
        x = x + self._drop(self.attention(self.attention_norm(x), rotary, bias), dropout)
        x = x + self._drop(self.conv(self.conv_norm(x), padding, causal)[0], dropout)
        return self._add_half(x, self.ff2(self.ff2_norm(x)), dropout)

    def streaming(
        self,
        x: Tensor,
        rotary: Tensor,
        bias: Tensor,
        padding: Optional[Tensor],
        caches: Tuple[Tensor, Tensor],
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """One chunk x (N, T', D) with caches (left_context, N, 2HE), (K_s-1, N, D). Returns x and the new
        caches.
        """
        cached_attn, cached_conv = (cache.transpose(0, 1) for cache in caches)
        x = self._add_half(x, self.ff1(self.ff1_norm(x)), self.dropout)
        y, new_attn = self.attention.streaming(self.attention_norm(x), rotary, bias, cached_attn)
        x = x + y
        y, new_conv = self.conv(self.conv_norm(x), padding, True, cached_conv)
        x = self._add_half(x + y, self.ff2(self.ff2_norm(x + y)), self.dropout)
        return x, new_attn.transpose(0, 1), new_conv.transpose(0, 1)

    def _drop(self, y: Tensor, dropout: float) -> Tensor:
        return F.dropout(y, dropout) if self.training and dropout > 0 else y

    def _add_half(self, x: Tensor, y: Tensor, dropout: float) -> Tensor:
        return torch.add(x, self._drop(y, dropout), alpha=0.5)


class Conformer(nn.Module):
    """(N, T, C) log-mel features -> (N, T', D)."""

    def __init__(self, cfg: EncoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder_dim = cfg.encoder_dim
        self.subsampling = ConvSubsampling(cfg.feature_dim, cfg.subsampling_channels, cfg.encoder_dim)
        self.rotary = RotaryTable(cfg.channels_per_head)
        self.layers = nn.ModuleList(ConformerLayer(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.LayerNorm(cfg.encoder_dim)

    def forward(self, x: Tensor, x_lens: Tensor, chunk_size: Optional[int] = None) -> Tuple[Tensor, Tensor]:
        """Encode a padded batch.

        Args:
            x: (N, T, C) features; x_lens: (N,) int64, their valid frames.
            chunk_size: encoder frames of a chunk, 0 for full context, None for the configured one.
        Returns:
            encoder_out (N, T', D), of which the padded frames mean nothing, and encoder_out_lens (N,).
        Raises:
            ValueError: an utterance is too short for one encoder frame, or a length exceeds T.
        """
        return self.encode_frames(*self.subsample(x, x_lens), chunk_size)

    def subsample(self, x: Tensor, x_lens: Tensor) -> Tuple[Tensor, Tensor]:
        """The first part of forward: x (N, T, C), x_lens (N,) -> frames (N, T', D), lens (N,)."""
        if not torch.jit.is_tracing():
            _check_lens(x, x_lens)
        return self.subsampling(x), subsampled_lens(x_lens)

    def encode_frames(
        self, x: Tensor, lens: Tensor, chunk_size: Optional[int] = None, dropout: Optional[float] = None
    ) -> Tuple[Tensor, Tensor]:
        """What follows the subsampling: x (N, T', D), lens (N,) -> (N, T', D), lens.

        chunk_size, dropout: None for the configured one.
        """
        chunk_size = self.cfg.chunk_size if chunk_size is None else chunk_size
        num_frames = x.size(1)
        bias = sequence_bias(lens, num_frames, chunk_size, self.cfg.left_context)
        padding = ~valid_mask(lens, num_frames).unsqueeze(-1)
        rotary = self.rotary(num_frames, x.device)
        for layer in self.layers:
            x = layer(x, rotary, bias, padding, chunk_size > 0, dropout)
        return self.norm(x), lens

    def streaming_init(self, num_streams: int, device: torch.device) -> StreamingState:
        """The state of `num_streams` streams that have heard nothing yet."""
        cfg, attention_dim = self.cfg, self.layers[0].attention.inner_dim
        return StreamingState(
            torch.zeros(cfg.num_layers, cfg.left_context, num_streams, 2 * attention_dim, device=device),
            torch.zeros(
                cfg.num_layers, cfg.cnn_module_kernel // 2, num_streams, cfg.encoder_dim, device=device
            ),
            torch.zeros(num_streams, dtype=torch.int64, device=device),
        )

    def streaming_forward(
        self, x: Tensor, x_lens: Tensor, state: StreamingState
    ) -> Tuple[Tensor, Tensor, StreamingState]:
        """Encode the next chunk of every stream.

        Args:
            x: (N, 4*chunk+3, C), the chunk's features and the 3 frames after it; the next call starts 4*chunk
                later.
            x_lens: (N,) int64, valid frames of x: all but for the end of a stream, and 0 for a stream that is
                over.
        Returns:
            encoder_out (N, chunk, D), out_lens (N,) and the state for the next chunk.
        """
        if x.size(1) < MIN_FEATURE_FRAMES or x.size(1) % SUBSAMPLING_FACTOR != LOOKAHEAD_FRAMES:
            raise ValueError(f"a streaming chunk has 4*chunk_size+3 feature frames, not {x.size(1)}")
        out_lens = subsampled_lens(x_lens)
        out, attn, conv = self.streaming_core(
            x, state.cached_attn, state.cached_conv, state.processed_lens, out_lens
        )
        return out, out_lens, StreamingState(attn, conv, state.processed_lens + out.size(1))

    def streaming_core(
        self,
        x: Tensor,
        cached_attn: Tensor,
        cached_conv: Tensor,
        processed_lens: Tensor,
        out_lens: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Tensors in, tensors out, fit for tracing: see StreamingState for the shapes.

        `out_lens` (N,) is the number of valid encoder frames of the chunk; None: all. Returns encoder_out
        (N, chunk, D), new_cached_attn, new_cached_conv.
        """
        x = self.subsampling(x)
        left_context, num_frames = cached_attn.size(1), x.size(1)
        # Cache slots fill from the right: the slot `left_context - 1` holds the newest frame, the chunk
        # follows it.
        slot = torch.arange(left_context + num_frames, device=x.device)
        allowed, padding = slot >= (left_context - processed_lens).unsqueeze(1), None
        if out_lens is not None:
            allowed = allowed & (slot < (left_context + out_lens).unsqueeze(1))
            padding = ~valid_mask(out_lens, num_frames).unsqueeze(-1)
        bias = attention_bias(allowed)[:, None, None]
        rotary = self.rotary(left_context + num_frames, x.device)
        attn: List[Tensor] = []
        conv: List[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, new_attn, new_conv = layer.streaming(
                x, rotary, bias, padding, (cached_attn[i], cached_conv[i])
            )
            attn.append(new_attn)
            conv.append(new_conv)
        return self.norm(x), torch.stack(attn), torch.stack(conv)


def _check_lens(x: Tensor, x_lens: Tensor) -> None:
    # One comparison, because reading a tensor's value makes a GPU wait.
    if bool(((x_lens < MIN_FEATURE_FRAMES) | (x_lens > x.size(1))).any()):
        raise ValueError(
            f"an utterance needs at least {MIN_FEATURE_FRAMES} feature frames, which give one encoder frame, "
            f"and has at most the {x.size(1)} of the padded batch; this batch has x_lens={x_lens.tolist()}"
        )
