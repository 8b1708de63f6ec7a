"""Total score and arc occupancies of a transducer lattice, in plain torch, for CPU and CUDA.

N batch, T' encoder frames, U tokens. Node (u, t): u tokens emitted before frame t is over. Two arcs leave it:
    px[n, u, t]   emit token u, go to (u+1, t)        (N, U, T')
    py[n, u, t]   emit blank, go to (u, t+1)          (N, U+1, T')
A path runs from (0, 0) to (U_n, T'_n); the blank of the last frame is the last arc.

All arcs lead from anti-diagonal d = u + t to d + 1, so a diagonal of the whole batch is computed at once and
the loop has T' + U steps. Lattices are stored skewed, (D, N, U+1) with D = T' + U + 1 diagonals: row d holds
the nodes (u, d - u), and for an arc, the node that it leads to. Then a step is arithmetic between two rows.

Source of the recursion: Graves 2012, "Sequence transduction with recurrent neural networks"
(arXiv:1211.3711). The slow twin is `rnnt_reference.py`.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F

NEG_INF = float("-inf")
Grads = Tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def lattice_scores(
    px: torch.Tensor, py: torch.Tensor, boundary: torch.Tensor, with_grads: bool = True
) -> Tuple[torch.Tensor, Optional[Grads]]:
    """Log-sum over all paths, and its gradient.

    px (N,U,T'), py (N,U+1,T') log-probabilities; -inf closes an arc. boundary (N,4) as [0, 0, U_n, T'_n].
    Returns scores (N,), -inf where no path is open, and (px_grad, py_grad), shaped like px and py: the
    posterior probability of passing each arc; zero outside the boundary and in a lattice without a path.
    """
    px, py = _close_outside(px, py, boundary)
    px = _skew(F.pad(px, (0, 1, 1, 0), value=NEG_INF))  # arcs moved to where they lead: u + 1,
    py = _skew(F.pad(py, (1, 0), value=NEG_INF))  # and t + 1
    alpha = _forward(px, py)
    end_u, end_d = boundary[:, 2], boundary[:, 2] + boundary[:, 3]
    scores = alpha[end_d, torch.arange(len(end_u), device=px.device), end_u]
    if not with_grads:
        return scores, None
    x_flow, y_flow = _backward(alpha, px, py, end_d, end_u)
    return scores, (_unskew(x_flow)[:, 1:, :-1], _unskew(y_flow)[:, :, 1:])


def _close_outside(px: torch.Tensor, py: torch.Tensor, boundary: torch.Tensor) -> Grads:
    """Set the arcs that start outside an utterance's own lattice, or leave it, to -inf."""
    u = torch.arange(py.shape[1], device=py.device)[None, :, None]
    t = torch.arange(py.shape[2], device=py.device)[None, None, :]
    end_u, end_t = boundary[:, 2, None, None], boundary[:, 3, None, None]
    px = px.masked_fill((u[:, :-1] >= end_u) | (t >= end_t), NEG_INF)
    return px, py.masked_fill((u > end_u) | (t >= end_t), NEG_INF)


def _skew(nodes: torch.Tensor) -> torch.Tensor:
    """(N, U+1, T'+1) -> (D, N, U+1) with out[d, n, u] = nodes[n, u, d - u], -inf where d - u is no frame.

    Rows padded to D + 1 and read back as rows of D: entry (u, d) sits at u D + d = u (D + 1) + (d - u), which
    is column d - u of row u; for d < u it is column D + 1 + d - u >= D + 1 - U > T' of row u - 1: padding.
    """
    n, rows, columns = nodes.shape
    diagonals = rows + columns - 1
    flat = F.pad(nodes, (0, diagonals + 1 - columns), value=NEG_INF).reshape(n, rows * (diagonals + 1))
    return flat[:, : rows * diagonals].reshape(n, rows, diagonals).permute(2, 0, 1).contiguous()


def _unskew(skewed: torch.Tensor) -> torch.Tensor:
    """Inverse of `_skew`: (D, N, U+1) -> (N, U+1, T'+1)."""
    diagonals, n, rows = skewed.shape
    flat = F.pad(skewed.permute(1, 2, 0).reshape(n, rows * diagonals), (0, rows))
    return flat.reshape(n, rows, diagonals + 1)[:, :, : diagonals + 1 - rows]


def _forward(px: torch.Tensor, py: torch.Tensor) -> torch.Tensor:
    """alpha (D, N, U+1): log-sum of the paths from (0, 0) to each node."""
    padded = F.pad(torch.full_like(py, NEG_INF), (1, 0), value=NEG_INF)
    padded[0, :, 1] = 0.0
    # Views of the rows, made once: at T' + U small steps the indexing would cost as much as the arithmetic.
    here, below = padded[:, :, 1:].unbind(), padded[:, :, :-1].unbind()  # columns u and u - 1
    px_rows, py_rows = px.unbind(), py.unbind()
    for d in range(1, len(here)):
        torch.logaddexp(here[d - 1] + py_rows[d], below[d - 1] + px_rows[d], out=here[d])
    return padded[:, :, 1:]


def _backward(
    alpha: torch.Tensor, px: torch.Tensor, py: torch.Tensor, end_d: torch.Tensor, end_u: torch.Tensor
) -> Grads:
    """Arc occupancies, (D, N, U+1) each.

    Probability 1 is put on the last node and flows back: each node hands its share to its two incoming arcs
    in proportion to what they brought. Unlike exp(alpha + arc + beta - score) this keeps the flow through
    every diagonal at 1 however long the utterance, and needs no second recursion in the log domain.
    """
    before = F.pad(alpha[:-1], (1, 0, 0, 0, 1, 0), value=NEG_INF)
    log_odds = (before[:, :, :-1] + px) - (before[:, :, 1:] + py)  # nan where both arcs are closed
    x_share = torch.sigmoid(log_odds).nan_to_num_(0.0)
    y_share = torch.sigmoid(-log_odds).nan_to_num_(0.0)
    padded = F.pad(torch.zeros_like(alpha), (1, 0))
    node = padded[:, :, 1:]
    batch = torch.arange(len(end_u), device=px.device)
    node[end_d, batch, end_u] = (alpha[end_d, batch, end_u] > NEG_INF).to(alpha.dtype)
    here, below = node.unbind(), padded[:, :, :-1].unbind()
    x_rows, y_rows = x_share.unbind(), y_share.unbind()
    for d in range(len(here) - 1, 0, -1):
        here[d - 1].addcmul_(here[d], y_rows[d])
        below[d - 1].addcmul_(here[d], x_rows[d])
    return x_share * node, y_share * node
