"""wav2vec 2.0 around a transducer's encoder: frames are hidden from it, and it has to tell which they were.

Baevski et al. 2020 (arXiv:2006.11477). Here the latent frames are those of the subsampling, 40 ms each (20 ms
in the paper), so that a span of as many frames is twice as long.

Shapes: N batch, T feature frames, C mel bins, T' encoder frames, F masked frames of the whole batch, D
encoder_dim, G codebooks, V entries of a codebook, E channels that context and target are compared in.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.config import Wav2Vec2Config
from transducer_kd.models.masks import valid_mask
from transducer_kd.models.transducer import Transducer, count_parameters, parameter_lines


class GumbelQuantizer(nn.Module):
    """Product quantiser: of each codebook the entry that a linear map of the frame chooses (section 2).

    codebook_dim is a multiple of num_codebooks.
    """

    def __init__(self, input_dim: int, num_codebooks: int, num_entries: int, codebook_dim: int) -> None:
        super().__init__()
        self.logits = nn.Linear(input_dim, num_codebooks * num_entries)
        self.codebooks = nn.Parameter(torch.rand(num_codebooks, num_entries, codebook_dim // num_codebooks))
        # Of frames with unit variance, weights of N(0, 1) make logits whose scale is sqrt(D). So from the
        # first update on the code depends on the frame, not on the noise (scale 1.3), and many entries are in
        # use. With small weights all frames would ask for much the same entries, which then alone were
        # trained: the collapse that the diversity loss can hardly undo.
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor, temperature: float) -> Tuple[Tensor, Tensor, Tensor]:
        """Quantise frames x (F, D), in float32 also under autocast.

        In training the entries are drawn (Gumbel softmax, temperature > 0) and the gradient is that of the
        softmax (straight through); in eval they are the likeliest.

        Returns quantised (F, codebook_dim), the probabilities without noise (F, G, V), and the codes (F, G)
        int64 that `quantised` is made of.
        """
        num_codebooks, num_entries, _ = self.codebooks.shape
        with torch.autocast(x.device.type, enabled=False):
            logits = self.logits(x.to(self.codebooks.dtype)).unflatten(-1, (num_codebooks, num_entries))
            probabilities = logits.softmax(-1)
            if self.training:
                uniform = torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny)
                soft = ((logits - (-uniform.log()).log()) / temperature).softmax(-1)
            else:
                soft = probabilities
            codes = soft.argmax(-1)
            # In this order the difference is exactly zero, and equal codes make equal vectors.
            chosen = F.one_hot(codes, num_entries) + (soft - soft.detach())
            quantised = torch.einsum("fgv,gve->fge", chosen, self.codebooks).flatten(1)
        return quantised, probabilities, codes


def span_mask(
    lens: Tensor, num_frames: int, prob: float, length: int, generator: Optional[torch.Generator] = None
) -> Tensor:
    """Which frames are hidden: (N, num_frames) bool.

    At each of an utterance's `lens` (N,) frames a span of `length` frames begins with probability `prob`.
    Spans may overlap, and end with the utterance; of a long one they cover about 1 - (1 - prob)^length. Where
    chance begins none before the last frame, one is put anywhere before it, so that every utterance of two
    frames has two hidden ones to tell apart (if length allows). `generator` draws on its own device.
    """
    place = lens.device if generator is None else generator.device
    draws = torch.rand(len(lens), num_frames + 1, generator=generator, device=place).to(lens.device)
    frame = torch.arange(num_frames, device=lens.device)
    valid = valid_mask(lens, num_frames)
    starts = (draws[:, 1:] < prob) & valid
    has_other = (lens - 1).unsqueeze(1)  # frames that another one follows
    is_empty = ~(starts & (frame < has_other)).any(1, keepdim=True)
    starts = starts | (is_empty & (frame == (draws[:, :1] * has_other).floor()) & (has_other > 0))
    begun = starts.cumsum(1)
    ended = F.pad(begun, (length, 0))[:, :num_frames]
    return (begun > ended) & valid


class Wav2Vec2(nn.Module):
    """The encoder of `model`, a Transducer or Supernet, with what its pretraining needs besides.

    The state dict has the encoder and the masks under the names that `model` has them, so that a transducer
    can begin with them; its other parts are not trained and not kept.
    """

    def __init__(self, model: Transducer, cfg: Wav2Vec2Config) -> None:
        super().__init__()
        self.config = model.config
        self.vocab_size = model.vocab_size
        self.encoder = model.encoder
        if hasattr(model, "masks"):
            self.masks = model.masks
        self._encode_frames = model.encode_frames  # a method, so that what else `model` has stays outside
        dim = model.config.encoder.encoder_dim
        self.mask_embedding = nn.Parameter(torch.rand(dim))
        self.quantizer = GumbelQuantizer(dim, cfg.num_codebooks, cfg.num_entries, cfg.codebook_dim)
        self.context_proj = nn.Linear(dim, cfg.projection_dim)
        self.target_proj = nn.Linear(cfg.codebook_dim, cfg.projection_dim)

    def frames(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Features (N, T, C) -> what the layers read (N, T', D), and the same before its norm."""
        projected = self.encoder.subsampling.project(x)
        return self.encoder.subsampling.norm(projected), projected

    def hide(self, frames: Tensor, mask: Tensor) -> Tensor:
        """frames (N, T', D) with the learned vector where mask (N, T') is True."""
        return torch.where(mask.unsqueeze(-1), self.mask_embedding.to(frames.dtype), frames)

    def targets(self, frames: Tensor, temperature: float) -> Tuple[Tensor, Tensor, Tensor]:
        """Masked frames (F, D) as they were -> targets (F, E); probabilities, codes: see GumbelQuantizer."""
        quantised, probabilities, codes = self.quantizer(frames, temperature)
        return self.target_proj(quantised), probabilities, codes

    def context(self, hidden: Tensor, lens: Tensor, places: Tuple[Tensor, Tensor], chunk_size: int) -> Tensor:
        """Projected encoder output of hidden (N, T', D), lens (N,), at `places` (utterances, frames): (F, E).

        chunk_size: 0 for full context and all weights, as for `model.encode_frames`.
        """
        encoder_out, _ = self._encode_frames(hidden, lens, chunk_size)
        return self.context_proj(encoder_out[places])

    def deployed_parameters(self) -> int:
        """Number of parameters of the encoder, the one part that outlives the pretraining."""
        return count_parameters(self.encoder)

    def parameter_table(self) -> str:
        """Parameters of each part, one line each, for the log."""
        rows: List[Tuple[str, int]] = [
            *(
                (name, count_parameters(part))
                for name, part in self.named_children()
                if count_parameters(part)
            ),
            ("mask_embedding", self.mask_embedding.numel()),
        ]
        return parameter_lines(rows)
