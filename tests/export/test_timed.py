"""Recognisers on the clock: every chunk is timed, once, and features apart from the model."""

import itertools

import numpy as np
import pytest

from tests.data.test_features import speechlike
from transducer_kd.export.folder import open_folder
from transducer_kd.export.sherpa import SherpaStreaming, num_frames, tail_samples
from transducer_kd.export.timed import Candidate, Heard, TimedStream, latency_percentiles

CHUNK = 4  # of the tiny models


def ticking():
    """A clock that is a second later whenever it is looked at."""
    return itertools.count().__next__


def pieces(samples, size):
    return [samples[start : start + size] for start in range(0, len(samples), size)]


@pytest.mark.parametrize("num_samples", [100, 16000, 33333])
def test_every_chunk_of_a_stream_is_timed(streaming_folder, num_samples):
    candidate = Candidate(open_folder(streaming_folder), "float")
    assert candidate.mode == "streaming" and candidate.piece_samples == 1600
    given = pieces(speechlike(num_samples), candidate.piece_samples)
    heard = list(candidate.hear(given, ticking()))
    assert len(heard) == len(given) + 1  # the silence at the end
    frames = num_frames(num_samples + tail_samples(num_samples, CHUNK))
    assert sum(len(piece.chunks_s) for piece in heard) == (frames - 4) // (4 * CHUNK)
    assert {piece.features_s for piece in heard[:-1]} == {1}
    assert {seconds for piece in heard for seconds in piece.chunks_s} == {1}


def test_a_stream_says_what_one_without_a_clock_does_and_begins_anew_at_a_pause(streaming_folder):
    folder, samples = open_folder(streaming_folder), speechlike(40000)
    for pause_s in (0.0, 0.3):
        recogniser = SherpaStreaming(folder, pause_s=pause_s)
        timed, plain, pauses, texts = TimedStream(recogniser), recogniser.stream(), 0, set()
        for piece in pieces(np.concatenate([samples, np.zeros(16000, np.float32), samples]), 1600):
            timed.hear(piece)
            plain.accept(piece)
            if plain.at_pause():
                pauses += bool(plain.text())
                plain.restart()
            texts.add(timed.text())
            assert timed.text() == plain.text()
        timed.end()
        plain.finish()
        assert timed.text() == plain.text() and len(texts) > 3 and bool(pauses) is (pause_s > 0)


def test_how_a_stream_is_cut_changes_no_number_of_chunks(streaming_folder):
    candidate, samples = Candidate(open_folder(streaming_folder), "float"), speechlike(20000)
    counts = {
        sum(len(piece.chunks_s) for piece in candidate.hear(pieces(samples, size))) for size in (160, 20000)
    }
    assert len(counts) == 1 and counts.pop() > 5


def test_a_model_that_does_not_stream_hears_utterances(offline_folder):
    candidate = Candidate(open_folder(offline_folder), "float")
    assert candidate.mode == "offline" and candidate.piece_samples == 160000
    heard = list(candidate.hear(pieces(speechlike(200000), candidate.piece_samples), ticking()))
    assert heard == [Heard(1, [1]), Heard(1, [1])]


def test_processor_seconds_are_counted(streaming_folder):
    heard = list(Candidate(open_folder(streaming_folder), "float").hear([speechlike(16000)]))
    assert heard[0].features_s > 0 and min(heard[0].chunks_s) > 0


def test_latency_is_from_the_arrival_of_the_piece():
    assert Heard(2.0, [3.0, 4.0]).latencies_s == [5.0, 9.0]
    assert Heard(2.0, []).latencies_s == []
    milliseconds = [Heard(0.0, [s / 1000]) for s in range(101)]
    assert latency_percentiles(milliseconds) == pytest.approx((50, 95))
    assert latency_percentiles([Heard(9.0, []), *milliseconds]) == pytest.approx((50, 95))
    assert np.isscalar(latency_percentiles(milliseconds)[0])
