"""Odd inputs are as odd as their names say."""

import numpy as np
import pytest

from transducer_kd.export.odd_inputs import odd_inputs
from transducer_kd.export.sherpa import num_frames, tail_samples


@pytest.fixture
def speech():
    return (0.1 * np.sin(np.arange(48000) / 7)).astype(np.float32)


@pytest.mark.parametrize("chunk_size", [4, 16])
def test_lengths_in_feature_frames(speech, chunk_size):
    lengths = {name: num_frames(len(samples)) for name, samples in odd_inputs(speech, chunk_size).items()}
    chunk = 4 * chunk_size
    assert lengths["one frame"] == 1
    assert chunk // 2 <= lengths["half a chunk"] < chunk
    assert lengths["exactly a chunk"] == chunk + 3
    assert lengths["a frame more than a chunk"] == chunk + 4
    assert lengths["exactly 3 chunks"] == 3 * chunk + 3
    assert (lengths["silence"], lengths["cut at 0.5 s"], lengths["cut at 1 s"]) == (200, 50, 100)
    assert lengths["silence before and after"] == num_frames(len(speech)) + 400


def test_a_sample_around_a_chunk(speech):
    inputs = odd_inputs(speech, 4)
    less, exactly, more = (
        len(inputs[f"{words} a chunk"]) for words in ("a sample less than", "exactly", "a sample more than")
    )
    assert (less, more) == (exactly - 1, exactly + 1)


def test_a_frame_more_than_a_chunk_is_the_first_that_needs_two(speech):
    """The runtime decodes a chunk when it has a frame more: what is exactly a chunk needs a tail."""
    inputs = odd_inputs(speech, 4)
    frames = {
        name: num_frames(len(samples) + tail_samples(len(samples), 4)) for name, samples in inputs.items()
    }
    assert frames["exactly a chunk"] == 4 * 4 + 4 and frames["a frame more than a chunk"] == 2 * 4 * 4 + 4


def test_loudness(speech):
    inputs = odd_inputs(speech, 16)
    assert not inputs["silence"].any()
    noise = inputs["quiet noise"]
    assert 20 * np.log10(np.sqrt(np.mean(noise**2))) == pytest.approx(-60, abs=0.1)
    clipped = inputs["clipped"]
    assert np.abs(clipped).max() == 1 and 0.5 < (np.abs(clipped) == 1).mean() < 0.9
    assert np.array_equal(noise, odd_inputs(speech, 16)["quiet noise"]), "the same each time"


def test_a_short_recording_and_silence_will_do():
    for speech in (np.ones(100, dtype=np.float32), np.zeros(9000, dtype=np.float32)):
        inputs = odd_inputs(speech, 0)
        assert len(inputs["exactly 3 chunks"]) == 160 * (3 * 64 + 3)
        assert all(samples.dtype == np.float32 and np.isfinite(samples).all() for samples in inputs.values())
