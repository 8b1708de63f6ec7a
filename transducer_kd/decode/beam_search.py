"""Modified beam search: batched, at most one symbol a frame, hypotheses with equal tokens merged.

The beam search for transducers that emit at most one symbol a frame (Kang et al., arXiv:2211.00484), without
Python per hypothesis: all beams of all streams are rows of one tensor, and merging compares token rows.

Shapes: N streams, B beam, T' encoder frames, U tokens so far, V vocabulary, J joiner dimension.
"""

from dataclasses import dataclass
from typing import Any, List, Tuple

import torch

from transducer_kd.data.tokenizer import UNK_ID
from transducer_kd.decode.greedy import Hypothesis


@dataclass
class _Beams:
    """The hypotheses of the streams still running. A row with score -inf is no hypothesis."""

    tokens: torch.Tensor  # (N,B,U_max) int64, 0 after the end
    frames: torch.Tensor  # (N,B,U_max) int64, frame of each token
    lens: torch.Tensor  # (N,B) int64
    scores: torch.Tensor  # (N,B) log-probability, summed over the merged alignments
    decoder_out: torch.Tensor  # (N,B,J), projected for the joiner
    state: Tuple[torch.Tensor, ...]  # of the prediction network, (N*B,...)

    def first(self, n: int) -> "_Beams":
        """The first n streams."""
        rows = n * self.scores.size(1)
        return _Beams(
            self.tokens[:n],
            self.frames[:n],
            self.lens[:n],
            self.scores[:n],
            self.decoder_out[:n],
            tuple(s[:rows] for s in self.state),
        )

    def hypotheses(self, n: int) -> List[Hypothesis]:
        """Stream n's hypotheses, best first."""
        out = []
        order = self.scores[n].argsort(descending=True).tolist()
        for b in order:
            score, length = float(self.scores[n, b]), int(self.lens[n, b])
            if score > float("-inf"):
                tokens, frames = self.tokens[n, b, :length].tolist(), self.frames[n, b, :length].tolist()
                out.append(Hypothesis(tokens, frames, score))
        return out


@torch.inference_mode()
def modified_beam_search(
    model: Any, encoder_out: torch.Tensor, encoder_out_lens: torch.Tensor, beam: int = 4
) -> List[List[Hypothesis]]:
    """encoder_out (N,T',encoder_dim), encoder_out_lens (N,) -> per stream 1 to `beam` hypotheses, best first.

    A score is the log of the summed probability of the alignments that the beam kept of these tokens; there
    is no length normalisation. Timestamps are those of the most probable alignment at the moment of merging.
    """
    num_streams = encoder_out.size(0)
    encoder_out_lens = encoder_out_lens.to(encoder_out.device)
    # Longest first, so that the streams still running at frame t are the first rows of every tensor.
    lens, order = encoder_out_lens.sort(descending=True, stable=True)
    projected = model.joiner.encoder_proj(encoder_out[order])
    running = (lens.unsqueeze(1) > torch.arange(int(lens[0]), device=lens.device)).sum(dim=0).tolist()
    beams = _start(model, num_streams, beam, max(1, int(lens[0])), encoder_out.device)
    found: List[List[Hypothesis]] = [[] for _ in range(num_streams)]
    alive, longest = num_streams, 0
    for t, still_alive in enumerate(running + [0]):
        for row in range(still_alive, alive):
            found[int(order[row])] = beams.hypotheses(row)
        if not still_alive:
            break
        if still_alive < alive:
            beams, alive = beams.first(still_alive), still_alive
        longest = _search_frame(model, beams, projected[:alive, t], t, longest)
    return found


def _start(model: Any, num_streams: int, beam: int, max_tokens: int, device: torch.device) -> _Beams:
    """One empty hypothesis per stream."""
    rows = num_streams * beam
    blanks = torch.full((rows,), model.blank_id, dtype=torch.int64, device=device)
    decoder_out, state = model.decoder.step(blanks, model.decoder.init_state(rows, device))
    scores = torch.full((num_streams, beam), float("-inf"), device=device)
    scores[:, 0] = 0.0
    empty = torch.zeros(num_streams, beam, max_tokens, dtype=torch.int64, device=device)
    lens = torch.zeros(num_streams, beam, dtype=torch.int64, device=device)
    projected = model.joiner.decoder_proj(decoder_out).view(num_streams, beam, -1)
    return _Beams(empty, empty.clone(), lens, scores, projected, state)


def _search_frame(model: Any, beams: _Beams, encoder_frame: torch.Tensor, t: int, longest: int) -> int:
    """Extend every hypothesis by one frame, in place; encoder_frame (N,J).

    `longest` is at least the length of every hypothesis before the frame; returns the same for after it.
    Columns from there on are zero in every row and need not be moved or compared.
    """
    n, beam = beams.scores.shape
    logits = model.joiner(encoder_frame.unsqueeze(1), beams.decoder_out, project_input=False)
    vocab_size = logits.size(-1)
    totals = (beams.scores.unsqueeze(-1) + logits.log_softmax(dim=-1)).flatten(1)  # (N,B*V)
    # A vocabulary smaller than the beam cannot fill it in the first frame; all V*B candidates always can.
    scores, candidate = totals.topk(beam, dim=1)
    parent = torch.div(candidate, vocab_size, rounding_mode="floor")
    token = candidate - parent * vocab_size
    emits = (token != model.blank_id) & (token != UNK_ID)
    new_longest = min(longest + 1, beams.tokens.size(2)) if bool(emits.any()) else longest

    # Rows follow their parents.
    rows = (parent + torch.arange(0, n * beam, beam, device=parent.device).unsqueeze(1)).flatten()
    used = slice(0, new_longest)
    tokens = beams.tokens[:, :, used].flatten(0, 1)[rows]
    frames = beams.frames[:, :, used].flatten(0, 1)[rows]
    lens = beams.lens.flatten()[rows]
    emitting = emits.flatten().nonzero().squeeze(1)
    tokens[emitting, lens[emitting]] = token.flatten()[emitting]
    frames[emitting, lens[emitting]] = t
    lens[emitting] += 1
    beams.tokens[:, :, used] = tokens.view(n, beam, -1)
    beams.frames[:, :, used] = frames.view(n, beam, -1)
    beams.lens.copy_(lens.view(n, beam))
    beams.scores.copy_(_merged(scores, beams.tokens[:, :, used], beams.lens))

    state = tuple(s[rows] for s in beams.state)
    decoder_out = beams.decoder_out.flatten(0, 1)[rows]
    if emitting.numel():
        new_out, new_state = model.decoder.step(token.flatten()[emitting], tuple(s[emitting] for s in state))
        decoder_out[emitting] = model.joiner.decoder_proj(new_out)
        for kept, new in zip(state, new_state):
            kept[emitting] = new
    beams.state = state
    beams.decoder_out = decoder_out.view(n, beam, -1)
    return new_longest


def _merged(scores: torch.Tensor, tokens: torch.Tensor, lens: torch.Tensor) -> torch.Tensor:
    """Add the probabilities of equal rows.

    scores (N,B) sorted descending, tokens (N,B,U), lens (N,B) -> scores (N,B).

    Of equal rows the first, most probable one gets the sum and the others -inf.
    """
    same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).all(dim=-1) & (lens.unsqueeze(2) == lens.unsqueeze(1))
    minus_inf = torch.full_like(scores, float("-inf"))
    sums = torch.where(same, scores.unsqueeze(1), minus_inf.unsqueeze(1)).logsumexp(dim=-1)
    is_later = (same & torch.ones_like(same).tril(-1)).any(dim=-1)
    return torch.where(is_later, minus_inf, sums)
