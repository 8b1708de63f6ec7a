"""Losses of wav2vec 2.0: which of the utterance's masked frames is it, and are all codes in use?

    l_t = -log( exp(s(c_t, q_t)) / sum over q in {q_t} + Q_t of exp(s(c_t, q)) ),  s(c, q) = cos(c, q) / kappa

c_t: the encoder's output where frame t is hidden; q_t: the quantised frame; Q_t: K distractors, which are
quantised frames from elsewhere in the same utterance. Baevski et al. 2020 (arXiv:2006.11477), equation 3.

Shapes: N batch, M masked frames (those of each utterance packed to the front), K distractors, E channels, G
codebooks, V entries of a codebook.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from transducer_kd.losses.precision import full_precision

_SMALLEST_SHARE = 1e-10  # an entry that is never used has no logarithm


def sample_distractors(
    masked_lens: Tensor, num_distractors: int, generator: Optional[torch.Generator] = None
) -> Tensor:
    """For each masked frame others of its utterance, uniform with replacement: (N, M, K) int64.

    masked_lens (N,) int64; M is the largest of them, at least 1. What stands in the rows of padding, and of a
    frame that is its utterance's only one, is an index below M and means nothing. `generator` draws on its
    own device, so that one of the CPU gives the same on a GPU.
    """
    slots = max(1, int(masked_lens.max()))
    place = masked_lens.device if generator is None else generator.device
    draws = torch.randint(
        2**31 - 1, (len(masked_lens), slots, num_distractors), generator=generator, device=place
    ).to(masked_lens.device)
    index = draws % (masked_lens - 1).clamp(min=1)[:, None, None]
    # The frame itself is left out by counting on behind it.
    itself = torch.arange(slots, device=index.device).unsqueeze(1)
    return (index + (index >= itself)).clamp(max=slots - 1)


def contrastive_loss(
    context: Tensor,
    target: Tensor,
    target_ids: Tensor,
    masked_lens: Tensor,
    distractors: Tensor,
    temperature: float,
) -> Tuple[Tensor, Tensor, Tensor]:
    """The contrastive loss, and how often the true frame was found, summed over an utterance's masked frames.

    A distractor with the same quantised vector as the true frame is left out, as fairseq does: no score
    could tell them apart. An utterance with fewer than two masked frames contributes nothing. What lies in
    padded positions, were it NaN, has no influence.

    Args:
        context, target: (N, M, E), of any length: the cosine counts.
        target_ids: (N, M) int64, equal where the quantised vectors are. The targets themselves do not tell: a
            matrix product may round equal rows differently.
        masked_lens: (N,) int64; distractors: (N, M, K), see sample_distractors; temperature: kappa > 0.
    Returns:
        losses (N,) in nats, float32 at least, whatever autocast says.
        correct (N,): frames whose true target scores strictly higher than all distractors.
        chance (N,): what guessing would get right, the sum of 1 / (1 + number of different vectors among the
            distractors). In a short utterance the K draws repeat few frames, and frames share codes, so this
            is more than 1 / (1 + K) each; it is 1 where no distractor is left.
    """
    with torch.autocast(context.device.type, enabled=False):
        frame = torch.arange(context.size(1), device=context.device)
        valid = (frame < masked_lens.unsqueeze(1)) & (masked_lens.unsqueeze(1) > 1)
        context, target = (
            F.normalize(full_precision(x).masked_fill(~valid.unsqueeze(-1), 0.0), dim=-1)
            for x in (context, target)
        )
        scores = context @ target.transpose(1, 2) / temperature  # (N, M, M): of every pair only once
        # How often each frame is drawn. A sum over draws becomes one over frames with this weight.
        draws = torch.zeros_like(scores).scatter_add_(
            2, distractors, torch.ones_like(distractors, dtype=scores.dtype)
        )
        same = target_ids.unsqueeze(2) == target_ids.unsqueeze(1)
        draws = draws.masked_fill(same, 0.0)
        positive = scores.diagonal(dim1=1, dim2=2)
        weights = draws + torch.eye(len(frame), device=frame.device, dtype=draws.dtype)
        losses = (scores + weights.log()).logsumexp(-1) - positive
        losses = losses.masked_fill(~valid, 0.0).sum(1)
        rival = scores.detach().masked_fill(draws == 0, -torch.inf).amax(-1)
        correct = ((positive > rival) & valid).to(losses.dtype).sum(1)
        # All frames with one vector are counted at the first of them.
        first = same.to(torch.uint8).argmax(-1).unsqueeze(1).expand(draws.shape)
        num_others = (torch.zeros_like(draws).scatter_add_(2, first, draws) > 0).sum(-1)
        chance = (1 / (1 + num_others.to(losses.dtype))).masked_fill(~valid, 0.0).sum(1)
    return losses, correct, chance


def perplexity(use: Tensor) -> Tensor:
    """exp(H) (G,) of `use` (G, V), counts or sums of probabilities of each entry: V where all are used
    equally, 1 where only one is.
    """
    share = full_precision(use)
    share = share / share.sum(-1, keepdim=True).clamp(min=_SMALLEST_SHARE)
    return (-(share * share.clamp(min=_SMALLEST_SHARE).log()).sum(-1)).exp()


def diversity_loss(probabilities: Tensor) -> Tensor:
    """(GV - sum over g of exp(H(mean p_g))) / GV, (): 0 where all entries are used equally, near 1 where few.

    probabilities (frames, G, V), a softmax without noise, whose mean is over all frames. The paper (equation
    4) has -H / GV; this is the form of fairseq, which is bounded and says which share of the entries is idle.
    """
    with torch.autocast(probabilities.device.type, enabled=False):
        use = full_precision(probabilities).sum(0)
        return 1 - perplexity(use).sum() / use.numel()
