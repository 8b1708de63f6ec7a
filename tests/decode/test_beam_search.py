import itertools
import math

import pytest
import torch

from transducer_kd.data.tokenizer import UNK_ID
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.greedy import greedy_search

LENS = [8, 3, 1, 6]


def slow_beam_search(model, encoder_out, beam):
    """Readable twin, one utterance (T', D): a dict of hypotheses, merged as they are added.

    -> [(tokens, score)], number of mergers
    """
    hyps, mergers = {(): 0.0}, 0
    for frame in encoder_out:
        extensions = []
        for tokens, score in hyps.items():
            decoder_out = model.decode_labels(torch.tensor([tokens], dtype=torch.int64))[0, -1]
            log_probs = model.joiner(frame, decoder_out).double().log_softmax(-1)
            for k, log_prob in enumerate(log_probs.tolist()):
                emits = k not in (model.blank_id, UNK_ID)
                extensions.append((score + log_prob, tokens + (k,) if emits else tokens))
        hyps = {}
        for score, tokens in sorted(extensions, reverse=True)[:beam]:
            mergers += tokens in hyps
            high, low = max(score, hyps.get(tokens, -math.inf)), min(score, hyps.get(tokens, -math.inf))
            hyps[tokens] = high + math.log1p(math.exp(low - high))
    return sorted(hyps.items(), key=lambda item: -item[1]), mergers


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
@pytest.mark.parametrize("beam", [3, 11])
def test_batched_search_equals_the_slow_twin(build_model, build_encoder_out, kind, beam):
    total_mergers = 0
    for seed in range(3):
        model = build_model(kind, seed=seed)
        encoder_out, lens = build_encoder_out(LENS, seed)
        for n, hyps in enumerate(modified_beam_search(model, encoder_out, lens, beam)):
            expected, mergers = slow_beam_search(model, encoder_out[n, : LENS[n]], beam)
            assert [tuple(h.tokens) for h in hyps] == [tokens for tokens, _ in expected]
            assert [h.score for h in hyps] == pytest.approx([score for _, score in expected], abs=1e-4)
            assert all(len(h.timestamps) == len(h.tokens) for h in hyps)
            assert all(0 <= t < LENS[n] for h in hyps for t in h.timestamps)
            assert all(a < b for h in hyps for a, b in zip(h.timestamps, h.timestamps[1:]))
            total_mergers += mergers
    assert total_mergers > 0, "no hypotheses were merged: the test misses half of the algorithm"


def test_beam_of_one_is_greedy_search(build_model, build_encoder_out):
    model = build_model()
    encoder_out, lens = build_encoder_out(LENS)
    greedy = greedy_search(model, encoder_out, lens)
    for hyps, expected in zip(modified_beam_search(model, encoder_out, lens, beam=1), greedy):
        assert len(hyps) == 1
        assert (hyps[0].tokens, hyps[0].timestamps) == (expected.tokens, expected.timestamps)
        assert hyps[0].score == pytest.approx(expected.score, abs=1e-4)


def test_an_unlimited_beam_finds_every_sequence_with_its_exact_probability(
    build_model, build_encoder_out, sequence_log_prob
):
    model = build_model(vocab_size=5)
    encoder_out, lens = build_encoder_out([4])
    (hyps,) = modified_beam_search(model, encoder_out, lens, beam=1000)
    possible = {seq for length in range(5) for seq in itertools.product((1, 3, 4), repeat=length)}
    assert {tuple(h.tokens) for h in hyps} == possible
    assert sum(math.exp(h.score) for h in hyps) == pytest.approx(1.0, abs=1e-4)
    for hyp in hyps:
        exact = sequence_log_prob(model, encoder_out[0], hyp.tokens, blank_ids=(0, UNK_ID))
        assert hyp.score == pytest.approx(exact, abs=1e-3)
