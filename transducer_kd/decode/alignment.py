"""When a transducer emits the tokens of a reference, and how much later than another model it does.

A token's frame is the one in which the most probable path through the full lattice of the reference emits it:
the recursion of Graves 2012 (arXiv:1211.3711) with the maximum in place of the sum. The topology is that of
training: a frame emits any number of tokens and then a blank.

The delay of a token is its frame in one model minus its frame in the other, over the same audio and text.
That streaming models learn to emit late is what FastEmit (arXiv:2010.11148) and the delay-penalised
transducer (arXiv:2211.00490) are about. They measure it against times in the audio; here a reference model,
usually one with full context, stands for those. The time that a streaming encoder waits until its chunk is
complete comes on top of the delay.

Shapes: N utterances, T' encoder frames (40 ms), U tokens, V vocabulary. Node (t, u): u tokens have been
emitted and frame t is being looked at.
"""

import logging
from dataclasses import dataclass
from typing import Any, Iterable, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from transducer_kd.data.batch import Batch
from transducer_kd.log import UserError

FRAME_MS = 40

_LOGITS_AT_ONCE = 1 << 20
_RESAMPLES = 10000
_SEED = 0


@dataclass(frozen=True)
class Delay:
    """Delay of the tokens of a part, all counted alike, in encoder frames."""

    mean_frames: float
    low: float  # 95% bootstrap interval of the mean, over utterances
    high: float
    median_frames: float
    tokens: int
    utterances: int
    left_out: int  # utterances that were not measured

    def line(self) -> str:
        """For the log."""
        return (
            f"delay {self.mean_frames:.2f} frames ({FRAME_MS * self.mean_frames:.0f} ms), 95% interval "
            f"{self.low:.2f} to {self.high:.2f}, median {self.median_frames:g} "
            f"({self.tokens} tokens of {self.utterances} utterances)"
        )


def measure_delay(model: Any, reference: Any, batches: Iterable[Batch], part: str) -> Delay:
    """How much later than `reference` the `model` emits the tokens of a part.

    Both models have the same vocabulary and run in the mode they were trained in: with their chunk mask, a
    supernet with its masked weights too, or with full context; one of two modes streams. Utterances that have
    no transducer loss (no text, or T' < U) are left out, counted, and named in the log. UserError where none
    remains.
    """
    device = next(model.parameters()).device
    delays: List[np.ndarray] = []
    left_out: List[str] = []
    for batch in batches:
        moved = batch.to(device)
        frames, lens = emission_frames(model, moved)
        later = (frames - emission_frames(reference, moved)[0]).cpu().numpy()
        for n, (num_tokens, num_frames) in enumerate(zip(batch.y_lens.tolist(), lens.tolist())):
            if 0 < num_tokens <= num_frames:
                delays.append(later[n, :num_tokens])
            else:
                left_out.append(batch.cut_ids[n])
    if left_out:
        logging.warning(
            "%s: left out %d utterances without text or with fewer encoder frames than tokens (T' < U): %s%s",
            part, len(left_out), ", ".join(left_out[:10]), " ..." if len(left_out) > 10 else "",
        )  # fmt: skip
    if not delays:
        raise UserError(f"part {part} has no utterance with text and T' >= U to measure; name another part")
    return summarise(delays, len(left_out))


def summarise(delays: Sequence[np.ndarray], left_out: int = 0) -> Delay:
    """Mean, its interval and median of the delays of utterances, one (U,) each, U > 0.

    An utterance is drawn with all its tokens: those of one utterance are late together.
    """
    sums = np.array([d.sum() for d in delays], dtype=np.float64)
    counts = np.array([len(d) for d in delays])
    rng = np.random.default_rng(_SEED)
    draws = (rng.integers(0, len(delays), size=len(delays)) for _ in range(_RESAMPLES))
    low, high = np.percentile([sums[drawn].sum() / counts[drawn].sum() for drawn in draws], [2.5, 97.5])
    return Delay(
        mean_frames=float(sums.sum() / counts.sum()),
        low=float(low),
        high=float(high),
        median_frames=float(np.median(np.concatenate(delays))),
        tokens=int(counts.sum()),
        utterances=len(delays),
        left_out=left_out,
    )


