"""Soft-target distillation of a transducer on the nodes of its lattice: KL(teacher || student) at each node.

N batch, T' encoder frames, U tokens, V vocabulary, S nodes kept per frame (U + 1 for the full lattice).
Node (t, u): u tokens emitted before frame t is over. `ranges` (N,T',S) names the u of each kept node;
`boundary` (N,4) is [0, 0, U_n, T'_n]. Blank is class 0. q is the teacher's distribution, p the student's.

    form "full"       sum_k q_k log(q_k / p_k) over the vocabulary
    form "collapsed"  the same over {next token, blank, rest}; over {blank, rest} at u = U_n, where no token
                      can follow

Both models' logits are divided by the temperature tau before anything else and the divergence is multiplied
by tau^2, which keeps the size of its gradient (Hinton et al. 2015, arXiv:1503.02531). Collapsed classes:
Panchapagesan et al. 2021 (arXiv:2011.06110). Everything runs in float32 (float64 stays float64), whatever
autocast says. Padded frames and tokens never change a loss or a gradient. The twin is `distill_reference.py`.
"""

import math
from dataclasses import dataclass
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from transducer_kd.log import UserError
from transducer_kd.losses.lattice_recursion import NEG_INF, lattice_scores
from transducer_kd.losses.precision import full_precision
from transducer_kd.losses.pruned_rnnt import BLANK_ID, next_token, pruned_arcs

CHOICES = {
    "form": ("full", "collapsed"),
    "weighting": ("uniform", "occupancy"),
    "normalise_by": ("nodes", "frames"),
}
MAX_TRIMMED_FRAMES = 2  # what a different padding of the subsampling explains; more is another frame rate


@dataclass(frozen=True)
class LatticeDistillOptions:
    """What is compared where, and what the sum is to be divided by. Raises UserError for senseless values."""

    form: str = "collapsed"  # full | collapsed
    temperature: float = 1.0
    frame_shift: int = 0  # encoder frames by which the student may be later than the teacher
    weighting: str = "uniform"  # uniform | occupancy: the teacher's posterior of passing the node
    normalise_by: str = "nodes"  # nodes | frames: the count that comes with each loss

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"distillation: {name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"distillation: temperature={self.temperature} must be finite and above 0")
        if self.frame_shift < 0 or self.frame_shift != int(self.frame_shift):
            raise UserError(
                f"distillation: frame_shift={self.frame_shift} must be a whole number of encoder frames, 0 "
                "or more: the student is compared with an earlier frame of the teacher"
            )


def full_ranges(n: int, num_frames: int, tokens: int, device: Any = None) -> torch.Tensor:
    """`ranges` (N,T',U+1) int64 that keep every node, as a view of one row."""
    return torch.arange(tokens + 1, device=device).expand(n, num_frames, tokens + 1)


def shift_ranges(ranges: torch.Tensor, frame_shift: int) -> torch.Tensor:
    """The nodes to evaluate the teacher on, (N,T',S), for a student on `ranges` that is `frame_shift` later.

    Row t of the result is row t + frame_shift of `ranges`, so that the pair (student t, teacher t - d) looks
    at the same tokens although the window moves with t. The last rows, which nobody looks at, repeat the end.
    """
    last = ranges.shape[1] - 1
    frames = (torch.arange(last + 1, device=ranges.device) + frame_shift).clamp(max=max(last, 0))
    return ranges[:, frames]


