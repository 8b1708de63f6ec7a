"""Pruned transducer loss (Kuang et al. 2022, arXiv:2206.13236): a cheap loss over all nodes of the lattice,
pruning bounds from it, and the real joiner's loss over the nodes that are left.

N batch, T' encoder frames, U tokens, V vocabulary, D channels; k2's S is our U. Blank is class 0.
`boundary` (N,4) int64 is k2's [begin_symbol, begin_frame, end_symbol, end_frame] = [0, 0, U_n, T'_n].

Everything runs in float32 (float64 stays float64), whatever autocast says. Losses are per utterance, in nats,
so that the caller decides how to normalise. Padded frames and tokens never change a loss or a gradient.

A backend ("k2", "fast_rnnt", "torch") is the kernel that sums over the paths of a lattice; the
log-probabilities of its arcs and the pruning bounds are computed here once for all of them. This is the one
module of the losses that imports k2 or fast_rnnt, and only when they are asked for.
"""

import importlib
import importlib.util
import logging
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F

from transducer_kd.log import UserError
from transducer_kd.losses.lattice_recursion import NEG_INF, Grads, lattice_scores
from transducer_kd.losses.precision import full_precision

BLANK_ID = 0
MENDS = {
    "k2": "install the k2 wheel that matches your torch (tools/check_env.py prints the line)",
    "fast_rnnt": "run tools/setup.sh --env modern, which builds it",
}


def resolve_backend(name: str = "auto") -> str:
    """`name` itself where it can be imported; "auto" takes k2, else fast_rnnt, else torch.

    On a machine with CUDA, "auto" passes over a kernel that was built for the CPU alone.
    Raises UserError for an unknown name and for one that cannot be imported; it says what mends it.
    """
    if name == "torch":
        return name
    if name in MENDS:
        _kernel(name)
        return name
    if name != "auto":
        raise UserError(f"loss.backend: {name!r} is not one of auto, k2, fast_rnnt, torch")
    for candidate in MENDS:
        try:
            module = _kernel(candidate)
        except UserError as e:
            # What is installed is meant to be used: the wheel of another Python should not go unnoticed.
            if importlib.util.find_spec(candidate):
                logging.warning("going on without it: %s", e)
            continue
        if _has_cuda(module) or not torch.cuda.is_available():
            return candidate
    return "torch"


def make_boundary(y_lens: torch.Tensor, encoder_out_lens: torch.Tensor) -> torch.Tensor:
    """(N,) token counts and (N,) encoder frame counts -> boundary (N,4) int64 on the encoder's device."""
    device = encoder_out_lens.device
    boundary = torch.zeros(len(encoder_out_lens), 4, dtype=torch.int64, device=device)
    boundary[:, 2] = y_lens.to(device)
    boundary[:, 3] = encoder_out_lens
    return boundary


def simple_loss(
    lm: torch.Tensor,
    am: torch.Tensor,
    symbols: torch.Tensor,
    boundary: torch.Tensor,
    lm_scale: float,
    am_scale: float,
    backend: str,
) -> Tuple[torch.Tensor, Grads]:
    """Smoothed loss of the trivial joiner `am + lm` over the full lattice.

    lm (N,U+1,V), am (N,T',V) unnormalised; symbols (N,U) int64, padded with anything below V.
    The arcs' log-probabilities are (1 - lm_scale - am_scale) joint + lm_scale lm-only + am_scale am-only,
    where the am-only part uses the batch's mean lm distribution (over valid tokens). With am_scale = 0 an
    utterance's loss does not depend on what else is in the batch.
    Returns loss (N,) and (px_grad (N,U,T'), py_grad (N,U+1,T')), the arcs' occupancies, for `prune_ranges`.
    Raises UserError for utterances of fewer encoder frames than tokens.
    """
    _check_shapes(am.shape[1], symbols, boundary, "am", lm.shape[1] == symbols.shape[1] + 1)
    with torch.autocast(am.device.type, enabled=False):
        px, py = _simple_arcs(full_precision(lm), full_precision(am), symbols, boundary, lm_scale, am_scale)
        scores, px_grad, py_grad = _LatticeScore.apply(px, py, boundary, backend, True)
    return -scores, (px_grad, py_grad)


@torch.no_grad()
def prune_ranges(
    px_grad: torch.Tensor, py_grad: torch.Tensor, boundary: torch.Tensor, s_range: int
) -> torch.Tensor:
    """Which `s_range` consecutive token positions each frame keeps: (N, T', s_range) int64.

    Each frame first takes the window that holds most of its blanks' occupancy, less what enters the window's
    first node from outside by a token (section 3.2 of the paper). Then the windows are moved so that paths
    survive: they start at 0, end at U_n, never go back and never jump over a token. `s_range` is lowered to
    U + 1 where U is small. The bounds are the same for every backend. Raises UserError for s_range < 2.
    """
    if s_range < 2:
        raise UserError(f"loss.s_range is {s_range}; at least 2 are needed, or no path can emit a token")
    num_frames = py_grad.shape[2]
    s_range = min(s_range, py_grad.shape[1])
    kept_mass = py_grad.unfold(1, s_range, 1).sum(-1)  # (N, U+2-s_range, T')
    kept_mass[:, 1:] -= px_grad[:, : kept_mass.shape[1] - 1]
    first = kept_mass.argmax(dim=1)  # (N, T')

    # From the last valid frame on: the window that ends with the last token.
    t = torch.arange(num_frames, device=first.device)
    last_first = (boundary[:, 2:3] - s_range + 1).clamp(min=0)
    first = torch.where(t < boundary[:, 3:4] - 1, first, last_first)
    first = _backward_min(first)
    # first[t+1] - first[t] < s_range says that (s_range - 1) t - first[t] never falls. A window that would
    # have to start below 0 to obey starts at 0: clamping before undoing the change keeps the steps legal.
    ramp = (s_range - 1) * t
    first = ramp - _backward_min(ramp - first).clamp(min=0)
    return first[:, :, None] + torch.arange(s_range, device=first.device)


