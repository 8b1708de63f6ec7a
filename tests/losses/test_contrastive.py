"""Contrastive and diversity loss against slow twins, and distractors against what they may be."""

import math

import pytest
import torch

from transducer_kd.losses.contrastive import (
    contrastive_loss,
    diversity_loss,
    perplexity,
    sample_distractors,
)

KAPPA = 0.2


@pytest.fixture
def problem():
    """Context, target, ids, masked_lens and distractors: utterances with 6, 1, 3, 0 and 2 masked frames.

    In the first, frames 0, 2 and 5 have the same vector, in the last all have.
    """
    torch.manual_seed(0)
    masked_lens = torch.tensor([6, 1, 3, 0, 2])
    context, target = torch.randn(2, 5, 6, 4, dtype=torch.float64).unbind()
    ids = torch.arange(30).view(5, 6)
    for row, frames in ((0, [0, 2, 5]), (4, [0, 1])):
        target[row, frames] = target[row, frames[0]].clone()
        ids[row, frames] = ids[row, frames[0]].clone()
    distractors = sample_distractors(masked_lens, 7)
    return context.requires_grad_(), target.requires_grad_(), ids, masked_lens, distractors


def reference(context, target, masked_lens, distractors):
    """Frame by frame and draw by draw, from the definition; equal vectors are found by comparing them."""
    losses, correct, chance = [], [], []
    for n, length in enumerate(masked_lens.tolist()):
        loss, hits, guessed = context.new_zeros(()), 0, 0.0
        for m in range(length if length > 1 else 0):
            wrong = [target[n, k] for k in distractors[n, m].tolist()]
            wrong = [q for q in wrong if not torch.equal(q, target[n, m])]
            scores = [
                torch.cosine_similarity(context[n, m], q, dim=0) / KAPPA for q in [target[n, m], *wrong]
            ]
            loss = loss - (scores[0].exp() / sum(s.exp() for s in scores)).log()
            hits += all(scores[0] > s for s in scores[1:])
            guessed += 1 / (1 + len({tuple(q.tolist()) for q in wrong}))
        losses.append(loss)
        correct.append(hits)
        chance.append(guessed)
    return torch.stack(losses), correct, chance


def test_loss_accuracy_chance_and_gradients_equal_their_slow_twin(problem):
    context, target, ids, masked_lens, distractors = problem
    found = contrastive_loss(context, target, ids, masked_lens, distractors, KAPPA)
    expected = reference(context, target, masked_lens, distractors)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].tolist() == expected[1]
    assert found[2].tolist() == pytest.approx(expected[2])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    ours, twins = (
        torch.autograd.grad((losses * weights).sum(), (context, target)) for losses in (found[0], expected[0])
    )
    for gradient, twin in zip(ours, twins):
        torch.testing.assert_close(gradient, twin)
        assert gradient[0].abs().sum() > 0 and gradient[2].abs().sum() > 0
        assert gradient[1].abs().sum() == 0 and gradient[3].abs().sum() == 0


def test_utterances_without_two_masked_frames_count_nothing(problem):
    losses, correct, chance = contrastive_loss(*problem, KAPPA)
    assert [losses[1], losses[3], correct[1], correct[3], chance[1], chance[3]] == [0.0] * 6
    none = torch.tensor([0, 1])
    found = contrastive_loss(
        *torch.zeros(2, 2, 1, 4), none.view(2, 1), none, sample_distractors(none, 3), KAPPA
    )
    assert [x.tolist() for x in found] == [[0.0, 0.0]] * 3


def test_equal_codes_are_no_distractors():
    # The other frame's vector is the true one, up to rounding: only the ids can tell.
    context = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    target = torch.tensor([[[1.0, 0.5], [1.0, 0.5 + 1e-7]]])
    arguments = torch.tensor([2]), torch.tensor([[[1, 1], [0, 0]]]), KAPPA
    same = contrastive_loss(context, target, torch.tensor([[4, 4]]), *arguments)
    assert [x.tolist() for x in same] == [[0.0], [2.0], [2.0]]  # nothing is left to be mistaken for
    different = contrastive_loss(context, target, torch.tensor([[4, 5]]), *arguments)
    # Two draws, each as good as the true one.
    assert different[0].item() == pytest.approx(2 * math.log(3), rel=1e-5)
    assert different[2].item() == 1.0  # of two vectors each, one is right


