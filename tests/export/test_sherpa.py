"""sherpa-onnx says what PyTorch says, hears the end, and is never given what would end the process."""

import shutil

import pytest
import torch

from tests.data.test_features import speechlike
from tests.export.folders import without_metadata, without_words
from transducer_kd.data import features
from transducer_kd.data.features import FeatureExtractor
from transducer_kd.decode.greedy import greedy_search
from transducer_kd.decode.streaming import streaming_greedy_search
from transducer_kd.export import sherpa
from transducer_kd.export.folder import open_folder
from transducer_kd.export.sherpa import SherpaOffline, SherpaStreaming, num_frames, padded, tail_samples
from transducer_kd.export.two_pass import TwoPassRecogniser
from transducer_kd.log import UserError
from transducer_kd.models import subsampling

CHUNK = 4  # of the tiny models
CHUNK_SAMPLES = 160 * 4 * CHUNK
LENGTHS = [1, 160, CHUNK_SAMPLES - 1, CHUNK_SAMPLES, CHUNK_SAMPLES + 481, 3 * CHUNK_SAMPLES, 33333]


def test_constants_are_those_of_the_models():
    assert sherpa.SUBSAMPLING_FACTOR == subsampling.SUBSAMPLING_FACTOR
    assert sherpa.LOOKAHEAD_FRAMES == subsampling.LOOKAHEAD_FRAMES
    assert sherpa.MIN_FEATURE_FRAMES == subsampling.MIN_FEATURE_FRAMES
    assert (sherpa.SAMPLING_RATE, sherpa.FEATURE_DIM) == (features.SAMPLING_RATE, features.FEATURE_DIM)
    assert all(sherpa.num_frames(s) == features.num_frames(s) for s in range(0, 2000, 7))


@pytest.mark.parametrize("chunk_size", [1, 4, 16])
def test_the_tail_is_long_enough_for_every_frame_and_no_longer(chunk_size):
    step = 4 * chunk_size
    for num_samples in [*range(0, 3 * 160 * step, 37), *range(160 * step - 100, 160 * step + 700)]:
        tail = tail_samples(num_samples, chunk_size)
        frames = features.num_frames(num_samples + tail)
        # Chunks that sherpa-onnx runs: while processed + T < frames.
        num_chunks = len([n for n in range(frames) if n * step + step + 3 < frames])
        heard = num_chunks * step + 3
        assert heard >= features.num_frames(num_samples), "a frame of the audio is not decoded"
        assert frames == heard + 1 and features.num_frames(num_samples + tail - 1) == heard
        assert num_chunks == 1 or heard - step < features.num_frames(num_samples), "a chunk of silence"
        assert subsampling.subsampled_lens(frames) == num_chunks * chunk_size, "PyTorch has other frames"


def test_the_tail_of_whole_utterances_makes_one_encoder_frame():
    assert all(
        subsampling.subsampled_lens(features.num_frames(s + tail_samples(s, 0))) >= 1 for s in range(1500)
    )
    assert features.num_frames(5 + tail_samples(5, 0)) == 7
    assert [tail_samples(s, 0) for s in (1040, 1041, 16000)] == [0, 0, 0]


def hypothesis(model, folder, samples, search=greedy_search):
    """PyTorch's tokens for what the recognisers hear."""
    x = torch.from_numpy(FeatureExtractor("lhotse").extract(padded(samples, folder)))[None]
    x_lens = torch.tensor([x.size(1)])
    with torch.inference_mode():
        inputs = model.encode(x, x_lens) if search is greedy_search else (x, x_lens)
        return search(model, *inputs)[0].tokens