@torch.inference_mode()
def emission_frames(model: Any, batch: Batch) -> Tuple[torch.Tensor, torch.Tensor]:
    """The frame in which each token of the batch is emitted, (N,U) int64, of which an utterance has its first
    y_lens; and encoder_out_lens (N,).
    """
    encoder_out, encoder_out_lens = model.encode(batch.features, batch.feature_lens)
    token, blank = arc_log_probs(model, encoder_out, encoder_out_lens, batch.y, batch.y_lens)
    frames, scores = best_paths(token, blank, encoder_out_lens, batch.y_lens)
    if not bool(scores.isfinite().all()):
        cut_id = batch.cut_ids[int((~scores.isfinite()).nonzero()[0])]
        raise UserError(
            f"cut {cut_id}: a model gives its text no finite log-probability, so the weights are damaged; "
            "take those of another epoch"
        )
    return frames, encoder_out_lens


def arc_log_probs(
    model: Any,
    encoder_out: torch.Tensor,
    encoder_out_lens: torch.Tensor,
    y: torch.Tensor,
    y_lens: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the next token (N,T',U) and of blank (N,T',U+1) at every node; 0 in the padding.

    encoder_out (N,T',encoder_dim), encoder_out_lens (N,), y (N,U), y_lens (N,). The logits of all classes are
    only there for some frames of one utterance at a time.
    """
    am = model.joiner.encoder_proj(encoder_out)
    lm = model.joiner.decoder_proj(model.decode_labels(y))
    token = am.new_zeros(len(y), am.size(1), y.size(1))
    blank = am.new_zeros(len(y), am.size(1), y.size(1) + 1)
    for n, (num_frames, num_tokens) in enumerate(zip(encoder_out_lens.tolist(), y_lens.tolist())):
        labels, position = y[n, :num_tokens], torch.arange(num_tokens, device=y.device)
        step = max(1, _LOGITS_AT_ONCE // ((num_tokens + 1) * model.vocab_size))
        for start in range(0, num_frames, step):
            some = slice(start, min(start + step, num_frames))
            logits = model.joiner(am[n, some, None], lm[n, None, : num_tokens + 1], project_input=False)
            total = logits.logsumexp(-1)  # (frames, U+1)
            blank[n, some, : num_tokens + 1] = logits[..., model.blank_id] - total
            token[n, some, :num_tokens] = logits[:, position, labels] - total[:, :-1]
    return token, blank


def best_paths(
    token: torch.Tensor, blank: torch.Tensor, encoder_out_lens: torch.Tensor, y_lens: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """The most probable path through each lattice.

    token (N,T',U), blank (N,T',U+1): log-probabilities, finite also in the padding, where they have no
    influence. Returns the frame that emits each token, (N,U) int64, meaningless from y_lens on, and the
    paths' log-probabilities (N,) float64, the blank of the last frame included.

    All nodes of a frame are found at once. A path that comes to frame t with v tokens and leaves it with u
    has emitted tokens v to u-1 there, at c[u] - c[v] with c the running sum of the frame's `token`. So the
    best score at (t, u) is c[u] + max_{v <= u} (arriving[v] - c[v]): a running maximum, whose index is v.
    """
    sums = F.pad(token.double().cumsum(2), (1, 0))
    arriving = torch.full_like(sums[:, 0], float("-inf"))
    arriving[:, 0] = 0.0
    entered = torch.empty(sums.shape, dtype=torch.int64, device=sums.device)  # v of (t, u)
    scores = torch.empty_like(sums[:, 0, 0])
    for t in range(sums.size(1)):
        best, entered[:, t] = (arriving - sums[:, t]).cummax(1)
        arriving = best + sums[:, t] + blank[:, t]
        at_end = arriving.gather(1, y_lens[:, None]).squeeze(1)
        scores = torch.where(encoder_out_lens == t + 1, at_end, scores)
    # Back from the end: left[n, t] tokens have been emitted when frame t is over.
    left = y_lens[:, None].repeat(1, sums.size(1))
    for t in range(sums.size(1) - 1, 0, -1):
        before = entered[:, t].gather(1, left[:, t : t + 1]).squeeze(1)
        left[:, t - 1] = torch.where(t < encoder_out_lens, before, y_lens)
    # Token u is emitted in the first frame that ends with more than u tokens.
    number = torch.arange(token.size(2), device=left.device).expand(len(left), -1)
    return torch.searchsorted(left, number.contiguous(), right=True), scores