def align_frames(
    student: torch.Tensor, teacher: torch.Tensor, student_lens: torch.Tensor, teacher_lens: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut two outputs for the same audio, (N,T',...) each with lengths (N,), to the frames that both have.

    Returns (student, teacher, lens). The ends go: subsampling differs by how much of the end it drops.
    Raises UserError where the batch or an utterance differs by more than 2 frames.
    """
    frames = student.shape[1], teacher.shape[1]
    gaps = (student_lens - teacher_lens).abs()
    worst = int(gaps.max()) if len(gaps) else 0
    if worst > MAX_TRIMMED_FRAMES or abs(frames[0] - frames[1]) > MAX_TRIMMED_FRAMES:
        i = int(gaps.argmax())
        raise UserError(
            f"the student's subsampling gives {frames[0]} encoder frames for a batch ({int(student_lens[i])} "
            f"for its utterance {i}), the teacher's gives {frames[1]} ({int(teacher_lens[i])}); more than "
            f"{MAX_TRIMMED_FRAMES} frames apart they cannot be compared: give both the same subsampling and "
            "the same features"
        )
    common = min(frames)
    return student[:, :common], teacher[:, :common], torch.minimum(student_lens, teacher_lens)


@torch.no_grad()
def node_occupancy(
    teacher_logits: torch.Tensor, symbols: torch.Tensor, ranges: torch.Tensor, boundary: torch.Tensor
) -> torch.Tensor:
    """The teacher's posterior (N,T',U+1) of passing each node of its lattice; zero at nodes not kept.

    teacher_logits (N,T',S,V) on the nodes of `ranges` (N,T',S). Zero everywhere for an utterance for which
    `ranges` leave no path.
    """
    with torch.autocast(teacher_logits.device.type, enabled=False):
        px, py = pruned_arcs(teacher_logits, symbols, ranges)
        _, arcs = lattice_scores(px, py, boundary)
    return occupancy_of_arcs(*arcs)


def occupancy_of_arcs(px_grad: torch.Tensor, py_grad: torch.Tensor) -> torch.Tensor:
    """Arcs' occupancies (N,U,T') and (N,U+1,T'), such as the simple loss returns -> nodes' (N,T',U+1).

    Whoever passes a node leaves it by one of its two arcs.
    """
    return (py_grad + F.pad(px_grad, (0, 0, 0, 1))).transpose(1, 2).detach()


def lattice_kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    symbols: torch.Tensor,
    ranges: torch.Tensor,
    boundary: torch.Tensor,
    options: LatticeDistillOptions,
    occupancy: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum over the nodes of tau^2 KL(teacher || student): losses (N,) in nats and counts (N,).

    student_logits (N,T',S,V) on the nodes of `ranges` (N,T',S); teacher_logits (N,T',S,V) on those of
    `shift_ranges(ranges, frame_shift)`, which are the same without a shift and for the full lattice.
    symbols (N,U), padded with anything below V. occupancy (N,T',U+1) over the teacher's frames, for that
    weighting alone. Row t < frame_shift has no partner and does not count.
    The counts are the nodes or frames compared, by `normalise_by`: losses.sum() / counts.sum() means the same
    at every batch size. Weights are 1, or proportional to the occupancy and summing to the utterance's count;
    they are equal where no node compared has any. An utterance shorter than the shift has loss and count 0.
    The teacher gets no gradient. Raises ValueError for shapes that do not fit.
    """
    _check(student_logits, teacher_logits, symbols, ranges, boundary)
    if (occupancy is None) == (options.weighting == "occupancy"):
        raise ValueError(f"weighting {options.weighting!r}, but occupancy is {type(occupancy).__name__}")
    shift, num_frames = options.frame_shift, ranges.shape[1]
    if shift:
        partners = max(num_frames - shift, 0)
        student_logits, ranges = student_logits[:, shift:], ranges[:, shift:]
        teacher_logits = teacher_logits[:, :partners]
    t = shift + torch.arange(ranges.shape[1], device=ranges.device)
    valid = (t < boundary[:, 3:4])[:, :, None] & (ranges <= boundary[:, 2, None, None])

    token = has_token = None
    if options.form == "collapsed":
        token, has_token = _next_token(symbols, ranges, boundary)
    with torch.autocast(student_logits.device.type, enabled=False):
        divergence = _NodeDivergence.apply(
            student_logits, teacher_logits.detach(), valid, token, has_token, float(options.temperature)
        )
        frames = (boundary[:, 3] - shift).clamp(min=0)
        counts = (valid.sum((1, 2)) if options.normalise_by == "nodes" else frames).to(divergence.dtype)
        if occupancy is None:  # the divergence is zero outside
            return divergence.sum((1, 2)), counts
        passed = occupancy.detach()[:, : ranges.shape[1]].gather(2, ranges).to(divergence.dtype)
        return (_weights(passed, valid, counts) * divergence).sum((1, 2)), counts


def _weights(passed: torch.Tensor, valid: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Occupancies (N,T',S) scaled so that the valid ones sum to counts (N,)."""
    passed = passed.masked_fill(~valid, 0.0)
    total = passed.sum((1, 2), keepdim=True)
    passed = torch.where(total > 0, passed, valid.to(passed.dtype))
    total = passed.sum((1, 2), keepdim=True).clamp(min=torch.finfo(passed.dtype).tiny)
    return passed / total * counts[:, None, None]


class _NodeDivergence(torch.autograd.Function):
    """tau^2 KL(teacher || student) at each node (N,T',S), zero where it is not valid.

    The gradient of a node's value by the student's logits is known in closed form and is written over the
    student's own probabilities, so that one tensor of the logits' size is kept for the backward pass; plain
    autograd keeps two of them for the full form, and more for the collapsed one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        valid: torch.Tensor,
        token: Optional[torch.Tensor],
        has_token: Optional[torch.Tensor],
        temperature: float,
    ) -> torch.Tensor:
        if token is None:
            value, gradient = _full_divergence(student, teacher, temperature)
        else:
            value, gradient = _collapsed_divergence(student, teacher, token, has_token, temperature)
        if ctx.needs_input_grad[0]:
            # Filled, not multiplied: what stands in the padding may be inf or nan.
            ctx.save_for_backward(gradient.masked_fill_(~valid[..., None], 0.0))
            ctx.temperature = temperature
            ctx.student_dtype = student.dtype
        return value.mul_(temperature**2).masked_fill_(~valid, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, value_grad: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        scale = ctx.temperature * value_grad[..., None]  # tau^2 of the value, 1 / tau of the scaled logits
        # In place: on a CPU another tensor of this size costs more than the product. Autograd refuses a
        # second backward over what was overwritten.
        return gradient.mul_(scale).to(ctx.student_dtype), None, None, None, None, None


def _full_divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    """KL over V (N,T',S), and p - q (N,T',S,V), its gradient by the student's scaled logits."""
    log_p = _scaled(student, temperature).log_softmax(-1)
    log_q = _scaled(teacher, temperature).log_softmax(-1)
    q = log_q.exp()
    value = log_q.sub_(log_p).mul_(q).sum(-1)
    return value, log_p.exp_().sub_(q)


def _collapsed_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    token: torch.Tensor,
    has_token: torch.Tensor,
    temperature: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """KL over the classes (N,T',S), and its gradient (N,T',S,V) by the student's scaled logits.

    p_c - q_c for the two classes of one member. A member k of the rest gets its share of the class's
    p_r - q_r: p_k / p_r, a softmax over the rest, which is p_k (1 - q_r / p_r) without dividing by a p_r that
    may underflow.
    """
    log_q = _collapse(teacher, token, has_token, temperature)[0]
    log_p, gradient = _collapse(student, token, has_token, temperature)
    q = log_q.exp()
    # A class with q = 0 adds nothing; the token's at u = U_n would add 0 (-inf - -inf).
    value = log_q.sub_(log_p).mul_(q).masked_fill_(q == 0, 0.0).sum(-1)
    by_class = log_p.exp_().sub_(q)
    gradient.mul_(by_class[..., 2:])
    gradient.scatter_(-1, token[..., None], by_class[..., :1])
    gradient[..., BLANK_ID] = by_class[..., 1]  # after the token, whose id is blank where there is none
    return value, gradient


def _collapse(
    logits: torch.Tensor, token: torch.Tensor, has_token: torch.Tensor, temperature: float
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (N,T',S,3) of {token, blank, rest}, and the softmax over the rest (N,T',S,V; 0 at the
    two others). 1 - p_token - p_blank would cancel where rest is small.

    The softmax and its logsumexp are written out because they share their work and one tensor."""
    rest = full_precision(logits) / temperature  # a copy, overwritten below
    token = token[..., None]
    token_logit = rest.gather(-1, token)[..., 0].masked_fill_(~has_token, NEG_INF)
    blank_logit = rest[..., BLANK_ID].clone()
    rest.scatter_(-1, token, NEG_INF)
    rest[..., BLANK_ID] = NEG_INF
    highest = rest.amax(-1, keepdim=True)
    total = rest.sub_(highest).exp_().sum(-1, keepdim=True)
    rest_logit = (highest + total.log())[..., 0]
    classes = torch.stack([token_logit, blank_logit, rest_logit], dim=-1)
    return classes.log_softmax(-1), rest.div_(total)


def _next_token(
    symbols: torch.Tensor, ranges: torch.Tensor, boundary: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Token after each node (N,T',S) and whether there is one; from u = U_n on none is: blank's id."""
    has_token = ranges < boundary[:, 2, None, None]
    return next_token(symbols, ranges).masked_fill(~has_token, BLANK_ID), has_token


def _scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = full_precision(logits)
    return logits if temperature == 1 else logits / temperature  # 1 is the common case and needs no copy


def _check(
    student: torch.Tensor,
    teacher: torch.Tensor,
    symbols: torch.Tensor,
    ranges: torch.Tensor,
    boundary: torch.Tensor,
) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} are not on the "
            "same nodes and vocabulary; align_frames trims encoder outputs"
        )
    if (
        student.shape[:3] != ranges.shape
        or boundary.shape != (len(symbols), 4)
        or len(symbols) != len(ranges)
    ):
        raise ValueError(
            f"logits {tuple(student.shape)} do not fit ranges {tuple(ranges.shape)}, "
            f"symbols {tuple(symbols.shape)}, boundary {tuple(boundary.shape)}"
        )
    if student.shape[-1] < 3:
        raise ValueError(f"V={student.shape[-1]}; a token, blank and a rest make at least 3 classes")
