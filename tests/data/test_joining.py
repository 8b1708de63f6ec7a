"""Batches whose utterances are joined in pairs: which, what lies between, what does not change."""

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from transducer_kd.data.features import FeatureExtractor
from transducer_kd.data.joining import PairJoiner, in_pairs

sys.path.insert(0, str(Path(__file__).parent))
from batches import assert_same  # noqa: E402


def matrices(*lengths):
    """Utterances (T,80), each of a value of its own."""
    return [np.full((length, 80), 5.0 + n, np.float32) for n, length in enumerate(lengths)]


class TestJoiner:
    def test_pairs_have_pauses_of_the_lengths_said_between(self):
        joiner, pauses = PairJoiner(1.0, FeatureExtractor(), 25.0), []
        for seed in range(60):
            words = matrices(20, 21, 22, 23, 24)
            found = joiner(words, random.Random(seed))
            assert len(found) == 3 and found[2] is words[4]
            for pair, (first, second) in zip(found, (words[:2], words[2:4])):
                assert np.array_equal(pair[: len(first)], first)
                assert np.array_equal(pair[-len(second) :], second)
                pauses.append(len(pair) - len(first) - len(second))
                assert pair[len(first) : -len(second)].max() < 5 and pair.dtype == np.float32
        assert 1 <= min(pauses) < 20 and 180 < max(pauses) <= 200

    @pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
    def test_a_share_of_the_batches_is_due(self, prob):
        joiner = PairJoiner(prob, FeatureExtractor(), 25.0)
        due = [joiner.is_due(matrices(9, 9), random.Random(f"42/1/{index}")) for index in range(4000)]
        assert np.mean(due) == pytest.approx(prob, abs=0.025)

    def test_what_is_alone_or_would_be_too_long_is_not(self):
        joiner, rng = PairJoiner(1.0, FeatureExtractor(), 10.0), random.Random(0)
        assert joiner.is_due(matrices(300, 100, 500), rng), "two of them and the longest pause have 10 s"
        assert not joiner.is_due(matrices(301, 100, 500), rng) and not joiner.is_due(matrices(300), rng)


def test_texts_in_pairs():
    assert in_pairs(["A B", "C", "D"], " ") == ["A B C", "D"] and in_pairs([], "+") == []


# ---------------------------------------------------------------- batches


def features_of(batch, n):
    """(T,C) of utterance n, without padding."""
    return batch.features[n, : int(batch.feature_lens[n])]


def is_joined(batch):
    return any("+" in cut_id for cut_id in batch.cut_ids)


def test_pairs_keep_words_tokens_and_features_in_their_order(build):
    joined, single = (list(build(join_prob=prob).train_batches(2)) for prob in (1.0, 0.0))
    assert len(joined) == len(single) and sum(map(is_joined, joined)) > 3
    for found, expected in zip(joined, single):
        assert found.cut_ids == in_pairs(expected.cut_ids, "+")
        assert found.texts == in_pairs(expected.texts, " ")
        for n in range(len(found.cut_ids)):
            own = range(2 * n, min(2 * n + 2, len(expected.cut_ids)))
            tokens = torch.cat([expected.y[i, : expected.y_lens[i]] for i in own])
            assert torch.equal(found.y[n, : found.y_lens[n]], tokens)
            pair, (first, *second) = features_of(found, n), [features_of(expected, i) for i in own]
            assert torch.equal(pair[: len(first)], first)
            assert all(torch.equal(pair[-len(other) :], other) for other in second)


def test_a_share_of_the_batches_and_no_validation(build):
    data = build(join_prob=0.3, max_duration_s=7.0)
    batches = [batch for epoch in range(1, 5) for batch in data.train_batches(epoch)]
    assert 0.1 < np.mean([is_joined(batch) for batch in batches]) < 0.5
    for draw in (data.valid_batches(), data.test_batches("test", 8.0)):
        assert not any(is_joined(batch) for batch in draw)


def test_pairs_get_silence_too(build):
    (batch, *_) = build(join_prob=1.0, silence_prob=1.0).train_batches(1)
    assert is_joined(batch) and batch.cut_ids[-1] == "silence-0" and batch.y_lens[-1] == 0


def test_workers_and_resuming_change_nothing(build, one_thread):
    expected = list(build(join_prob=0.5, silence_prob=0.3).train_batches(2))
    assert {is_joined(batch) for batch in expected} == {True, False}
    for workers, start in ((0, 2), (1, 0), (2, 3)):
        found = list(build(join_prob=0.5, silence_prob=0.3, num_workers=workers).train_batches(2, start))
        assert_same(found, expected[start:])


def test_batches_with_pseudo_labelled_utterances_stay_as_they_are(build, label):
    """Their stored teachers would not fit a pair, and a pair of both kinds would be neither."""
    settings = {"pseudo_labels": label()[0], "soft_targets": True}
    joined, single = (list(build(join_prob=prob, **settings).train_batches(2)) for prob in (1.0, 0.0))
    pseudo = [index for index, batch in enumerate(single) if batch.is_pseudo.any()]
    assert pseudo
    assert_same([joined[index] for index in pseudo], [single[index] for index in pseudo])
