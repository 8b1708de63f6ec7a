"""A folder in onnxruntime: features, encoders and searches give what PyTorch gives."""

import numpy as np
import pytest
import torch

from tests.data.test_features import speechlike
from transducer_kd.data.features import FeatureExtractor, num_frames
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.greedy import greedy_search
from transducer_kd.export.folder import open_folder
from transducer_kd.export.session import FeatureStream, OnnxTransducer, features, load_session
from transducer_kd.log import UserError

CHUNK = 4  # of the tiny models


@pytest.mark.parametrize("num_samples", [0, 1, 160, 400, 16000, 48123])
def test_features_are_those_of_training(num_samples):
    samples = speechlike(num_samples)
    found = features(samples)
    assert found.shape == (num_frames(num_samples), 80) and found.dtype == np.float32
    if num_samples >= 400:  # lhotse needs a window of audio
        assert np.abs(found - FeatureExtractor("lhotse").extract(samples)).max() < 1e-3


def test_features_do_not_depend_on_how_audio_is_cut():
    samples = speechlike(30000)
    stream, taken = FeatureStream(), []
    for start in range(0, len(samples), 777):
        stream.accept(samples[start : start + 777])
        while stream.num_ready() >= 10:
            taken.append(stream.take(10, advance=6)[:6])
    stream.finish()
    taken.append(stream.take(stream.num_ready(), advance=stream.num_ready()))
    assert np.array_equal(np.concatenate(taken), features(samples)) and stream.num_ready() == 0


def inputs(num_frames_of_each, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lens = torch.tensor(num_frames_of_each)
    return 3 * torch.randn(len(lens), int(lens.max()), 80, generator=generator) - 8, lens


@pytest.mark.parametrize("kind", ["streaming", "offline", "las"])
def test_whole_utterances(kind, request):
    model = request.getfixturevalue(f"{kind}_model")
    onnx_model = OnnxTransducer(open_folder(request.getfixturevalue(f"{kind}_folder")))
    x, x_lens = inputs([203, 7, 90])
    found = onnx_model.encode(x, x_lens)
    with torch.inference_mode():
        frames, lens = model.encode(x, x_lens)
        projected = model.joiner.encoder_proj(frames)
    assert found.encoder_out_lens.tolist() == lens.tolist()
    assert (found.frames is None) == (kind != "las")
    for n, length in enumerate(lens):
        assert torch.allclose(found.encoder_out[n, :length], projected[n, :length], atol=1e-4)
        if kind == "las":
            assert torch.allclose(found.frames[n, :length], frames[n, :length], atol=1e-4)


def test_chunk_by_chunk(las_folder, las_model):
    onnx_model = OnnxTransducer(open_folder(las_folder))
    x, _ = inputs([6 * 4 * CHUNK + 3] * 2)
    state, found = onnx_model.streaming_init(2), []
    for start in range(0, 6 * 4 * CHUNK, 4 * CHUNK):
        encoded, state = onnx_model.streaming_forward(x[:, start : start + 4 * CHUNK + 3], state)
        assert encoded.encoder_out_lens.tolist() == [CHUNK, CHUNK]
        assert state.processed_lens.tolist() == [start + 4 * CHUNK] * 2, "sherpa-onnx counts feature frames"
        found.append(encoded)
    with torch.inference_mode():
        frames, _ = las_model.encode(x, torch.tensor([x.size(1)] * 2))
        projected = las_model.joiner.encoder_proj(frames)
    assert torch.allclose(torch.cat([e.encoder_out for e in found], 1), projected, atol=1e-4)
    assert torch.allclose(torch.cat([e.frames for e in found], 1), frames, atol=1e-4)


@pytest.mark.parametrize("kind", ["streaming", "offline"])
def test_searches(kind, request):
    model = request.getfixturevalue(f"{kind}_model")
    onnx_model = OnnxTransducer(open_folder(request.getfixturevalue(f"{kind}_folder")))
    x, x_lens = inputs([203, 7, 90], seed=1)
    encoded = onnx_model.encode(x, x_lens)[:2]
    with torch.inference_mode():
        expected = model.encode(x, x_lens)
    pairs = list(zip(greedy_search(onnx_model, *encoded), greedy_search(model, *expected)))
    for found, nbest in zip(
        modified_beam_search(onnx_model, *encoded), modified_beam_search(model, *expected)
    ):
        assert len(found) == len(nbest)
        pairs += zip(found, nbest)
    for found, hyp in pairs:
        assert (found.tokens, found.timestamps) == (hyp.tokens, hyp.timestamps)
        assert found.score == pytest.approx(hyp.score, abs=1e-3)
    assert sum(len(hyp.tokens) for _, hyp in pairs) > 20


def test_files_that_cannot_be_opened(streaming_folder, tmp_path):
    with pytest.raises(UserError, match="gone.onnx does not exist.*local/export.py"):
        load_session(tmp_path / "gone.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes((streaming_folder / "joiner.onnx").read_bytes()[:500])
    with pytest.raises(UserError, match="damaged.onnx cannot be opened.*export the phase again"):
        load_session(damaged)
    with pytest.raises(UserError, match="has no decoder.int8.onnx"):
        OnnxTransducer(open_folder(streaming_folder), "int8")
