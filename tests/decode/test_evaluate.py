import dataclasses

import pytest
import torch

from transducer_kd.data.batch import Batch
from transducer_kd.decode import evaluate
from transducer_kd.decode import lattice as lat
from transducer_kd.log import UserError

CPU = torch.device("cpu")


class LetterTokenizer:
    """Token 3 is "d", token 4 "e", ..., each a word of its own."""

    def decode(self, ids):
        return " ".join(chr(97 + i) for i in ids)


@pytest.fixture
def batches():
    torch.manual_seed(2)
    out = []
    for number, lens in enumerate([[60, 33], [41, 40, 7]]):
        n = len(lens)
        out.append(
            Batch(
                features=4 * torch.randn(n, max(lens), 80) - 8,
                feature_lens=torch.tensor(lens),
                y=torch.zeros(n, 1, dtype=torch.int64),
                y_lens=torch.zeros(n, dtype=torch.int64),
                cut_ids=[f"cut-{number}-{i}" for i in range(n)],
                texts=["d e f"] * n,
            )
        )
    return out


def make_decoder(model, batches, **kwargs):
    options = kwargs.pop("options", evaluate.SearchOptions(chunk_size=model.config.encoder.chunk_size))
    return evaluate.PartDecoder(model, LetterTokenizer(), lambda: iter(batches), options, CPU, **kwargs)


def test_every_method_gets_every_utterance_and_the_encoder_runs_once(monkeypatch, build_model, batches):
    model = build_model(chunk_size=4)
    calls = []
    real = model.encode
    monkeypatch.setattr(model, "encode", lambda *args: calls.append(args) or real(*args))
    methods = ["streaming_greedy_search", "modified_beam_search", "greedy_search"]
    results = {r.method: r for r in make_decoder(model, batches).decode(methods)}
    assert list(results) == ["greedy_search", "modified_beam_search", "streaming_greedy_search"]
    assert len(calls) == len(batches)
    for result in results.values():
        assert [u[0] for u in result.utterances] == ["cut-0-0", "cut-0-1", "cut-1-0", "cut-1-1", "cut-1-2"]
        assert all(ref == ["d", "e", "f"] for _, ref, _ in result.utterances)
        assert result.audio_s == pytest.approx(1.81)
        assert result.decode_s > 0
    assert results["greedy_search"].utterances == results["streaming_greedy_search"].utterances
    assert any(hyp for _, _, hyp in results["greedy_search"].utterances)


@pytest.mark.parametrize("cache_bytes", [0, 1])
def test_what_does_not_fit_into_memory_is_encoded_again(monkeypatch, build_model, batches, cache_bytes):
    model = build_model()
    methods = ["greedy_search", "modified_beam_search"]
    expected = [r.utterances for r in make_decoder(model, batches).decode(methods)]
    monkeypatch.setattr(evaluate, "_CACHE_BYTES", cache_bytes)
    assert [r.utterances for r in make_decoder(model, batches).decode(methods)] == expected


def test_a_finished_method_is_there_before_the_next_begins(monkeypatch, build_model, batches):
    def fails(*args):
        raise RuntimeError("stopped here")

    monkeypatch.setattr(evaluate, "modified_beam_search", fails)
    results = make_decoder(build_model(), batches).decode(["greedy_search", "modified_beam_search"])
    assert next(results).method == "greedy_search"
    with pytest.raises(RuntimeError, match="stopped here"):
        next(results)


@pytest.mark.parametrize(
    "asked", [evaluate.LATTICE_METHODS, evaluate.LATTICE_METHODS[:1], ["fast_beam_search_nbest"]]
)
def test_lattice_methods_share_lattices(monkeypatch, tmp_path, build_model, batches, asked):
    pytest.importorskip("k2", reason="lattices need k2")
    calls = []
    real = lat.fast_beam_search_lattice
    monkeypatch.setattr(lat, "fast_beam_search_lattice", lambda *args: calls.append(args) or real(*args))
    results = list(make_decoder(build_model(), batches, lattice_dir=tmp_path / "lattices").decode(asked))
    assert [r.method for r in results] == list(asked)
    assert all(len(r.utterances) == 5 for r in results)
    assert len(calls) == len(batches)
    files = sorted((tmp_path / "lattices").iterdir())
    assert [lat.load_lattices(f)[0] for f in files] == [b.cut_ids for b in batches]


def test_the_oracle_is_never_worse(build_model, batches):
    pytest.importorskip("k2", reason="lattices need k2")
    from transducer_kd.decode import wer

    results = make_decoder(build_model(), batches).decode(evaluate.LATTICE_METHODS)
    one_best, nbest, oracle = (wer.word_error_rate(r.utterances) for r in results)
    assert oracle < min(one_best, nbest)


def test_settings_name_what_a_method_uses():
    options = evaluate.SearchOptions(chunk_size=16, num_paths=50)
    assert options.suffix("greedy_search") == "streaming-chunk-size-16-max-sym-per-frame-1"
    assert options.of("fast_beam_search") == {"beam": 20.0, "max_contexts": 8, "max_states": 64}
    offline = dataclasses.replace(options, chunk_size=0)
    assert offline.suffix("modified_beam_search") == "beam-size-4"
    assert offline.suffix("fast_beam_search_nbest_oracle") == (
        "beam-20.0-max-contexts-8-max-states-64-num-paths-50-nbest-scale-0.5"
    )


def test_methods_that_cannot_work_are_refused_at_once(build_model):
    offline = evaluate.SearchOptions()
    with pytest.raises(UserError, match="beem_search is not known; known: greedy_search"):
        evaluate.check_methods(["beem_search"], build_model(), offline, CPU)
    with pytest.raises(UserError, match="streaming_greedy_search needs a chunk size.*--chunk-size"):
        evaluate.check_methods(["streaming_greedy_search"], build_model(), offline, CPU)
    evaluate.check_methods(["greedy_search", "modified_beam_search"], build_model("lstm"), offline, CPU)
