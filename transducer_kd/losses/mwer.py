"""Minimum word error rate training on n-best lists (Prabhavalkar et al. 2018, arXiv:1712.01818).

Shapes: N utterances, B hypotheses of an utterance.
"""

import torch
from torch import Tensor

from transducer_kd.losses.precision import full_precision


def mwer_loss(nbest_scores: Tensor, errors: Tensor, mask: Tensor) -> Tensor:
    """Expected word errors of an n-best list, less their mean: (N,), in words.

    sum_b P_b (W_b - mean W) with P the softmax of the scores over the n-best. The mean says whether the
    model's choice beats a blind one and drops out of the gradient: d loss / d score_b is P_b (W_b - sum_c P_c
    W_c), so what makes fewer errors than the list's expectation gains probability. A list of one hypothesis,
    or of none, gives zero loss and zero gradient.

    nbest_scores (N, B) differentiable log-probabilities; errors (N, B) word errors; mask (N, B) bool, True
    where there is a hypothesis; other entries are not looked at. Computed in float32 at least.
    Raises ValueError where the shapes differ.
    """
    if not nbest_scores.shape == errors.shape == mask.shape:
        raise ValueError(
            f"scores {tuple(nbest_scores.shape)}, errors {tuple(errors.shape)} and mask {tuple(mask.shape)} "
            "must all be (N, B)"
        )
    scores = full_precision(nbest_scores)
    errors = errors.to(scores.dtype).masked_fill(~mask, 0.0)
    mean = errors.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    relative = (errors - mean).masked_fill(~mask, 0.0)
    # The lowest number, not -inf: a row without hypotheses stays free of NaN.
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(1) * relative).sum(1)
