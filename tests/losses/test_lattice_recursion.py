"""The vectorised recursion against the reference loops, and what must not break it."""

import sys
from pathlib import Path

import pytest
import torch

from transducer_kd.losses.lattice_recursion import NEG_INF, _skew, _unskew, lattice_scores
from transducer_kd.losses.rnnt_reference import arcs_reference, loss_of_arcs_reference

sys.path.insert(0, str(Path(__file__).parent))
from loss_problems import leaf, make_problem  # noqa: E402

SHAPES = [
    ([1], [0]),
    ([1], [1]),
    ([4], [0]),
    ([5], [5]),
    ([3], [6]),  # fewer frames than tokens is still a lattice
    ([6, 3, 9], [4, 3, 0]),
    ([2, 7, 7], [0, 0, 0]),
]


@pytest.mark.parametrize("frames,tokens", SHAPES)
def test_scores_and_occupancies_equal_the_reference(frames, tokens):
    p = make_problem(frames, tokens, dtype=torch.float64)
    token, blank = arcs_reference(p.logits(), p.symbols)
    token, blank = leaf(token), leaf(blank)
    expected = -loss_of_arcs_reference(token, blank, p.boundary)
    expected.sum().backward()
    scores, (px_grad, py_grad) = lattice_scores(token.transpose(1, 2), blank.transpose(1, 2), p.boundary)
    torch.testing.assert_close(scores, expected.detach(), atol=1e-10, rtol=0)
    token_grad = torch.zeros_like(token) if token.grad is None else token.grad
    torch.testing.assert_close(px_grad.transpose(1, 2), token_grad, atol=1e-10, rtol=0)
    torch.testing.assert_close(py_grad.transpose(1, 2), blank.grad, atol=1e-10, rtol=0)


def test_skew_puts_each_diagonal_in_a_row_and_back():
    nodes = torch.arange(24.0).reshape(2, 3, 4)
    skewed = _skew(nodes)
    assert skewed.shape == (6, 2, 3)
    for d in range(6):
        for u in range(3):
            inside = 0 <= d - u < 4
            expected = nodes[:, u, d - u] if inside else torch.full((2,), NEG_INF)
            assert torch.equal(skewed[d, :, u], expected)
    assert torch.equal(_unskew(skewed), nodes)


def test_long_lattice_keeps_its_flow():
    # At every frame exactly one blank is passed, whatever the rounding on the way.
    g = torch.Generator().manual_seed(1)
    px, py = -4 * torch.rand(1, 120, 1500, generator=g), -4 * torch.rand(1, 121, 1500, generator=g)
    boundary = torch.tensor([[0, 0, 120, 1500]])
    scores, (px_grad, py_grad) = lattice_scores(px, py, boundary)
    torch.testing.assert_close(py_grad.sum(1), torch.ones(1, 1500), atol=1e-4, rtol=0)
    torch.testing.assert_close(px_grad.sum(2), torch.ones(1, 120), atol=1e-4, rtol=0)
    exact, _ = lattice_scores(px.double(), py.double(), boundary)
    assert abs(scores.item() - exact.item()) < 1e-5 * abs(exact.item())


def test_closed_arcs_and_a_lattice_without_path():
    p = make_problem([4, 4], [2, 2], dtype=torch.float64)
    token, blank = arcs_reference(p.logits(), p.symbols)
    px, py = token.transpose(1, 2).clone(), blank.transpose(1, 2).clone()
    px[0, :, 1:] = NEG_INF  # utterance 0: both tokens at frame 0; one path is left
    px[1, 1] = NEG_INF  # utterance 1: the second token never
    scores, grads = lattice_scores(px, py, p.boundary)
    assert scores[0].item() == pytest.approx((px[0, 0, 0] + px[0, 1, 0] + py[0, 2].sum()).item())
    assert scores[1].item() == NEG_INF
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[:, 0] = 1.0
    torch.testing.assert_close(grads[0][0], expected)
    assert all(torch.equal(g[1], torch.zeros_like(g[1])) for g in grads)
    assert lattice_scores(px, py, p.boundary, with_grads=False)[1] is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu():
    p = make_problem([30, 21, 9], [12, 9, 0])
    token, blank = arcs_reference(p.logits(), p.symbols)
    on_cpu = lattice_scores(token.transpose(1, 2), blank.transpose(1, 2), p.boundary)
    on_gpu = lattice_scores(token.transpose(1, 2).cuda(), blank.transpose(1, 2).cuda(), p.boundary.cuda())
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0])
    for got, expected in zip(on_gpu[1], on_cpu[1]):
        torch.testing.assert_close(got.cpu(), expected, atol=1e-5, rtol=0)
