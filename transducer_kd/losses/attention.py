"""Losses of the attention decoder (LAS): label-smoothed cross-entropy and distillation.

All are sums over the tokens of an utterance, in nats, per utterance, in float32 (float64 stays float64)
whatever autocast says; the caller decides how to normalise. What lies in padded positions, were it NaN, has
no influence on a loss or a gradient.

Shapes: N batch, U tokens, V vocabulary, of which class 0 is blank; `mask` (N, U+1) bool is True where a
    position counts. p is the student's probability, q the target's.
"""

from typing import Tuple

import torch
from torch import Tensor

from transducer_kd.losses.precision import full_precision

BLANK_ID, SOS_EOS_ID = 0, 1


def las_targets(y: Tensor, y_lens: Tensor) -> Tuple[Tensor, Tensor]:
    """What an attention decoder shall predict: the tokens, then <sos/eos>.

    y (N, U) int64, padded with anything; y_lens (N,). Returns targets (N, U+1) int64, 0 in the padding, and
    mask (N, U+1).
    """
    position = torch.arange(y.size(1) + 1, device=y.device)
    end = y_lens.unsqueeze(1)
    targets = torch.nn.functional.pad(y, (0, 1))
    targets = targets.masked_fill(position == end, SOS_EOS_ID).masked_fill(position > end, BLANK_ID)
    return targets, position <= end


def label_smoothed_ce(logits: Tensor, targets: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy (N,) against targets of which `smoothing` is spread over the classes but blank.

    sum over positions of -(1 - eps) log p_y - eps / (V-1) sum_{k > 0} log p_k: label smoothing of Szegedy et
    al. 2016 (arXiv:1512.00567, section 7) with a prior that is uniform over what an attention decoder may
    emit. logits (N, U+1, V), targets (N, U+1), mask: see the module; eps = `smoothing` in [0, 1).
    Raises ValueError where the shapes do not fit.
    """
    if logits.shape[:2] != targets.shape or mask.shape != targets.shape:
        raise ValueError(
            f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and mask {tuple(mask.shape)} must "
            "be (N, U+1, V), (N, U+1) and (N, U+1)"
        )
    with torch.autocast(logits.device.type, enabled=False):
        log_p = _valid(logits, mask).log_softmax(-1)
        loss = -(1 - smoothing) * log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        if smoothing > 0:
            loss = loss - smoothing * log_p[..., BLANK_ID + 1 :].mean(-1)
        return loss.masked_fill(~mask, 0.0).sum(1)


def las_kd_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """tau^2 KL(q || p) per utterance, (N,), with q and p the softmax of the logits divided by tau.

    Hinton et al. 2015 (arXiv:1503.02531): the factor tau^2 makes up for the temperature's division of the
    gradient, which is tau (p - q) with respect to a student's logit. The teacher gets no gradient.
    Both logits (N, U+1, V), forced on the same tokens; mask: see the module; tau = `temperature` > 0.
    Raises ValueError where the shapes do not fit or the temperature is not positive.
    """
    if student_logits.shape != teacher_logits.shape or mask.shape != student_logits.shape[:2]:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)}, teacher logits {tuple(teacher_logits.shape)} and "
            f"mask {tuple(mask.shape)} must be (N, U+1, V), the same, and (N, U+1)"
        )
    if temperature <= 0:
        raise ValueError(f"the temperature is {temperature}; it must be greater than 0")
    with torch.autocast(student_logits.device.type, enabled=False):
        log_p = (_valid(student_logits, mask) / temperature).log_softmax(-1)
        log_q = (_valid(teacher_logits.detach(), mask) / temperature).log_softmax(-1)
        # Written out, because a class that both forbid must give 0, and p = q exactly 0.
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
        return temperature**2 * divergence.masked_fill(~mask, 0.0).sum(1)


def _valid(logits: Tensor, mask: Tensor) -> Tensor:
    """At least float32, padded positions set to 0: a NaN there would come back through the gradient."""
    return full_precision(logits).masked_fill(~mask.unsqueeze(-1), 0.0)