def symbols(folder, tokens):
    lines = (folder.path / "tokens.txt").read_text(encoding="utf-8").splitlines()
    names = {
        int(number): symbol.replace("\u2581", " ") for symbol, number in (line.split() for line in lines)
    }
    return "".join(names[token] for token in tokens).strip()


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_streaming_equals_pytorch_chunk_by_chunk_and_whole(streaming_folder, streaming_model, num_samples):
    folder, samples = open_folder(streaming_folder), speechlike(num_samples, seed=num_samples)
    tokens = hypothesis(streaming_model, folder, samples)
    assert tokens or num_samples < 8000, "the model says nothing, and the test asks nothing"
    assert tokens == hypothesis(streaming_model, folder, samples, streaming_greedy_search)
    assert SherpaStreaming(folder).decode(samples) == symbols(folder, tokens)
    # The same chunks, seen at once.
    assert SherpaOffline(folder).decode(samples) == symbols(folder, tokens)


@pytest.mark.parametrize("num_samples", LENGTHS)
def test_offline_equals_pytorch(offline_folder, offline_model, num_samples):
    folder, samples = open_folder(offline_folder), speechlike(num_samples, seed=num_samples)
    tokens = hypothesis(offline_model, folder, samples)
    assert SherpaOffline(folder).decode(samples) == symbols(folder, tokens)


def test_an_utterance_does_not_depend_on_the_one_before(streaming_folder):
    folder = open_folder(streaming_folder)
    utterances = [speechlike(n, seed=n) for n in (20000, 5000, 33333)]
    for kind in (SherpaStreaming, SherpaOffline):
        recogniser = kind(folder)
        assert [recogniser.decode(one) for one in utterances] == [
            kind(folder).decode(one) for one in utterances
        ]


def test_beam_search_runs_and_finds_something_else(streaming_folder):
    folder, samples = open_folder(streaming_folder), speechlike(33333)
    found = {
        recogniser(folder, decoding_method=method).decode(samples)
        for recogniser in (SherpaStreaming, SherpaOffline)
        for method in ("greedy_search", "modified_beam_search")
    }
    assert len(found) == 2


@pytest.mark.parametrize("piece", [1000, CHUNK_SAMPLES, 20000])
def test_words_do_not_depend_on_how_audio_is_cut(streaming_folder, piece):
    recogniser, samples = SherpaStreaming(open_folder(streaming_folder)), speechlike(33333)
    stream, seen = recogniser.stream(), [""]
    for start in range(0, len(samples), piece):
        stream.accept(samples[start : start + piece])
        seen.append(stream.text())
    stream.finish()
    stream.finish()
    assert stream.text() == stream.final_text() == recogniser.decode(samples) != ""
    assert "".join(stream.tokens()).replace("\u2581", " ").strip() == stream.text()
    assert all(later.startswith(earlier) for earlier, later in zip(seen, seen[1:]))
    assert len(set(seen)) > 2 or piece == 20000, "nothing was shown before the end"
    with pytest.raises(ValueError, match="over"):
        stream.accept(samples)


