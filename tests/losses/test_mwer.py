"""MWER: value by hand, gradient, and lists that are short."""

import pytest
import torch

from transducer_kd.losses.mwer import mwer_loss

# Probabilities .5 .3 .2 over three hypotheses with 2, 0 and 4 errors, mean 2: .5 x 0 + .3 x -2 + .2 x 2 = -.2
SCORES = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log() - 7.0  # any constant drops out
ERRORS = torch.tensor([[2, 0, 4]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_value_by_hand():
    assert mwer_loss(SCORES, ERRORS, ALL).item() == pytest.approx(-0.2, abs=1e-12)


def test_gradient_by_hand_pushes_towards_fewer_errors():
    scores = SCORES.clone().requires_grad_()
    mwer_loss(scores, ERRORS, ALL).sum().backward()
    # P (W - 1.8): the expectation of the errors is .5 x 2 + .2 x 4 = 1.8
    expected = torch.tensor([[0.5 * 0.2, 0.3 * -1.8, 0.2 * 2.2]], dtype=torch.float64)
    torch.testing.assert_close(scores.grad, expected)
    assert scores.grad[0, 1] < 0 < scores.grad[0, 2]  # descent raises the score of the best


def test_what_is_masked_is_not_looked_at():
    nan = float("nan")
    scores = torch.cat([SCORES, SCORES.new_tensor([[nan, float("inf")]])], dim=1)
    scores = torch.cat([scores, torch.full_like(scores, nan)]).requires_grad_()  # and a row of nothing
    errors = torch.tensor([[2.0, 0.0, 4.0, nan, 9.0], [nan] * 5])
    mask = torch.tensor([[True, True, True, False, False], [False] * 5])
    loss = mwer_loss(scores, errors, mask)
    torch.testing.assert_close(loss, torch.tensor([-0.2, 0.0], dtype=torch.float64))
    loss.sum().backward()
    alone = SCORES.clone().requires_grad_()
    mwer_loss(alone, ERRORS, ALL).sum().backward()
    torch.testing.assert_close(scores.grad[:1, :3], alone.grad)
    assert (scores.grad[~mask] == 0).all()


def test_a_single_hypothesis_gives_zero():
    scores = torch.tensor([[-3.0, -1.0]], requires_grad=True)
    loss = mwer_loss(scores, torch.tensor([[5, 1]]), torch.tensor([[True, False]]))
    loss.sum().backward()
    assert loss.item() == 0 and (scores.grad == 0).all()


def test_half_precision_scores_are_computed_in_float32():
    loss = mwer_loss(SCORES.to(torch.bfloat16), ERRORS, ALL)
    assert loss.dtype == torch.float32


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"errors \(1, 2\)"):
        mwer_loss(SCORES, ERRORS[:, :2], ALL)
