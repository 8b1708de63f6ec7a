"""Greedy search, batched and frame-synchronous, fed with a whole utterance or chunk by chunk.

Shapes: N streams, T' encoder frames, J joiner dimension, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, List

import torch

from transducer_kd.data.tokenizer import UNK_ID


@dataclass
class Hypothesis:
    """One recognised utterance."""

    tokens: List[int]  # no blanks
    timestamps: List[int]  # encoder frame (40 ms) in which each token was emitted
    score: float  # log-probability the search gave it; n-best lists are sorted by it, best first


class GreedySearcher:
    """Greedy search over N streams that keeps its state between pieces of encoder output.

    The prediction network only runs for the streams that have just emitted; everything else of a frame is one
    batched joiner call. Results are the same however the frames are cut into pieces.
    """

    def __init__(self, model: Any, num_streams: int, device: torch.device, max_sym_per_frame: int = 1):
        """max_sym_per_frame: tokens allowed in a frame before the search moves on without a blank."""
        self.model, self.max_sym_per_frame = model, max_sym_per_frame
        blanks = torch.full((num_streams,), model.blank_id, dtype=torch.int64, device=device)
        decoder_out, self.state = model.decoder.step(blanks, model.decoder.init_state(num_streams, device))
        self.decoder_out = model.joiner.decoder_proj(decoder_out)  # (N,J)
        self.scores = torch.zeros(num_streams, device=device)
        self.frames_seen = 0
        self._emissions: List[torch.Tensor] = []  # one (N,) per search step, 0 where nothing was emitted
        self._emission_frames: List[int] = []

    def advance(self, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor) -> None:
        """Search encoder_out (N,T',encoder_dim), of which each stream has encoder_out_lens (N,) frames.

        A stream that got fewer than T' frames is at its end: later calls must give it length 0.
        """
        projected = self.model.joiner.encoder_proj(encoder_out)
        for t in range(int(encoder_out_lens.max())):
            self._search_frame(projected[:, t], encoder_out_lens > t, self.frames_seen + t)
        self.frames_seen += encoder_out.size(1)

    def _search_frame(self, encoder_frame: torch.Tensor, active: torch.Tensor, t: int) -> None:
        """encoder_frame (N,J); active (N,) bool."""
        for _ in range(self.max_sym_per_frame):
            logits = self.model.joiner(encoder_frame, self.decoder_out, project_input=False)
            best, token = logits.max(dim=-1)
            self.scores += (best - logits.logsumexp(dim=-1)) * active
            # <unk> stands for no word, so emitting it is always an error; like the device runtime
            # (sherpa-onnx) the searches move on as if it were blank.
            active = active & (token != self.model.blank_id) & (token != UNK_ID)
            index = active.nonzero().squeeze(1)
            if not index.numel():
                return
            self._emissions.append(token * active)
            self._emission_frames.append(t)
            decoder_out, new_state = self.model.decoder.step(
                token[index], tuple(s[index] for s in self.state)
            )
            self.decoder_out[index] = self.model.joiner.decoder_proj(decoder_out)
            for kept, new in zip(self.state, new_state):
                kept[index] = new

    def results(self) -> List[Hypothesis]:
        """One hypothesis per stream, of all frames so far."""
        scores = self.scores.tolist()
        if not self._emissions:
            return [Hypothesis([], [], score) for score in scores]
        emissions = torch.stack(self._emissions).cpu()
        frames = torch.tensor(self._emission_frames)
        out = []
        for n, score in enumerate(scores):
            kept = emissions[:, n].nonzero().squeeze(1)
            out.append(Hypothesis(emissions[kept, n].tolist(), frames[kept].tolist(), score))
        return out


@torch.inference_mode()
def greedy_search(
    model: Any, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor, max_sym_per_frame: int = 1
) -> List[Hypothesis]:
    """Best token of each frame.

    encoder_out (N,T',encoder_dim), encoder_out_lens (N,) -> one hypothesis per stream.
    Works with any prediction network that has the step interface (`init_state`, `step`). The score is the
    log-probability of the choices made, which are one alignment of the tokens among many.
    """
    searcher = GreedySearcher(model, encoder_out.size(0), encoder_out.device, max_sym_per_frame)
    searcher.advance(encoder_out, encoder_out_lens)
    return searcher.results()
