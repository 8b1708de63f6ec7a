"""SpecAugment: what is masked, how much at most, and what is left alone."""

import pytest
import torch

from transducer_kd.config import SpecAugmentConfig
from transducer_kd.models.spec_augment import SpecAugment

LENS = torch.tensor([500, 120, 37, 8])


def make_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 500, 80, generator=generator) - 8
    for n, length in enumerate(LENS.tolist()):
        x[n, length:] = -100.0
    return x


def augment(x, lens=LENS, seed=0, **changes):
    torch.manual_seed(seed)
    return SpecAugment(SpecAugmentConfig(**changes)).train()(x, lens, step=0)


def test_time_masks_stay_within_their_budget_and_their_utterance():
    x = make_batch()
    widths = []
    for seed in range(40):
        y = augment(x, seed=seed, num_feature_masks=0, max_time_mask_frames=30)
        changed = (y != x).any(dim=2)
        for n, length in enumerate(LENS.tolist()):
            assert not changed[n, length:].any()
            assert changed[n].sum() <= 0.15 * length
        widths.append(changed.sum(dim=1))
    mean = torch.stack(widths).float().mean(dim=0) / LENS
    # Uniform widths use about half of the budget, also in utterances too short for ten masks.
    assert (mean[:3] > 0.04).all() and (mean < 0.10).all()


def test_masked_frames_hold_the_mean_of_the_valid_ones():
    x = make_batch()
    y = augment(x, num_feature_masks=0)
    for n, length in enumerate(LENS.tolist()):
        masked = (y[n] != x[n]).all(dim=1)
        assert torch.allclose(y[n][masked], x[n, :length].mean(), atol=1e-4)
    assert (y != x).any()


def test_feature_masks_cover_all_valid_frames_and_few_bins():
    x = make_batch()
    counts = []
    for seed in range(20):
        y = augment(x, seed=seed, num_time_masks=0, max_feature_mask_bins=10)
        for n, length in enumerate(LENS.tolist()):
            changed = (y != x)[n]
            assert (changed[:length] == changed[0]).all() and not changed[length:].any()
            counts.append(changed[0].sum().item())
    assert max(counts) <= 20 and min(counts) < 10 < max(counts)


def test_every_frame_and_bin_can_be_masked():
    x = torch.randn(1, 20, 80)
    hit = torch.zeros(20, 80, dtype=torch.bool)
    for seed in range(150):
        hit |= (augment(x, torch.tensor([20]), seed, max_time_mask_fraction=0.3) != x)[0]
    assert hit.all()


def test_input_is_not_modified_and_the_seed_decides():
    x = make_batch()
    before = x.clone()
    a, b, c = augment(x, seed=1), augment(x, seed=1), augment(x, seed=2)
    assert torch.equal(x, before) and torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("enabled, training", [(False, True), (True, False)])
def test_does_nothing_in_eval_or_disabled(enabled, training):
    x = make_batch()
    module = SpecAugment(SpecAugmentConfig(enabled=enabled)).train(training)
    assert torch.equal(module(x, LENS, step=0), x)


def test_it_begins_when_it_is_told_to():
    x = make_batch()
    module = SpecAugment(SpecAugmentConfig(begin_step=7)).train()
    assert torch.equal(module(x, LENS, step=6), x) and not torch.equal(module(x, LENS, step=7), x)
