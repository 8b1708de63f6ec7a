"""Features of every implementation agree, and what is stored is what is read."""

import importlib.util

import numpy as np
import pytest

from transducer_kd.data import features as feats
from transducer_kd.data.features import FeatureExtractor, FeatureFileReader, FeatureFileWriter, num_frames
from transducer_kd.log import UserError


def speechlike(samples: int, seed: int = 0) -> np.ndarray:
    """(S,) a few harmonics that come and go, with noise and stretches of digital silence."""
    rng, time = np.random.default_rng(seed), np.arange(samples) / 16000
    voice = sum(np.sin(2 * np.pi * 140 * k * time) / k for k in range(1, 12))
    wave = 0.1 * voice * (np.sin(2 * np.pi * 3 * time) > 0) + 0.01 * rng.standard_normal(samples)
    wave[samples // 3 : samples // 2] = 0.0
    return wave.astype(np.float32)


@pytest.mark.parametrize("samples", [1, 79, 80, 400, 16000, 16079, 16080, 31999])
def test_number_of_frames(samples):
    if samples >= 400:  # lhotse needs a window of audio
        assert FeatureExtractor("lhotse").extract(speechlike(samples)).shape == (num_frames(samples), 80)
    assert num_frames(samples) == int(samples / 160 + 0.5)


@pytest.mark.skipif(importlib.util.find_spec("kaldifeat") is None, reason="kaldifeat is not installed here")
def test_kaldifeat_equals_lhotse():
    wave = speechlike(48123)
    ours, theirs = FeatureExtractor("kaldifeat").extract(wave), FeatureExtractor("lhotse").extract(wave)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 1e-3  # measured: 9e-5 here, 6.4e-4 on real speech


def test_equals_what_sherpa_onnx_computes_on_the_device():
    """sherpa-onnx runs the exported model on kaldi-native-fbank with these options (its feature extractor's
    own).
    """
    knf = pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed here")
    options = knf.FbankOptions()
    options.frame_opts.samp_freq = 16000
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = 80
    options.mel_opts.low_freq = 20.0
    options.mel_opts.high_freq = -400.0
    wave = speechlike(48123)
    online = knf.OnlineFbank(options)
    online.accept_waveform(16000, wave.tolist())
    online.input_finished()
    device = np.stack([online.get_frame(i) for i in range(online.num_frames_ready)])
    ours = FeatureExtractor("auto").extract(wave)
    assert device.shape == ours.shape
    assert np.abs(device - ours).max() < 1e-3  # measured: 9e-5 here, 7e-4 on real speech
    assert ours.min() > -15.95  # the log's floor is float32's epsilon, also in digital silence


def test_unknown_backend_and_other_sampling_rates_are_errors():
    with pytest.raises(UserError, match="torchaudio"):
        FeatureExtractor("torchaudio")
    with pytest.raises(UserError, match="8000 Hz"):
        FeatureExtractor("lhotse").extract(speechlike(4000), 8000)


def test_asking_for_kaldifeat_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(feats, "_import_kaldifeat", lambda: None)
    assert FeatureExtractor("auto").backend == "lhotse"
    with pytest.raises(UserError, match="kaldifeat is not installed"):
        FeatureExtractor("kaldifeat")


def test_stored_features_come_back_within_half_precision(tmp_path):
    extractor = FeatureExtractor()
    matrices = [extractor.extract(speechlike(n, seed=n)) for n in (16000, 23456, 8000)]
    path = tmp_path / "0.f16"
    with open(path, "wb") as f:
        writer = FeatureFileWriter(f, str(path))
        stored = [writer.write(m, f"r{i}", 0.0, len(m) / 100) for i, m in enumerate(matrices)]
    for manifest, matrix in zip(stored, matrices):
        loaded = manifest.load()
        assert loaded.dtype == np.float32 and loaded.shape == matrix.shape
        assert np.abs(loaded - matrix).max() <= 0.004
    part = FeatureFileReader(str(path)).read(stored[1].storage_key, 10, 20)
    np.testing.assert_array_equal(part, stored[1].load()[10:20])
    assert path.stat().st_size == pytest.approx(sum(len(m) for m in matrices) / 100 * feats.BYTES_PER_AUDIO_S)


def test_a_feature_file_written_anew_is_read_anew(tmp_path):
    path = tmp_path / "0.f16"
    for value in (1.0, 2.0):
        with open(path, "wb") as f:
            stored = FeatureFileWriter(f, str(path)).write(
                np.full((7 + int(value), 80), value), "r", 0.0, 0.1
            )
        assert np.all(stored.load() == value)
