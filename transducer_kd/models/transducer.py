"""The transducer: encoder, decoder (prediction network) and joiner, with the heads that only training uses.

Shapes: N batch, T feature frames, C mel bins, T' encoder frames, U tokens, D decoder_dim, V vocabulary.
"""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple

import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.config import ModelConfig
from transducer_kd.models.conformer import Conformer
from transducer_kd.models.decoder import BLANK_ID, LstmDecoder, StatelessDecoder
from transducer_kd.models.joiner import Joiner
from transducer_kd.models.las import Las

_DECODERS = {"stateless": StatelessDecoder, "lstm": LstmDecoder}


class Transducer(nn.Module):
    """Holds the parts; losses and searches call them.

    simple_am_proj and simple_lm_proj feed the pruned loss's first pass (arXiv:2206.13236), ctc_output an
    auxiliary CTC loss (None without). None of the three is deployed. las is the second pass (None without).
    """

    blank_id = BLANK_ID

    def __init__(self, cfg: ModelConfig, vocab_size: int, with_ctc: bool = False) -> None:
        super().__init__()
        self.config = cfg
        self.vocab_size = vocab_size
        encoder_dim, decoder_dim = cfg.encoder.encoder_dim, cfg.decoder.decoder_dim
        self.encoder = Conformer(cfg.encoder)
        self.decoder = _DECODERS[cfg.decoder.kind](cfg.decoder, vocab_size)
        self.joiner = Joiner(encoder_dim, decoder_dim, cfg.joiner_dim, vocab_size)
        self.simple_am_proj = nn.Linear(encoder_dim, vocab_size)
        self.simple_lm_proj = nn.Linear(decoder_dim, vocab_size)
        self.ctc_output = nn.Linear(encoder_dim, vocab_size) if with_ctc else None
        # Twice torch's default scale: timid logits here give uninformative pruning bounds, and the model
        # starts to emit tokens much later.
        for head in (self.simple_am_proj, self.simple_lm_proj, self.ctc_output):
            if head is not None:
                nn.init.xavier_uniform_(head.weight)
                nn.init.zeros_(head.bias)
        # Last, so that the first pass begins with the same weights with and without it.
        self.las = Las(cfg, vocab_size) if cfg.las.enabled else None

    def encode(self, x: Tensor, x_lens: Tensor, chunk_size: Optional[int] = None) -> Tuple[Tensor, Tensor]:
        """(N, T, C), (N,) -> encoder_out (N, T', encoder_dim), encoder_out_lens (N,). See
        Conformer.forward.
        """
        return self.encode_frames(*self.encoder.subsample(x, x_lens), chunk_size)

    def encode_frames(
        self, frames: Tensor, lens: Tensor, chunk_size: Optional[int] = None
    ) -> Tuple[Tensor, Tensor]:
        """What follows the subsampling, which passes of both modes may share: frames (N, T', encoder_dim),
        lens (N,) -> encoder_out (N, T', encoder_dim), lens.
        """
        return self.encoder.encode_frames(frames, lens, chunk_size)

    def decode_labels(self, y: Tensor) -> Tensor:
        """Labels y (N, U), padded, without blanks -> decoder_out (N, U+1, D); row u has seen u labels."""
        return self.decoder(F.pad(y, (1, 0), value=self.blank_id))

    def first_pass_parameters(self) -> int:
        """Number of parameters of encoder, decoder and joiner."""
        return sum(count_parameters(module) for module in (self.encoder, self.decoder, self.joiner))

    def deployed_parameters(self) -> int:
        """Number of parameters that run on a device: the first pass's, and the LAS's where there is one."""
        return self.first_pass_parameters() + (count_parameters(self.las) if self.las is not None else 0)

    def parameter_table(self) -> str:
        """Parameters of each part, one line each, for the log."""
        rows: List[Tuple[str, int]] = [
            ("encoder.subsampling", count_parameters(self.encoder.subsampling)),
            (f"encoder.layers ({len(self.encoder.layers)})", count_parameters(self.encoder.layers)),
            ("encoder.norm", count_parameters(self.encoder.norm)),
            ("decoder", count_parameters(self.decoder)),
            ("joiner", count_parameters(self.joiner)),
            *([("las", count_parameters(self.las))] if self.las is not None else []),
            ("deployed", self.deployed_parameters()),
            ("training only", count_parameters(self) - self.deployed_parameters()),
        ]
        return parameter_lines(rows)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def parameter_lines(rows: Sequence[Tuple[str, int]]) -> str:
    """Names with their numbers, one line each, under each other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}} {number:>12,}" for name, number in rows)
