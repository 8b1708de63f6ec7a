"""Silence in training: what it is made of, and that nothing else of a batch changes."""

import itertools
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from transducer_kd.data import silence as module
from transducer_kd.data.features import FeatureExtractor
from transducer_kd.data.silence import SilenceMixer, silence

sys.path.insert(0, str(Path(__file__).parent))
from batches import assert_same, encoder_lens  # noqa: E402

FLOOR = math.log(np.finfo(np.float32).eps)  # where the log of the features ends


def drawn(count, duration_s=1.0):
    return [silence(duration_s, random.Random(seed)) for seed in range(count)]


def level_db(samples):
    return 10 * math.log10(np.mean(samples.astype(np.float64) ** 2))


class TestSamples:
    @pytest.mark.parametrize("duration_s, frames", [(0.0, 1), (0.012, 1), (0.3, 30), (1.2345, 123)])
    def test_are_whole_frames(self, duration_s, frames):
        for samples in drawn(5, duration_s):
            assert samples.shape == (160 * frames,) and samples.dtype == np.float32

    def test_three_in_ten_are_zeros_and_the_others_quiet_at_every_level(self):
        found = drawn(2000, 0.05)
        noises = [samples for samples in found if samples.any()]
        assert 1 - len(noises) / len(found) == pytest.approx(0.3, abs=0.03)
        levels = sorted(level_db(samples) for samples in noises)
        assert -95.01 < levels[0] < -93 and -52 < levels[-1] < -49.99
        assert levels[len(levels) // 2] == pytest.approx(-72.5, abs=3)
        assert all((samples != 0).mean() > 0.99 for samples in noises)

    def test_noise_is_white_to_dull(self):
        """The correlation of neighbouring samples is the filter's pole."""
        noises = [samples for samples in drawn(300) if samples.any()]
        poles = [np.corrcoef(samples[:-1], samples[1:])[0, 1] for samples in noises]
        assert -0.05 < min(poles) < 0.1 and 0.85 < max(poles) < 0.97
        assert np.mean(poles) == pytest.approx(0.475, abs=0.06)

    def test_are_a_function_of_the_random_state(self):
        for first, again in zip(drawn(20), drawn(20)):
            assert np.array_equal(first, again)
        kept = [samples for samples in drawn(20) if samples.any()]
        assert not any(np.allclose(a, b) for a, b in itertools.combinations(kept, 2))


def test_zeros_are_the_floor_of_the_features():
    """As on the device, whose features have the same one."""
    matrix = FeatureExtractor().extract(np.zeros(16000, np.float32))
    assert matrix.shape == (100, 80) and np.abs(matrix - FLOOR).max() < 1e-3


class TestMixer:
    @pytest.fixture
    def mixer(self):
        return SilenceMixer(0.1, FeatureExtractor(), 15.0)

    @pytest.mark.parametrize("prob", [0.0, 0.1, 1.0])
    def test_a_share_of_the_batches_is_due(self, prob):
        mixer = SilenceMixer(prob, FeatureExtractor(), 15.0)
        due = [mixer.is_due(random.Random(f"42/1/{index}")) for index in range(5000)]
        assert np.mean(due) == pytest.approx(prob, abs=0.015)

    def test_words_stay_as_they_are_between_silences_of_the_lengths_said(self, mixer):
        before, after, without = [], [], []
        for seed in range(40):
            words = [np.full((20 + n, 80), 5.0 + n, np.float32) for n in range(3)]
            *grown, silent = mixer(words, [True, False, True], random.Random(seed))
            assert grown[1] is words[1]
            for n in (0, 2):
                (rows,) = (grown[n] == 5.0 + n).all(1).nonzero()
                assert len(rows) == 20 + n and rows[-1] - rows[0] == 19 + n
                before.append(rows[0])
                after.append(len(grown[n]) - 1 - rows[-1])
            assert silent.shape[1] == 80 and silent.dtype == np.float32
            without.append(len(silent))
        for frames in (before, after):
            assert 10 <= min(frames) < 40 and 170 < max(frames) <= 200
        assert 30 <= min(without) < 80 and 350 < max(without) <= 400

    @pytest.mark.parametrize(
        "max_duration_s, count, frames, limit_s",
        [(300.0, 150, 200, 450.0), (300.0, 20, 1500, 450.0), (30.0, 60, 50, 90.0), (120.0, 2, 5800, 180.0)],
    )
    def test_a_batch_does_not_outgrow_the_memory(self, max_duration_s, count, frames, limit_s):
        """Padding included."""
        sizes = self.padded_s(max_duration_s, count, frames)
        assert 0.85 * limit_s < max(sizes) <= limit_s + 0.03 * count, "silences are whole frames"

    def test_the_shortest_silences_are_always_there(self):
        """A batch that has no room: 0.1 s on both sides, and the utterance without words."""
        assert set(self.padded_s(120.0, 1, 12000)) == {2 * 120.2}
        assert set(self.padded_s(120.0, 1200, 10)) == {1201 * 0.3}

    def padded_s(self, max_duration_s, count, frames):
        """Seconds of some batches with silence."""
        mixer = SilenceMixer(1.0, FeatureExtractor(), max_duration_s)
        words = count * [np.zeros((frames, 80), np.float32)]
        batches = (mixer(words, count * [True], random.Random(seed)) for seed in range(8))
        return [round(0.01 * len(batch) * max(map(len, batch)), 2) for batch in batches]


# ---------------------------------------------------------------- batches


def with_and_without(build, **settings):
    """Batches with silence, and the same ones without."""
    return [list(build(**settings, silence_prob=prob).train_batches(2)) for prob in (1.0, 0.0)]


def has_silence(batch):
    return any(cut_id.startswith("silence-") for cut_id in batch.cut_ids)


def features_of(batch, n):
    """(T,C) of utterance n, without padding."""
    return batch.features[n, : int(batch.feature_lens[n])]


def test_a_batch_gets_an_utterance_without_words_and_keeps_all_else(build):
    with_silence, without = with_and_without(build)
    assert len(with_silence) == len(without) > 5
    for index, (found, expected) in enumerate(zip(with_silence, without)):
        n = len(expected.cut_ids)
        assert found.cut_ids == [*expected.cut_ids, f"silence-{index}"]
        assert found.texts == [*expected.texts, ""]
        assert torch.equal(found.y_lens, torch.cat([expected.y_lens, torch.tensor([0])]))
        assert torch.equal(found.y[:n], expected.y) and not found.y[n].any()
        assert not found.is_pseudo.any() and found.teacher_out is None
        assert (found.feature_lens[:n] >= expected.feature_lens + 20).all()
        assert int(found.feature_lens.max()) == found.features.shape[1]
        for i, length in enumerate(expected.feature_lens.tolist()):
            places = features_of(found, i).unfold(0, length, 1).transpose(1, 2)  # wherever the words may be
            assert (places == features_of(expected, i)).all(2).all(1).sum() == 1


def test_a_share_of_the_batches_and_no_validation(build):
    data = build(silence_prob=0.3, max_duration_s=3.5)
    batches = [batch for epoch in range(1, 5) for batch in data.train_batches(epoch)]
    counts = [int((batch.y_lens == 0).sum()) for batch in batches]
    assert [has_silence(batch) for batch in batches] == [count == 1 for count in counts]
    assert len(counts) > 100 and np.mean(counts) == pytest.approx(0.3, abs=0.12)
    for draw in (data.valid_batches(), data.test_batches("test", 8.0)):
        assert not any(has_silence(batch) for batch in draw)


def test_epochs_and_ranks_get_silences_of_their_own(build):
    def silences(epoch, rank=0):
        data = build(silence_prob=1.0, world_size=2, rank=rank)
        return [features_of(batch, -1) for batch in data.train_batches(epoch)]

    first, again, others = silences(1), silences(1), [*silences(2), *silences(1, rank=1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    noises = [matrix for matrix in first if not torch.allclose(matrix, torch.tensor(FLOOR), atol=1e-3)]
    assert noises and not any(torch.equal(a, b) for a in noises for b in others)


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_workers_and_resuming_change_nothing(build, prepared, one_thread, on_the_fly):
    settings = {"silence_prob": 0.5}
    if on_the_fly:
        noises = str(prepared.fbank / "cuts_dev.jsonl.gz")
        settings.update(on_the_fly_feats=True, musan_cuts=noises, musan_prob=0.7)
    expected = list(build(**settings).train_batches(2))
    assert {has_silence(batch) for batch in expected} == {True, False}
    for workers, start in ((0, 2), (1, 0), (2, 3)):
        found = list(build(num_workers=workers, **settings).train_batches(2, start))
        assert_same(found, expected[start:])


def test_stored_teachers_fit_their_utterances_still(build, label):
    """Those stay as long as they were; the labelled utterances beside them grow."""
    folder, numbers = label()
    settings = {"pseudo_labels": folder, "soft_targets": True}
    seen = 0
    for found, expected in zip(*with_and_without(build, **settings)):
        n = len(expected.cut_ids)
        assert torch.equal(found.is_pseudo[:n], expected.is_pseudo) and not found.is_pseudo[n]
        has_grown = found.feature_lens[:n] > expected.feature_lens
        assert torch.equal(has_grown, ~expected.is_pseudo)
        if expected.teacher_out is None:
            assert found.teacher_out is None
            continue
        assert torch.equal(found.teacher_out[:n], expected.teacher_out) and not found.teacher_out[n].any()
        assert found.teacher_out_lens.tolist() == [*expected.teacher_out_lens.tolist(), 0]
        for length, stored in zip(found.feature_lens[:n].tolist(), found.teacher_out_lens[:n].tolist()):
            assert stored in (0, encoder_lens(length))
        seen += int(found.is_pseudo.sum())
    assert seen == len(numbers)


def test_pseudo_labelled_utterances_without_stored_teachers_grow_too(build, label):
    for found, expected in zip(*with_and_without(build, pseudo_labels=label()[0])):
        assert (found.feature_lens[: len(expected.cut_ids)] > expected.feature_lens).all()


def test_what_decodes_makes_no_silence(build, monkeypatch):
    monkeypatch.setattr(module, "silence", lambda *_: pytest.fail("silence was made"))
    assert list(build(silence_prob=1.0).test_batches("test", 8.0))
