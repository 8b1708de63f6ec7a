"""PyTorch and the runtimes side by side on tiny exported models."""

import copy

import numpy as np
import pytest
import torch

from tests.export import folders
from transducer_kd.data.features import FeatureExtractor
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.export import dev_speech, odd_inputs, parity
from transducer_kd.export.dev_speech import DevSpeech
from transducer_kd.export.folder import file_name, open_folder
from transducer_kd.export.implementations import TorchModels, comparisons
from transducer_kd.export.onnx_files import parts_of, write_part
from transducer_kd.export.parity import Recording
from transducer_kd.export.tensors import check_tensors, chunk_rows

NAMES = ["pytorch", "onnx", "int8"]


@pytest.fixture
def with_int8(tmp_path):
    """Function: a copy of an exported folder whose int8 files are of another model, or its own float ones."""

    def copied(path, other=None):
        folder = folders.with_int8(path, tmp_path / "copy")
        if other is None:
            return folder
        for part in parts_of(other, other):
            write_part(part, folder.path / file_name(part.name, "int8"))
        return folders.described_anew(folder.path)

    return copied


def another(model):
    """One of the same sizes with other weights."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def torch_models(lang_dir):
    """Function: modes and their models -> what the gate calls PyTorch."""
    tokenizer, extract = Tokenizer(lang_dir), FeatureExtractor("lhotse").extract
    return lambda models: TorchModels(models, extract, lambda tokens: tokenizer.decode(tokens).split())


@pytest.fixture(scope="module")
def recordings():
    """Noise that rises and falls, of 0.3 to 3 s."""
    rng = np.random.default_rng(0)
    noises = [0.1 * rng.standard_normal(size) for size in (4800, 16000, 48000, 20011)]
    return [
        Recording(
            f"cut-{i}", (noise * np.sin(np.arange(len(noise)) / 1500)).astype(np.float32), ["stop", "it"]
        )
        for i, noise in enumerate(noises)
    ]


def test_a_streaming_phase_with_two_passes(las_folder, las_model, with_int8, torch_models, recordings):
    folder = with_int8(las_folder)
    models = torch_models({"streaming": las_model, "offline": las_model})
    compared = comparisons(folder, models)
    assert [(one.mode, one.two_pass, list(one.implementations)) for one in compared] == [
        ("streaming", False, ["pytorch", "chunks", "onnx", "int8"]), ("streaming", True, NAMES),
        ("offline", False, NAMES), ("offline", True, NAMES),
    ]  # fmt: skip
    samples = [one.samples for one in recordings]
    for one in compared:
        said = {name: recognise(samples) for name, recognise in one.implementations.items()}
        assert all(words == said["pytorch"] for words in said.values()), (one.mode, one.two_pass)
        assert len({" ".join(words) for words in said["pytorch"]}) > 2, "there is something to disagree about"


def test_an_offline_phase(offline_folder, offline_model, with_int8, torch_models, recordings):
    (one,) = comparisons(with_int8(offline_folder), torch_models({"offline": offline_model}))
    said = [recognise([r.samples for r in recordings]) for recognise in one.implementations.values()]
    assert (one.mode, list(one.implementations)) == ("offline", NAMES) and said[0] == said[1] == said[2]


def test_odd_inputs_are_understood_alike(
    streaming_folder, streaming_model, with_int8, torch_models, recordings
):
    models = torch_models({"streaming": streaming_model, "offline": streaming_model})
    folder = with_int8(streaming_folder)
    odd = {
        f"{kind}, {one.name}": samples
        for one in recordings[2:]
        for kind, samples in odd_inputs.odd_inputs(one.samples, folder.info["chunk_size"]).items()
    }
    assert len(odd) == 2 * 13
    rows = [row for one in comparisons(folder, models) for row in parity.check_odd(one, odd)]
    assert len(rows) == 2 * len(odd) and all(row["same"] for row in rows)
    assert len(rows[0]["words"]) == 4 and len({row["words"]["onnx"] for row in rows}) > 4


class TestDevSpeech:
    def test_files_that_are_pytorchs_lose_nothing(
        self, streaming_folder, streaming_model, with_int8, torch_models, recordings
    ):
        folder = with_int8(streaming_folder)
        models = torch_models({"streaming": streaming_model, "offline": streaming_model})
        loss = DevSpeech(folder, models, recordings, {"noise": recordings[1].samples}).loss(folder)
        assert (loss.wer_difference, loss.different) == (0.0, ())

    def test_another_models_files_lose(
        self, streaming_folder, streaming_model, with_int8, torch_models, recordings
    ):
        folder = with_int8(streaming_folder, another(streaming_model))
        models = torch_models({"streaming": streaming_model, "offline": streaming_model})
        said = comparisons(folder, models)[0].implementations["pytorch"]([one.samples for one in recordings])
        known = [Recording(one.name, one.samples, words) for one, words in zip(recordings, said)]
        speech = DevSpeech(folder, models, known, {"noise": recordings[1].samples})
        loss = speech.loss(folder)
        assert loss.wer_difference > 10 and loss.different == ("streaming, noise", "offline, noise")
        assert speech.loss(folder, precision="float").wer_difference == 0
        alone = speech.loss(folder, only=("offline, noise",))
        assert (alone.wer_difference, alone.different) == (0.0, ("offline, noise",))


class TestSteadyInputs:
    """Odd inputs are made of what PyTorch is sure of."""

    def chosen(self, monkeypatch, folder, streaming_model, torch_models, hesitates, num):
        """Which inputs are taken of cut-0, cut-1, ...: kind -> numbers. hesitates: (cut, number of the input
        among those that are still wanted) -> whether PyTorch does.
        """
        speech = [Recording(f"cut-{i}", np.full(4800, i, dtype=np.float32), []) for i in range(5)]

        def hesitations(folder, models, mode, inputs):
            cut = int(inputs[0][0])
            return {i for i in range(len(inputs)) if hesitates(cut, i)}

        monkeypatch.setattr(dev_speech, "_hesitations", hesitations)
        models = torch_models({"streaming": streaming_model, "offline": streaming_model})
        found = {}
        for name in dev_speech.steady_inputs(open_folder(folder), models, speech, num):
            kind, _, cut = name.partition(", cut-")
            found.setdefault(kind, []).append(int(cut or -1))
        return found

    def test_the_first_steady_ones_of_each_kind(
        self, monkeypatch, streaming_folder, streaming_model, torch_models
    ):
        given = (monkeypatch, streaming_folder, streaming_model, torch_models)
        found = self.chosen(*given, lambda cut, i: cut == 0 and i == 0, 2)
        assert found["one frame"] == [1, 2]
        assert found["clipped"] == found["half a chunk"] == [0, 1]
        assert found["silence"] == found["quiet noise"] == [-1]
        assert len(found) == 13

    def test_one_of_each_kind_where_none_is_steady(
        self, monkeypatch, streaming_folder, streaming_model, torch_models
    ):
        given = (monkeypatch, streaming_folder, streaming_model, torch_models)
        found = self.chosen(*given, lambda cut, i: True, 4)
        assert found["one frame"] == found["clipped"] == [0] and found["silence"] == [-1]

    def test_hesitation_is_other_words_for_a_disturbed_encoder(
        self, monkeypatch, streaming_folder, streaming_model, torch_models, recordings
    ):
        models = torch_models({"streaming": streaming_model, "offline": streaming_model})
        given = (open_folder(streaming_folder), models, "streaming", [one.samples for one in recordings])
        for disturbance, expected in ((0.0, set()), (30.0, set(range(len(recordings))))):
            monkeypatch.setattr(dev_speech, "_DISTURBANCE", disturbance)
            assert dev_speech._hesitations(*given) == expected


class TestTensors:
    def test_float_has_a_limit_and_int8_has_none(self, las_folder, las_model, with_int8):
        folder = with_int8(las_folder, another(las_model))
        rows = check_tensors(folder, parts_of(las_model, las_model), las_model)
        assert {(row["part"], row["output"]) for row in rows} >= {
            ("PyTorch by chunks", "encoder_out"), ("encoder-streaming.onnx", "new_cached_conv"),
            ("encoder-offline.onnx", "encoder_frames"), ("las.int8.onnx", "score"),
        }  # fmt: skip
        for row in rows:
            is_int8 = ".int8." in row["part"]
            assert row["passed"] and (row["limit"] is None) == is_int8
            assert is_int8 or row["max_difference"] < 1e-4
        assert max(row["max_difference"] for row in rows) > 0.1

    def test_where_chunks_begin_to_differ_is_named(self, streaming_model, monkeypatch):
        encoder = streaming_model.encoder
        (row,) = chunk_rows(encoder)
        assert row["passed"] and row["starts_at"] is None and row["max_difference"] < 1e-5
        layer = encoder.layers[1]
        real = layer.streaming

        def forgets(x, rotary, bias, padding, caches):
            return real(x, rotary, bias, padding, (caches[0], torch.zeros_like(caches[1])))

        monkeypatch.setattr(layer, "streaming", forgets)
        (row,) = chunk_rows(encoder)
        assert not row["passed"] and row["starts_at"] == "encoder.layers.1" and row["max_difference"] > 1e-3
