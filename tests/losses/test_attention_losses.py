"""Losses of the attention decoder against slow twins, and their gradients against formulas."""

import pytest
import torch

from transducer_kd.data import tokenizer
from transducer_kd.losses import attention
from transducer_kd.losses.attention import label_smoothed_ce, las_kd_loss, las_targets

V = 7


@pytest.fixture
def problem():
    """Student and teacher logits, targets and mask of three utterances with 4, 0 and 2 tokens."""
    torch.manual_seed(0)
    y = torch.tensor([[3, 5, 5, 2], [0, 0, 0, 0], [6, 4, 0, 0]])
    targets, mask = las_targets(y, torch.tensor([4, 0, 2]))
    student, teacher = torch.randn(2, 3, 5, V, dtype=torch.float64).mul_(2).unbind()
    return student.requires_grad_(), teacher.clone().requires_grad_(), targets, mask


def ce_reference(logits, targets, mask, smoothing):
    """The cross-entropy with the smoothed distribution, written out class by class."""
    losses = []
    for n in range(len(targets)):
        loss = logits.new_zeros(())
        for u in range(targets.size(1)):
            if mask[n, u]:
                q = [0.0] + [smoothing / (V - 1)] * (V - 1)
                q[int(targets[n, u])] += 1 - smoothing
                assert q[0] == 0.0 and sum(q) == pytest.approx(1)
                log_p = logits[n, u] - logits[n, u].logsumexp(0)
                loss = loss - sum(q[k] * log_p[k] for k in range(V))
        losses.append(loss)
    return torch.stack(losses)


def kd_reference(student, teacher, mask, tau):
    """tau^2 sum q log(q / p), position by position."""
    losses = []
    for n in range(len(mask)):
        loss = student.new_zeros(())
        for u in range(mask.size(1)):
            if mask[n, u]:
                p, q = (student[n, u] / tau).softmax(0), (teacher[n, u] / tau).softmax(0)
                loss = loss + tau**2 * sum(q[k] * (q[k] / p[k]).log() for k in range(V))
        losses.append(loss)
    return torch.stack(losses)


def spoil_padding(logits, mask):
    return torch.where(mask[..., None], logits.detach(), torch.full((), float("nan"), dtype=logits.dtype))


def test_ids_are_the_tokenizers():
    assert (attention.BLANK_ID, attention.SOS_EOS_ID) == (tokenizer.BLANK_ID, tokenizer.SOS_EOS_ID)


@pytest.mark.parametrize("padding", [0, -1, 9])
def test_targets_end_with_sos_eos_whatever_the_padding(padding):
    y = torch.tensor([[3, 5, 4], [6, padding, padding], [padding] * 3])
    targets, mask = las_targets(y, torch.tensor([3, 1, 0]))
    assert targets.tolist() == [[3, 5, 4, 1], [6, 1, 0, 0], [1, 0, 0, 0]]
    assert mask.tolist() == [[True] * 4, [True, True, False, False], [True, False, False, False]]
    assert (targets[mask] != 0).all()  # never blank


def test_targets_of_a_batch_without_tokens():
    targets, mask = las_targets(torch.zeros(2, 0, dtype=torch.int64), torch.tensor([0, 0]))
    assert targets.tolist() == [[1], [1]] and mask.all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_equals_its_slow_twin(problem, smoothing):
    logits, _, targets, mask = problem
    loss = label_smoothed_ce(logits, targets, mask, smoothing)
    torch.testing.assert_close(loss, ce_reference(logits, targets, mask, smoothing))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    # p - q at each valid position, with no share of q for blank.
    q = torch.full_like(logits, smoothing / (V - 1)).scatter_add(
        -1, targets[..., None], torch.full_like(logits[..., :1], 1 - smoothing)
    )
    q[..., 0] = 0.0
    expected = (logits.softmax(-1) - q).masked_fill(~mask[..., None], 0.0)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_class_of_probability_zero_for_blank_costs_nothing(problem, smoothing):
    logits, _, targets, mask = problem
    forbidden = logits.detach().clone()
    forbidden[..., 0] = -1e4
    without = label_smoothed_ce(forbidden, targets, mask, smoothing)
    assert (without < label_smoothed_ce(logits, targets, mask, smoothing)).all()
    kd = las_kd_loss(forbidden, 0.5 * forbidden, mask, 2.0)
    assert kd.isfinite().all() and (kd < 20).all()


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_distillation_equals_its_slow_twin(problem, tau):
    student, teacher, _, mask = problem
    loss = las_kd_loss(student, teacher, mask, tau)
    torch.testing.assert_close(loss, kd_reference(student, teacher, mask, tau))
    assert (loss > 0).all()


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_distillation_gradient_is_tau_times_p_minus_q(problem, tau):
    student, teacher, _, mask = problem
    las_kd_loss(student, teacher, mask, tau).sum().backward()
    expected = tau * ((student / tau).softmax(-1) - (teacher / tau).softmax(-1))
    expected = expected.masked_fill(~mask[..., None], 0.0)
    torch.testing.assert_close(student.grad, expected, atol=1e-5, rtol=0)
    assert teacher.grad is None


