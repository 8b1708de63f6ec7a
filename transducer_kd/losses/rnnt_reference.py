"""Transducer loss in slow loops that read like the definition: the fast paths are tested against it.

N batch, T' encoder frames, U tokens, V vocabulary. At node (t, u), u tokens have been emitted and frame t is
being looked at; emitting the next token leads to (t, u+1), emitting blank (class 0) to (t+1, u). A path
starts at (0, 0) and ends with the blank of the last frame, from node (T'_n - 1, U_n). No token can be emitted
at u = U_n. `boundary` (N,4) holds [0, 0, U_n, T'_n]; nothing beyond it is read.

Source: Graves 2012 (arXiv:1211.3711), section 2.4. Everything is differentiable by autograd.
"""

from typing import List

import torch

BLANK_ID = 0
Lattice = List[List[torch.Tensor]]  # [t][u], scalars


def rnnt_loss_reference(logits: torch.Tensor, symbols: torch.Tensor, boundary: torch.Tensor) -> torch.Tensor:
    """-log p(symbols | logits), (N,), of logits (N,T',U+1,V) (unnormalised) and symbols (N,U)."""
    token, blank = arcs_reference(logits, symbols)
    return loss_of_arcs_reference(token, blank, boundary)


def arcs_reference(logits: torch.Tensor, symbols: torch.Tensor):
    """Log-probabilities of the next token (N,T',U) and of blank (N,T',U+1) at every node."""
    log_probs = logits.log_softmax(-1)
    tokens = symbols.shape[1]
    rows = [log_probs[n, :, range(tokens), symbols[n]] for n in range(len(symbols))]
    return torch.stack(rows), log_probs[..., BLANK_ID]


def loss_of_arcs_reference(token: torch.Tensor, blank: torch.Tensor, boundary: torch.Tensor) -> torch.Tensor:
    """-log of the sum over paths, (N,), of a lattice given by its arcs: token (N,T',U), blank (N,T',U+1)."""
    losses = []
    for n, (_, _, num_tokens, num_frames) in enumerate(boundary.tolist()):
        alpha = _alpha(token[n], blank[n], num_frames, num_tokens)
        losses.append(-(alpha[num_frames - 1][num_tokens] + blank[n, num_frames - 1, num_tokens]))
    return torch.stack(losses)


def occupancy(logits: torch.Tensor, symbols: torch.Tensor, boundary: torch.Tensor) -> torch.Tensor:
    """Posterior probability (N,T',U+1) of passing through each node; zero outside the boundary."""
    token, blank = arcs_reference(logits, symbols)
    passed = torch.zeros_like(blank)
    for n, (_, _, num_tokens, num_frames) in enumerate(boundary.tolist()):
        alpha = _alpha(token[n], blank[n], num_frames, num_tokens)
        beta = _beta(token[n], blank[n], num_frames, num_tokens)
        for t in range(num_frames):
            for u in range(num_tokens + 1):
                passed[n, t, u] = (alpha[t][u] + beta[t][u] - beta[0][0]).exp()
    return passed


def _alpha(token: torch.Tensor, blank: torch.Tensor, num_frames: int, num_tokens: int) -> Lattice:
    """Log-sum over the paths from (0, 0) to each node. token (T',U), blank (T',U+1)."""
    alpha: Lattice = [[] for _ in range(num_frames)]
    for t in range(num_frames):
        for u in range(num_tokens + 1):
            arriving = []
            if t > 0:
                arriving.append(alpha[t - 1][u] + blank[t - 1, u])
            if u > 0:
                arriving.append(alpha[t][u - 1] + token[t, u - 1])
            alpha[t].append(torch.stack(arriving).logsumexp(0) if arriving else blank.new_zeros(()))
    return alpha


def _beta(token: torch.Tensor, blank: torch.Tensor, num_frames: int, num_tokens: int) -> Lattice:
    """Log-sum over the paths from each node to the end, the last blank included."""
    beta: Lattice = [[blank.new_zeros(())] * (num_tokens + 1) for _ in range(num_frames)]
    for t in reversed(range(num_frames)):
        for u in reversed(range(num_tokens + 1)):
            leaving = []
            if t < num_frames - 1:
                leaving.append(blank[t, u] + beta[t + 1][u])
            elif u == num_tokens:
                leaving.append(blank[t, u])
            if u < num_tokens:
                leaving.append(token[t, u] + beta[t][u + 1])
            beta[t][u] = torch.stack(leaving).logsumexp(0)
    return beta
