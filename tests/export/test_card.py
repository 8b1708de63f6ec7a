"""The program on the model card, run as somebody would who has sherpa-onnx and the folder."""

import dataclasses
import re

import numpy as np
import pytest

from tests.data.test_features import speechlike
from tests.export.folders import with_int8
from transducer_kd.export.card import write_card
from transducer_kd.export.folder import open_folder
from transducer_kd.export.sherpa import SherpaOffline, SherpaStreaming

CHUNK = 4  # of the tiny models


def card_of(folder, gate=None):
    write_card(open_folder(folder), gate)
    return (folder / "README.md").read_text()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Function: what the program on the card of a folder prints when it hears samples (S,)."""

    def call(path, samples, piece=1600):
        (code,) = re.findall("```python\n(.*?)```", card_of(path), re.DOTALL)
        monkeypatch.chdir(path)
        pieces = [samples[start : start + piece] for start in range(0, len(samples), piece)]
        exec(code, {"microphone": pieces, "samples": samples})
        return [line.strip() for line in capsys.readouterr().out.splitlines()]

    return call


def heard(recogniser, samples):
    """A stream that has heard samples (S,) and the silence that the card names."""
    stream = recogniser.stream()
    stream.accept(np.concatenate([samples, np.zeros(160 * (4 * CHUNK + 4), dtype=np.float32)]))
    stream._end()
    stream._num_decoded += stream._run() * CHUNK * 640
    return stream


@pytest.mark.parametrize("num_samples", [100, 16000, 33333])
def test_the_program_of_a_model_that_streams_hears_all(streaming_folder, tmp_path, run, num_samples):
    folder, samples = with_int8(streaming_folder, tmp_path / "model"), speechlike(num_samples)
    said = run(folder.path, samples)
    stream = heard(SherpaStreaming(folder, "int8"), samples)
    assert said == [stream.text()] and (said[0] or num_samples < 8000)
    # The silence that the card names is enough: every chunk with a frame of the samples is decoded.
    assert stream._num_decoded >= num_samples - 80
    assert 'encoder="encoder-streaming.int8.onnx"' in card_of(folder.path)
    assert "0.20 s of silence" in card_of(folder.path)


def test_the_program_begins_anew_after_a_pause(las_folder, tmp_path, run, monkeypatch):
    pauses = iter([False, False, True] + 100 * [False])
    monkeypatch.setattr("sherpa_onnx.OnlineRecognizer.is_endpoint", lambda *_: next(pauses))
    samples = speechlike(4 * 9000)
    folder = with_int8(las_folder, tmp_path / "model")
    first, second = run(folder.path, samples, piece=9000)
    recogniser = SherpaStreaming(folder, "int8")
    alone = recogniser.stream()
    alone.accept(samples[:27000])
    assert first == alone.text()
    assert second == heard(recogniser, samples[27000:]).text() != ""


def test_the_program_of_a_model_that_does_not_stream(offline_folder, tmp_path, run):
    folder, samples = with_int8(offline_folder, tmp_path / "model"), speechlike(20000)
    assert run(folder.path, samples) == [SherpaOffline(folder, "int8").decode(samples)] != [""]


def test_what_the_gate_found_on_odd_inputs(streaming_folder, tmp_path):
    folder = with_int8(streaming_folder, tmp_path / "model").path
    gate = {"passed": True, "runtime": "sherpa-onnx", "words": [], "odd": [{"same": True}, {"same": False}]}
    assert "the same words everywhere for 1 of 2" in card_of(folder, gate)


@pytest.mark.parametrize("join_prob, told", [(0.0, "has never learnt"), (0.3, "has learnt pairs")])
def test_what_reset_costs_depends_on_what_was_learnt(streaming_folder, tmp_path, join_prob, told):
    folder = with_int8(streaming_folder, tmp_path / "model")
    write_card(dataclasses.replace(folder, info={**folder.info, "join_prob": join_prob}), None)
    assert told in (folder.path / "README.md").read_text()
