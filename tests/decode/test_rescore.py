"""The second pass: which hypothesis wins, how the weights are tuned, what rescore.json may hold."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from transducer_kd.config import EncoderConfig, LasConfig, ModelConfig
from transducer_kd.decode import rescore
from transducer_kd.decode.greedy import Hypothesis
from transducer_kd.log import UserError
from transducer_kd.models.las import Las

SETTINGS = {"chunk_size": 0, "beam_size": 4, "rescore_nbest": 0}
ABOUT = {"method": "modified_beam_search_las_rescore", "checkpoint": "epoch-2-avg-1", "settings": SETTINGS}


def words(tokens):
    return [str(token) for token in tokens]


def scored(*rows):
    """Rows of (tokens, first score, second score), best of the first pass first."""
    return rescore.ScoredNbest(
        [Hypothesis(tokens, list(range(len(tokens))), first) for tokens, first, _ in rows],
        [second for _, _, second in rows],
    )


def tune(*pairs):
    return rescore.tune(iter(pairs), words, part="dev", **ABOUT)


def random_part(seed, num_utts=30):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_utts):
        rows = []
        for first in sorted(rng.normal(-5, 2, rng.integers(1, 7)), reverse=True):
            rows.append((rng.integers(3, 6, rng.integers(0, 5)).tolist(), float(first), rng.normal(-5, 2)))
        pairs.append((scored(*rows), words(rng.integers(3, 6, 3))))
    return pairs


@pytest.fixture
def las():
    torch.manual_seed(0)
    config = ModelConfig(
        EncoderConfig(encoder_dim=8, num_heads=2), las=LasConfig(True, 0, 12, attention_dim=8, num_heads=2)
    )
    return Las(config, 7).eval()


@pytest.fixture
def nbests():
    tokens = [[[3, 4], [3, 4, 5], [], [4]], [[6]], [[3, 3, 3], [3, 3]]]
    return [[Hypothesis(t, [0] * len(t), -1.0 - i) for i, t in enumerate(nbest)] for nbest in tokens]


def test_one_call_equals_one_hypothesis_at_a_time(las, nbests, build_encoder_out):
    encoder_out, lens = build_encoder_out([9, 4, 7])
    together = rescore.score_nbests(las, encoder_out, lens, nbests)
    for n, result in enumerate(together):
        assert result.hyps == nbests[n]
        for hyp, second in zip(result.hyps, result.second):
            frames = encoder_out[n : n + 1, : lens[n]]
            (alone,) = rescore.score_nbests(las, frames, lens[n : n + 1], [[hyp]])
            assert second == pytest.approx(alone.second[0], abs=1e-4) and second < 0


def test_a_limit_keeps_the_best_of_the_first_pass(las, nbests, build_encoder_out):
    limited = rescore.score_nbests(las, *build_encoder_out([9, 4, 7]), nbests, limit=2)
    assert [r.hyps for r in limited] == [nbest[:2] for nbest in nbests]
    assert [len(r.second) for r in limited] == [2, 1, 2]


def test_the_weights_choose_between_the_passes():
    nbest = scored(([3], -1.0, -6.0), ([4, 4], -2.0, -3.0), ([5, 5, 5], -4.0, -2.0))
    chosen = [nbest.best(rescore.Weights(mu, 0.0)).tokens for mu in (0.0, 0.2, 0.5, 1.0)]
    # Halfway: -3.5, -2.5, -3.0. The first leads until mu = 1/4, the third from mu = 2/3 on.
    assert chosen == [[3], [3], [4, 4], [5, 5, 5]]
    assert nbest.best(rescore.Weights(0.0, 0.9)).tokens == [3]
    assert nbest.best(rescore.Weights(0.0, 1.4)).tokens == [4, 4]  # 0.4, 0.8, 0.2
    assert nbest.best(rescore.Weights(1.0, -4.5)).tokens == [3]  # -10.5, -12, -15.5


def test_tuning_equals_choosing_with_every_setting():
    part = random_part(0)
    tuning = tune(*part)

    def errors(mu, length_weight):
        weights = rescore.Weights(mu, length_weight)
        return sum(rescore.word_errors(ref, words(nbest.best(weights).tokens)) for nbest, ref in part)

    found = {(mu, w): errors(mu, w) for mu in rescore._MUS for w in rescore._LENGTH_WEIGHTS}
    assert errors(tuning.mu, tuning.length_weight) == min(found.values())
    ref_words = sum(len(ref) for _, ref in part)
    assert tuning.wer_before == pytest.approx(100 * errors(0, 0) / ref_words)
    assert tuning.wer_after == pytest.approx(100 * min(found.values()) / ref_words)
    assert tuning.wer_oracle < tuning.wer_after < tuning.wer_before
    assert (tuning.part, tuning.num_utts, tuning.weights().tuned_on) == ("dev", 30, "dev")


def test_tuning_finds_a_planted_optimum():
    right, short, long = [3, 4], [3], [3, 4, 5]
    ref = words(right)
    # Right wins against `short` where mu > 0.42, against `long` where mu < 0.53.
    part = [
        (scored((short, -1.0, -5.0), (right, -1.0 - 0.42 * 4 / 0.58, -1.0)), ref),
        (scored((right, -1.0, -5.0), (long, -1.0 - 0.53 * 4 / 0.47, -1.0)), ref),
    ]
    tuning = tune(*part)
    assert (tuning.mu, tuning.length_weight, tuning.wer_after) == (0.45, 0.0, 0.0)
    assert tuning.wer_before == 25.0
    # Both passes prefer a deletion, by 0.55: only the length term helps, with the smallest weight that does.
    tuning = tune((scored((short, -1.0, -1.0), (right, -1.55, -1.55)), ref))
    assert (tuning.length_weight, tuning.wer_after) == (0.6, 0.0)
    # And both an insertion.
    tuning = tune((scored((long, -1.0, -1.0), (right, -1.55, -1.55)), ref))
    assert (tuning.length_weight, tuning.wer_after) == (-0.6, 0.0)


@pytest.mark.parametrize(
    "advantage, tokens, found, is_warned",
    [(2.85, [3], 2.9, False), (2.95, [3], 3.0, True), (0.95, [3, 4, 5], -1.0, True)],
)
def test_an_optimum_at_the_edge_of_the_grid_is_said(caplog, advantage, tokens, found, is_warned):
    caplog.set_level(logging.WARNING)
    nbest = scored((tokens, -1.0, -1.0), ([3, 4], -1.0 - advantage, -1.0 - advantage))
    assert tune((nbest, words([3, 4]))).length_weight == found
    assert (f"tuned on dev, {found:g}, is at the edge of what was tried, -1 to 3" in caplog.text) == is_warned


def test_of_equally_good_settings_the_middle_mu_without_a_length_term():
    # Right from mu = 0.31 on, whatever the length weight.
    tuning = tune((scored(([3], -1.0, -5.0), ([4], -1.0 - 0.31 * 4 / 0.69, -1.0)), ["4"]))
    assert (tuning.mu, tuning.length_weight) == (0.65, 0.0)


def test_lists_of_different_lengths_do_not_disturb_each_other():
    one = scored(([3], -1.0, -1.0))
    many = scored(*[([3 + i % 4], -1.0 - i, -9.0 + i) for i in range(6)])
    tuning = tune((one, ["9"]), (many, ["8"]))
    assert tuning.wer_before == tuning.wer_after == tuning.wer_oracle == 100.0


def test_a_part_without_references_cannot_tune():
    with pytest.raises(UserError, match="dev has no reference words"):
        tune((scored(([3], -1.0, -1.0)), []))


def test_a_kept_tuning_comes_back_only_for_what_it_was_tuned_with(tmp_path):
    path = tmp_path / "exp" / "rescore.json"
    tuning = tune(*random_part(1))
    with pytest.raises(UserError, match="rescore.json has no weights.*--tune-part dev"):
        rescore.load_tuning(path, **ABOUT, test_parts=["test"])
    rescore.save_tunings(path, [tuning])
    assert rescore.load_tuning(path, **ABOUT, test_parts=["test"]) == tuning
    assert [p.name for p in path.parent.iterdir()] == ["rescore.json"]
    for changes, message in (
        ({"method": "fast_beam_search_nbest_las_rescore"}, "no weights of the two passes for fast_beam"),
        ({"checkpoint": "epoch-3-avg-1"}, "epoch-2-avg-1, not epoch-3-avg-1; tune first"),
        ({"settings": {**SETTINGS, "beam_size": 8}}, "search options.*'beam_size': 8.*tune first"),
        ({"test_parts": ["test", "dev"]}, "tuned on dev, which is to be decoded.*leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            rescore.load_tuning(path, **{**ABOUT, "test_parts": ["test"], **changes})


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "rescore.json"
    good = dataclasses.asdict(tune(*random_part(1)))
    for content in (
        "{",
        "[]",
        '{"m": 1}',
        '{"m": {"mu": 0.5}}',
        json.dumps({"m": {**good, "mu": 1.5}}),
        json.dumps({"m": {**good, "mu": "0.5"}}),
        json.dumps({"m": {**good, "length_weight": None}}),
        json.dumps({"m": {**good, "more": 1}}),
        b"\xff\xfe",
    ):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(UserError, match="rescore.json is damaged; tune again"):
            rescore.load_tuning(path, **ABOUT, test_parts=[])