def test_distillation_of_equals_is_zero_and_so_is_its_gradient(problem):
    student, _, _, mask = problem
    student = student.detach().float().requires_grad_()
    loss = las_kd_loss(student, student + 3.0, mask, 2.0)  # a constant does not change a softmax
    loss.sum().backward()
    assert loss.abs().max() < 1e-5 and student.grad.abs().max() < 1e-6


def test_padding_has_no_influence_even_as_nan(problem):
    student, teacher, targets, mask = problem
    bad_student, bad_teacher = (spoil_padding(x, mask).requires_grad_() for x in (student, teacher))
    ce = [label_smoothed_ce(x, targets, mask, 0.1) for x in (student, bad_student)]
    kd = [las_kd_loss(*pair, mask, 2.0) for pair in ((student, teacher), (bad_student, bad_teacher))]
    assert torch.equal(*ce) and torch.equal(*kd)
    (sum(ce) + sum(kd)).sum().backward()
    assert torch.equal(student.grad, bad_student.grad)
    assert (bad_student.grad[~mask] == 0).all()


def test_longer_batches_change_nothing(problem):
    student, teacher, targets, mask = problem
    short = slice(2, 3), slice(0, 3)  # the utterance with two tokens, by itself
    torch.testing.assert_close(
        label_smoothed_ce(student[short], targets[short], mask[short], 0.1),
        label_smoothed_ce(student, targets, mask, 0.1)[2:],
    )
    torch.testing.assert_close(
        las_kd_loss(student[short], teacher[short], mask[short], 2.0),
        las_kd_loss(student, teacher, mask, 2.0)[2:],
    )


def test_an_utterance_that_is_all_padding_gives_zero(problem):
    student, teacher, targets, mask = problem
    none = torch.zeros_like(mask)
    assert (label_smoothed_ce(student, targets, none, 0.1) == 0).all()
    assert (las_kd_loss(student, teacher, none, 2.0) == 0).all()


def test_losses_are_float32_under_autocast(problem):
    student, teacher, targets, mask = problem
    low_s, low_t = student.detach().bfloat16(), teacher.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ce, kd = label_smoothed_ce(low_s, targets, mask, 0.1), las_kd_loss(low_s, low_t, mask, 2.0)
    assert ce.dtype == kd.dtype == torch.float32
    assert torch.equal(ce, label_smoothed_ce(low_s.float(), targets, mask, 0.1))
    assert torch.equal(kd, las_kd_loss(low_s.float(), low_t.float(), mask, 2.0))


def test_what_does_not_fit_is_refused(problem):
    student, teacher, targets, mask = problem
    with pytest.raises(ValueError, match=r"targets \(3, 4\)"):
        label_smoothed_ce(student, targets[:, 1:], mask, 0.1)
    with pytest.raises(ValueError, match=r"teacher logits \(3, 5, 6\)"):
        las_kd_loss(student, teacher[..., 1:], mask, 1.0)
    with pytest.raises(ValueError, match="temperature is 0"):
        las_kd_loss(student, teacher, mask, 0)