def gather_pruned(
    am: torch.Tensor, lm: torch.Tensor, ranges: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor]:
    """am (N,T',D), lm (N,U+1,D), ranges (N,T',s_range) -> both (N,T',s_range,D); am is a view, lm a copy."""
    n, tokens, dim = lm.shape
    # A lookup of whole rows: the gradient is summed into (N (U+1), D), never held at (N, T', U+1, D).
    rows = ranges + tokens * torch.arange(n, device=ranges.device)[:, None, None]
    am_pruned = am[:, :, None, :].expand(*ranges.shape, am.shape[-1])
    return am_pruned, F.embedding(rows, lm.reshape(n * tokens, dim))


def pruned_loss(
    logits: torch.Tensor, symbols: torch.Tensor, ranges: torch.Tensor, boundary: torch.Tensor, backend: str
) -> torch.Tensor:
    """Transducer loss (N,) over the nodes of `ranges`.

    logits (N,T',s_range,V) unnormalised, symbols (N,U) int64, ranges (N,T',s_range).
    With s_range = U + 1 it is the full transducer loss. Raises UserError as `simple_loss` does.
    """
    _check_shapes(logits.shape[1], symbols, boundary, "logits", logits.shape[:3] == ranges.shape)
    with torch.autocast(logits.device.type, enabled=False):
        px, py = pruned_arcs(logits, symbols, ranges)
        return -_LatticeScore.apply(px, py, boundary, backend, False)[0]


def pruned_arcs(logits: torch.Tensor, symbols: torch.Tensor, ranges: torch.Tensor) -> Grads:
    """Log-probabilities of the arcs of the nodes of `ranges`, in the full lattice: (N,U,T') and (N,U+1,T').

    logits (N,T',s_range,V), symbols (N,U), ranges (N,T',s_range). Arcs of nodes not kept are closed.
    """
    logits = full_precision(logits)
    normalizer = logits.logsumexp(-1)
    token = logits.gather(-1, next_token(symbols, ranges)[..., None])[..., 0] - normalizer
    blank = logits[..., BLANK_ID] - normalizer
    closed = token.new_full((*ranges.shape[:2], symbols.shape[1] + 1), NEG_INF)
    px = closed.scatter(2, ranges, token)[:, :, :-1]
    py = closed.scatter(2, ranges, blank)
    return px.transpose(1, 2), py.transpose(1, 2)