@pytest.mark.parametrize(
    "kind, folder", [(SherpaStreaming, "streaming_folder"), (TwoPassRecogniser, "las_folder")]
)
@pytest.mark.parametrize("pause_s", [0.0, 0.6, 1e9])
def test_an_utterance_begins_with_a_model_that_has_heard_half_a_pause(kind, folder, pause_s, request):
    recogniser = kind(open_folder(request.getfixturevalue(folder)), pause_s=pause_s)
    stream, samples, again = recogniser.stream(), speechlike(60000), round(min(8000 * pause_s, 16000))
    begin, restarts, texts = 0, 0, set()
    for end in range(7000, 60001, 7000):
        stream.accept(samples[end - 7000 : end])
        # The same audio, heard by a stream that knows of nothing before.
        alone = recogniser.stream()
        alone.accept(samples[begin:end])
        assert (stream.text(), stream.final_text()) == (alone.text(), alone.final_text())
        if stream.text():
            texts.add(stream.text())
            # Chunks of which every frame is certain before more audio comes.
            decoded = begin + CHUNK_SAMPLES * ((num_frames(end - begin) - 4) // (4 * CHUNK))
            left_out = end - len(stream._recent)
            assert abs(left_out - max(begin, decoded - again)) <= CHUNK_SAMPLES, "half a pause is heard again"
            stream.restart()
            begin, restarts = left_out, restarts + 1
    assert restarts > 3 and len(texts) > 3


@pytest.mark.parametrize("method", sherpa.DECODING_METHODS)
def test_nothing_of_an_utterance_that_is_over_stays(streaming_folder, method):
    stream = SherpaStreaming(open_folder(streaming_folder), decoding_method=method).stream()
    for seed in range(6):
        stream.accept(speechlike(9000, seed))
        assert "".join(stream.tokens()).replace("\u2581", " ").strip() == stream.text() != ""
        stream.restart()
        assert (stream.text(), stream.tokens()) == ("", [])


def test_a_silence_goes_on_until_it_is_long(streaming_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sherpa, "LONGEST_SILENCE", 30000)
    folder = without_words(streaming_folder, tmp_path / "silent")
    stream, begun = SherpaStreaming(folder, pause_s=0.2).stream(), set()
    for _ in range(10):
        stream.accept(speechlike(8000))
        begun.add(stream._stream)
        assert stream.at_pause()
        stream.restart()
        assert len(stream._recent) < 1600 + CHUNK_SAMPLES + 5 * 160, "audio is forgotten"
    assert len(begun) == 3


@pytest.mark.parametrize("pause_s, expected", [(0.5, True), (5.0, False), (0.0, False)])
def test_a_pause_is_noticed(streaming_folder, tmp_path, pause_s, expected):
    folder = without_words(streaming_folder, tmp_path / "silent")
    stream = SherpaStreaming(folder, pause_s=pause_s).stream()
    assert not stream.at_pause()
    stream.accept(speechlike(24000))
    assert stream.text() == "" and stream.at_pause() == expected


# ---------------------------------------------------------------- what would end the process


@pytest.mark.parametrize(
    "part, key, runs",
    [
        ("encoder-streaming", "left_context", SherpaStreaming),
        ("encoder-streaming", "T", SherpaStreaming),
        ("decoder", "context_size", SherpaStreaming),
        ("decoder", "vocab_size", SherpaOffline),
    ],
)
def test_missing_metadata_is_an_error_and_not_the_end_of_the_process(
    streaming_folder, tmp_path, part, key, runs
):
    folder = without_metadata(streaming_folder, tmp_path / "copy", part, key)
    with pytest.raises(UserError, match=f"{part}.onnx has no metadata {key}, .*local/export.py"):
        runs(open_folder(folder.path))


def test_what_a_folder_does_not_have(streaming_folder, offline_folder, tmp_path):
    with pytest.raises(UserError, match="does not stream.*offline"):
        SherpaStreaming(open_folder(offline_folder))
    with pytest.raises(UserError, match="has no encoder-offline.int8.onnx"):
        SherpaOffline(open_folder(offline_folder), "int8")
    with pytest.raises(UserError, match="'fast_beam_search' is not one of greedy_search"):
        SherpaStreaming(open_folder(streaming_folder), decoding_method="fast_beam_search")
    copy = open_folder(shutil.copytree(streaming_folder, tmp_path / "copy"))
    (copy.path / "tokens.txt").unlink()
    for recogniser in (SherpaStreaming, SherpaOffline):
        with pytest.raises(UserError, match="tokens.txt is missing; copy the whole folder"):
            recogniser(copy)


@pytest.mark.parametrize(
    "change",
    [lambda lines: lines[:-1], lambda lines: [*lines[:-1], "x y"], lambda lines: [*lines, lines[-1]]],
)
def test_tokens_of_another_model(las_folder, tmp_path, change):
    folder = open_folder(shutil.copytree(las_folder, tmp_path / "copy"))
    path = folder.path / "tokens.txt"
    path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    for recogniser in (SherpaStreaming, SherpaOffline, TwoPassRecogniser):
        with pytest.raises(UserError, match=r"tokens\.txt is not of this model.*0 to 39"):
            recogniser(folder)