def test_accuracy_and_chance_of_a_hand_made_case():
    # Frames 0 and 1 are found; 2 prefers frame 0; 3 likes two equally, which is no hit.
    target = torch.eye(4)[None]
    context = torch.tensor([[[1.0, 0, 0, 0], [0, 3, 0, 0], [1, 0, 0.5, 0], [0, 1, 0, 1]]])
    draws = torch.tensor([[[1, 2, 3], [0, 0, 0], [0, 1, 1], [1, 1, 0]]])
    ids = torch.tensor([[7, 2, 9, 2]])  # frame 1 and 3 share a code: drawing one for the other is left out
    _, correct, chance = contrastive_loss(context, target, ids, torch.tensor([4]), draws, KAPPA)
    assert correct.item() == 3.0  # without the shared code 2
    # Distinct vectors besides the true one: {2, 9}, {7}, {7, 2}, {7}.
    assert chance.item() == pytest.approx(1 / 3 + 1 / 2 + 1 / 3 + 1 / 2)
    _, correct, chance = contrastive_loss(
        context, target, torch.arange(4)[None], torch.tensor([4]), draws, KAPPA
    )
    assert correct.item() == 2.0
    assert chance.item() == pytest.approx(1 / 4 + 1 / 2 + 1 / 3 + 1 / 3)


def test_padding_has_no_influence(problem):
    context, target, ids, masked_lens, distractors = problem
    padding = torch.arange(6) >= masked_lens[:, None]
    clean = contrastive_loss(context, target, ids, masked_lens, distractors, KAPPA)
    spoilt = [
        x.detach().masked_fill(padding[..., None], math.nan).requires_grad_() for x in (context, target)
    ]
    found = contrastive_loss(
        *spoilt,
        ids.masked_fill(padding, 0),
        masked_lens,
        distractors.masked_fill(padding[..., None], 5),
        KAPPA,
    )
    for ours, expected in zip(found, clean):
        assert torch.equal(ours, expected)
    found[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in spoilt)


def test_float32_also_under_autocast(problem):
    context, target, *rest = problem
    context, target = (x.detach().bfloat16() for x in (context, target))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive_loss(context, target, *rest, KAPPA)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, contrastive_loss(context.float(), target.float(), *rest, KAPPA)[0])


def test_distractors_are_other_masked_frames_of_the_utterance_all_equally_likely():
    masked_lens = torch.tensor([5, 2, 1, 0])
    distractors = sample_distractors(masked_lens, 4000, torch.Generator().manual_seed(0))
    assert distractors.shape == (4, 5, 4000) and 0 <= distractors.min() and distractors.max() < 5
    for n, length in enumerate([5, 2]):
        for m in range(length):
            counts = torch.bincount(distractors[n, m], minlength=5)
            expected = torch.tensor([4000 / (length - 1) * (k != m and k < length) for k in range(5)])
            assert torch.equal(counts == 0, expected == 0)
            assert (counts - expected).abs().max() < 5 * math.sqrt(1000)
    again = sample_distractors(masked_lens, 4000, torch.Generator().manual_seed(0))
    assert torch.equal(distractors, again)


def test_diversity_and_perplexity():
    even = torch.eye(6).reshape(6, 1, 6).expand(6, 2, 6)  # each frame sure of another entry
    assert diversity_loss(even).item() == pytest.approx(0, abs=1e-6)
    assert perplexity(even.sum(0)).tolist() == pytest.approx([6, 6])
    collapsed = even[:1].expand(6, 2, 6)
    assert diversity_loss(collapsed).item() == pytest.approx((12 - 2) / 12)
    assert perplexity(collapsed.sum(0)).tolist() == pytest.approx([1, 1])
    assert perplexity(torch.tensor([[2, 2, 0], [0, 0, 0]])).tolist() == pytest.approx([2, 1])


def test_diversity_equals_its_slow_twin():
    logits = torch.randn(9, 2, 6, dtype=torch.float64, requires_grad=True)
    p, expected = logits.softmax(-1), 12.0
    for g in range(2):
        mean = [sum(p[f, g, v] for f in range(9)) / 9 for v in range(6)]
        expected = expected - sum(-q * q.log() for q in mean).exp()
    torch.testing.assert_close(diversity_loss(p), expected / 12)
    (ours,) = torch.autograd.grad(diversity_loss(logits.softmax(-1)), logits)
    (twins,) = torch.autograd.grad(expected / 12, logits)
    torch.testing.assert_close(ours, twins)


def test_diversity_has_a_gradient_where_an_entry_is_never_used():
    logits = torch.tensor([[[0.0, -200.0, 1.0]]], requires_grad=True)  # its probability is 0 in float32
    diversity_loss(logits.softmax(-1)).backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().sum() > 0
