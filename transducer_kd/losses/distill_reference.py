"""Lattice distillation in slow loops that read like the definition: `distill.py` is tested against it.

N batch, T' encoder frames, U tokens, V vocabulary. Both models' logits are over the full lattice,
(N,T',U+1,V); `ranges` (N,T',S) only say which nodes of the student count. Differentiable by autograd.
"""

from typing import List, Optional, Tuple

import torch

from transducer_kd.losses.distill import LatticeDistillOptions
from transducer_kd.losses.rnnt_reference import BLANK_ID


def lattice_kd_reference(
    student: torch.Tensor,
    teacher: torch.Tensor,
    symbols: torch.Tensor,
    ranges: torch.Tensor,
    boundary: torch.Tensor,
    options: LatticeDistillOptions,
    occupancy: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Losses (N,) and counts (N,), as `distill.lattice_kd_loss` gives them; occupancy (N,T',U+1)."""
    losses, counts = [], []
    for n, (_, _, num_tokens, num_frames) in enumerate(boundary.tolist()):
        values, weights, frames = [], [], set()
        for t in range(options.frame_shift, num_frames):
            partner = t - options.frame_shift
            for u in ranges[n, t].tolist():
                if u > num_tokens:
                    continue
                token = int(symbols[n, u]) if u < num_tokens else None
                values.append(_divergence(student[n, t, u], teacher[n, partner, u], token, options))
                weights.append(1.0 if occupancy is None else float(occupancy[n, partner, u]))
                frames.add(t)
        count = len(values) if options.normalise_by == "nodes" else len(frames)
        if occupancy is not None and values:
            if sum(weights) == 0:
                weights = [1.0] * len(values)
            weights = [count * w / sum(weights) for w in weights]
        zero = student.sum() * 0
        losses.append(sum((w * value for w, value in zip(weights, values)), zero))
        counts.append(count)
    return torch.stack(losses), torch.tensor(counts)


def _divergence(
    student: torch.Tensor, teacher: torch.Tensor, token: Optional[int], options: LatticeDistillOptions
) -> torch.Tensor:
    """tau^2 KL(teacher || student) of one node's logits (V,); `token` is None where none can follow."""
    tau = options.temperature
    p, q = (student / tau).softmax(-1), (teacher.detach() / tau).softmax(-1)
    if options.form == "collapsed":
        p, q = _collapsed(p, token), _collapsed(q, token)
    return tau**2 * (q * (q.log() - p.log())).sum()


def _collapsed(probs: torch.Tensor, token: Optional[int]) -> torch.Tensor:
    """(V,) -> probabilities of {token, blank, rest}, or of {blank, rest}."""
    single = [BLANK_ID] if token is None else [token, BLANK_ID]
    rest: List[int] = [k for k in range(len(probs)) if k not in single]
    return torch.cat([probs[single], probs[rest].sum()[None]])
