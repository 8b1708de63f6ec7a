"""The parts of a trained transducer as graphs: modules of tensors in, tensors out, that ONNX can hold.

Inputs and outputs are those that sherpa-onnx wants, by position: of its streaming model type "conformer",
and of its offline transducers. The joiner's projections of its two inputs are made by the encoder and the
decoder, once a frame and once a token. Where there is a second pass the encoder gives one more output, last,
which sherpa-onnx does not look at: the frames that the LAS attends to.

sherpa-onnx makes the caches of both kinds with one width, `encoder_dim` in the metadata. Ours are of two
widths, so it is told the larger one (cache_dim) and the narrower cache is filled up with zeros.

Shapes: N streams, T feature frames, T' encoder frames, C mel bins, D encoder_dim, J joiner_dim, V
vocabulary, L layers,
    M left_context, K_s causal taps of the convolutions, W cache_dim, B hypotheses, U tokens.
"""

from __future__ import annotations

import copy
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.models.attention import RotaryTable, rotary_table
from transducer_kd.models.conformer import Conformer
from transducer_kd.models.las import Las
from transducer_kd.models.subsampling import SUBSAMPLING_FACTOR, subsampled_lens
from transducer_kd.models.transducer import Transducer

TWO_PI = 6.283185307179586


def cache_dim(encoder: Conformer) -> int:
    """W: the width of both caches."""
    return max(2 * encoder.layers[0].attention.inner_dim, encoder.encoder_dim)


class StreamingEncoder(nn.Module):
    """x (N,4*chunk_size+3,C), cached_attn (L,M,N,W), cached_conv (L,K_s-1,N,W), processed_lens (N,) int64 in
    feature frames -> encoder_out (N,chunk_size,J), both new caches[, frames (N,chunk_size,D)].
    """

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model.encoder)
        cfg = self.encoder.cfg
        self.encoder.rotary = FixedRotaryTable(self.encoder.rotary, cfg.left_context + cfg.chunk_size)
        self.encoder_proj = model.joiner.encoder_proj
        self.with_frames = model.las is not None
        self.attn_dim = 2 * self.encoder.layers[0].attention.inner_dim
        self.conv_dim = self.encoder.encoder_dim
        self.cache_dim = cache_dim(self.encoder)

    def forward(
        self, x: Tensor, cached_attn: Tensor, cached_conv: Tensor, processed_lens: Tensor
    ) -> Tuple[Tensor, ...]:
        frames, attn, conv = self.encoder.streaming_core(
            x,
            _cut(cached_attn, self.attn_dim),
            _cut(cached_conv, self.conv_dim),
            # Not "floor", which is eight operations; lengths are not negative.
            torch.div(processed_lens, SUBSAMPLING_FACTOR, rounding_mode="trunc"),
        )
        attn, conv = _filled_up(attn, self.cache_dim), _filled_up(conv, self.cache_dim)
        return (self.encoder_proj(frames), attn, conv, *([frames] if self.with_frames else []))


def _cut(x: Tensor, dim: int) -> Tensor:
    return x if x.size(-1) == dim else x[..., :dim]


def _filled_up(x: Tensor, dim: int) -> Tensor:
    return x if x.size(-1) == dim else F.pad(x, (0, dim - x.size(-1)))


class OfflineEncoder(nn.Module):
    """x (N,T,C), x_lens (N,) int64 -> encoder_out (N,T',J), encoder_out_lens (N,)[, frames (N,T',D)].

    chunk_size: of the mask; 0: full context.
    """

    def __init__(self, model: Transducer, chunk_size: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model.encoder)
        self.encoder.rotary = AnyLengthRotaryTable(self.encoder.rotary)
        self.encoder_proj = model.joiner.encoder_proj
        self.with_frames = model.las is not None
        self.chunk_size = chunk_size

    def forward(self, x: Tensor, x_lens: Tensor) -> Tuple[Tensor, ...]:
        frames, lens = self.encoder.encode_frames(
            self.encoder.subsampling(x), subsampled_lens(x_lens), self.chunk_size
        )
        return (self.encoder_proj(frames), lens, *([frames] if self.with_frames else []))


class FixedRotaryTable(nn.Module):
    """The first rows of a RotaryTable, so that no more of it gets into the file."""

    def __init__(self, table: RotaryTable, length: int) -> None:
        super().__init__()
        self.register_buffer("rows", table(length, torch.device("cpu")).clone(), persistent=False)

    def forward(self, length: Tensor, device: torch.device) -> Tensor:
        return self.rows


class AnyLengthRotaryTable(nn.Module):
    """RotaryTable computed by the graph itself, whatever the length: no table in the file, and no end to it.

    A float32 angle of a late frame is coarse, so whole turns are taken off in float64.
    """

    def __init__(self, table: RotaryTable) -> None:
        super().__init__()
        exponent = -torch.arange(0, table.head_dim, 2, dtype=torch.float64) / table.head_dim
        self.register_buffer("frequency", table.base**exponent, persistent=False)

    def forward(self, length: Tensor, device: torch.device) -> Tensor:
        """(2, length, 1, 1, E)."""
        position = torch.arange(length, device=device).to(torch.float64)
        angle = position.unsqueeze(1) * self.frequency
        return rotary_table((angle - TWO_PI * torch.floor(angle / TWO_PI)).float())


class Decoder(nn.Module):
    """y (N,context_size) int64, the last tokens, -1 before the start -> (N,J)."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.decoder = model.decoder
        self.decoder_proj = model.joiner.decoder_proj

    def forward(self, y: Tensor) -> Tensor:
        return self.decoder_proj(self.decoder.forward_context(y))


class Joiner(nn.Module):
    """(N,J) of the encoder, (N,J) of the decoder -> logit (N,V)."""

    def __init__(self, model: Transducer) -> None:
        super().__init__()
        self.joiner = model.joiner

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.joiner(encoder_out, decoder_out, project_input=False)


class LasScorer(nn.Module):
    """frames (1,T',D), y (B,U) int64 padded, y_lens (B,) int64 -> score (B,): the log-probability of each
    hypothesis with <sos/eos> at its end, as Las.score gives it.

    All hypotheses are of one utterance, whose keys and values are computed once. U is at least 1.
    """

    def __init__(self, las: Las) -> None:
        super().__init__()
        self.las = copy.deepcopy(las)
        self.las.rotary = AnyLengthRotaryTable(self.las.rotary)

    def forward(self, frames: Tensor, y: Tensor, y_lens: Tensor) -> Tensor:
        return self.las.score_padded(frames, y, y_lens)