def next_token(symbols: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """(N,T',s_range) id of the token after each kept node; at u = U, where none is, an unused blank."""
    padded = F.pad(symbols, (0, 1), value=BLANK_ID)
    return padded[:, None, :].expand(-1, ranges.shape[1], -1).gather(2, ranges)


def _simple_arcs(
    lm: torch.Tensor,
    am: torch.Tensor,
    symbols: torch.Tensor,
    boundary: torch.Tensor,
    lm_scale: float,
    am_scale: float,
) -> Grads:
    """Log-probabilities px (N,U,T'), py (N,U+1,T') of the smoothed `am + lm` joiner.

    The joint normaliser log sum_v exp(lm_v + am_v) is one matrix product of exponentials, each shifted by its
    own maximum so that none overflows; `tiny` keeps the logarithm finite where all products underflow.
    """
    tiny = torch.finfo(am.dtype).tiny
    am_max, lm_max = am.detach().amax(2, keepdim=True), lm.detach().amax(2, keepdim=True)
    am_probs, lm_probs = (am - am_max).exp(), (lm - lm_max).exp()
    normalizer = (
        (lm_probs @ am_probs.transpose(1, 2) + tiny).log() + lm_max + am_max.transpose(1, 2)
    )  # (N,U+1,T')

    token_am = am.gather(2, symbols[:, None, :].expand(-1, am.shape[1], -1)).transpose(1, 2)  # (N,U,T')
    token_lm = lm[:, :-1].gather(2, symbols[:, :, None])  # (N,U,1)
    blank_am, blank_lm = am[:, None, :, BLANK_ID], lm[:, :, BLANK_ID, None]  # (N,1,T'), (N,U+1,1)
    px = token_am + token_lm - normalizer[:, :-1]
    py = blank_am + blank_lm - normalizer
    joint_scale = 1.0 - lm_scale - am_scale
    px, py = joint_scale * px, joint_scale * py

    lm_sum = lm_probs.sum(2, keepdim=True)
    if lm_scale != 0:
        lm_normalizer = lm_sum.log() + lm_max  # (N,U+1,1)
        px = px + lm_scale * (token_lm - lm_normalizer[:, :-1])
        py = py + lm_scale * (blank_lm - lm_normalizer)
    if am_scale != 0:
        valid = torch.arange(lm.shape[1], device=lm.device) <= boundary[:, 2:3]  # (N,U+1)
        unigram = (lm_probs / lm_sum)[valid].mean(0) + tiny  # (V,)
        am_normalizer = ((am_probs @ unigram).log() + am_max[:, :, 0])[:, None, :]  # (N,1,T')
        unigram = unigram.log()
        px = px + am_scale * (token_am + unigram[symbols][:, :, None] - am_normalizer)
        py = py + am_scale * (blank_am + unigram[BLANK_ID] - am_normalizer)
    return px, py


class _LatticeScore(torch.autograd.Function):
    """Lattice score (N,) by the backend's kernel, and the arcs' occupancies, which are its gradient.

    The occupancies are computed in the forward pass and kept, so that the backward pass is two products and
    never touches what the caller was given (fast_rnnt's own backward overwrites it).
    """

    @staticmethod
    def forward(
        ctx: Any, px: torch.Tensor, py: torch.Tensor, boundary: torch.Tensor, backend: str, want_grads: bool
    ):
        needs_grad = px.requires_grad or py.requires_grad
        with_grads = want_grads or needs_grad
        if backend == "torch":
            scores, grads = lattice_scores(px, py, boundary, with_grads)
        else:
            scores, grads = _kernel_scores(px, py, boundary, with_grads, backend)
        if grads is None:
            return scores, None, None
        if needs_grad:
            ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*grads)
        return (scores, *grads)

    @staticmethod
    def backward(ctx: Any, scores_grad: torch.Tensor, *_: Optional[torch.Tensor]):
        px_grad, py_grad = ctx.saved_tensors
        scores_grad = scores_grad[:, None, None]
        return px_grad * scores_grad, py_grad * scores_grad, None, None, None


def _kernel_scores(
    px: torch.Tensor, py: torch.Tensor, boundary: torch.Tensor, with_grads: bool, backend: str
) -> Tuple[torch.Tensor, Optional[Grads]]:
    """`lattice_scores` by the kernel of k2 or fast_rnnt; both have the same interface."""
    module = _kernel(backend)
    if px.is_cuda and not _has_cuda(module):
        raise UserError(
            f"this {backend} was built without CUDA; install one with it, or set loss.backend to torch"
        )
    # The kernels want a frame T' without tokens after the last one, and at least one token: an empty batch
    # gets a row that no path enters.
    t = torch.arange(px.shape[2] + 1, device=px.device)
    px = F.pad(px, (0, 1), value=NEG_INF).masked_fill(t >= boundary[:, 3, None, None], NEG_INF)
    rows = px.shape[1]
    if rows == 0:
        px, py = F.pad(px, (0, 0, 0, 1), value=NEG_INF), F.pad(py, (0, 0, 0, 1), value=NEG_INF)
    result = module.mutual_information_recursion(
        px.contiguous(), py.contiguous(), boundary, return_grad=with_grads
    )
    if not with_grads:
        return result, None
    scores, (px_grad, py_grad) = result
    return scores, (px_grad[:, :rows, :-1].contiguous(), py_grad[:, : rows + 1].contiguous())


def _kernel(backend: str) -> Any:
    try:
        return importlib.import_module(backend)
    except (ImportError, OSError) as e:
        raise UserError(
            f"loss.backend is {backend}, which cannot be imported ({e}): {MENDS[backend]}, "
            "or use --set loss.backend=auto"
        ) from e


def _has_cuda(module: Any) -> bool:
    flag = module.with_cuda  # a bool in k2, a function in fast_rnnt
    return bool(flag() if callable(flag) else flag)


def _backward_min(x: torch.Tensor) -> torch.Tensor:
    """The minimum of each entry and all that follow it on the last axis."""
    return x.flip(-1).cummin(-1)[0].flip(-1)


def _check_shapes(
    num_frames: int, symbols: torch.Tensor, boundary: torch.Tensor, name: str, fits: bool
) -> None:
    n, tokens = symbols.shape
    if not fits or boundary.shape != (n, 4):
        raise ValueError(
            f"{name} does not fit symbols {tuple(symbols.shape)}, T'={num_frames}, "
            f"boundary {tuple(boundary.shape)}"
        )
    if (
        num_frames >= tokens
    ):  # decided from the padded sizes where they suffice: looking at values waits for the GPU
        return
    short = [(i, t, u) for i, (_, _, u, t) in enumerate(boundary.tolist()) if t < u]
    if short:
        i, t, u = short[0]
        raise UserError(
            f"{len(short)} of {n} utterances have fewer encoder frames than tokens, such as number {i} in "
            f"the batch (T'={t}, U={u}; symbols {tuple(symbols.shape)}): drop them before the batch is made"
        )
