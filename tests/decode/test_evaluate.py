import dataclasses

import pytest
import torch

from transducer_kd.config import LasConfig
from transducer_kd.data.batch import Batch
from transducer_kd.decode import evaluate, wer
from transducer_kd.decode import lattice as lat
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.rescore import Weights
from transducer_kd.log import UserError
from transducer_kd.models.las import Las

CPU = torch.device("cpu")
RESCORE = ("modified_beam_search_las_rescore", "fast_beam_search_nbest_las_rescore")


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


@pytest.fixture
def two_pass(build_model):
    """A transducer with a LAS that is sure of itself, so that the passes disagree."""
    model = build_model()
    torch.manual_seed(5)
    model.config.las = LasConfig(True, 0, 12, attention_dim=8, num_heads=2)
    model.las = Las(model.config, model.vocab_size).eval().requires_grad_(False)
    model.las.output.weight.mul_(4.0)
    return model


def weighted(mu, length_weight=0.0, **kwargs):
    weights = {method: Weights(mu, length_weight, "dev") for method in RESCORE}
    return evaluate.SearchOptions(weights=weights, **kwargs)


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
    "asked", [evaluate.LATTICE_METHODS, evaluate.LATTICE_METHODS[:1], ["fast_beam_search_nbest"], RESCORE[1:]]
)
def test_lattice_methods_share_lattices_and_nbest_lists(monkeypatch, tmp_path, two_pass, batches, asked):
    pytest.importorskip("k2", reason="lattices need k2")
    calls = []
    for name in ("fast_beam_search_lattice", "nbest"):
        real = getattr(lat, name)
        counted = lambda *args, name=name, real=real: calls.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(lat, name, counted)
    decoder = make_decoder(two_pass, batches, options=weighted(0.5), lattice_dir=tmp_path / "lattices")
    results = list(decoder.decode(asked))
    assert [r.method for r in results] == list(asked)
    assert all(len(r.utterances) == 5 for r in results)
    assert calls.count("fast_beam_search_lattice") == len(batches)
    assert calls.count("nbest") == (0 if list(asked) == ["fast_beam_search"] else len(batches))
    files = sorted((tmp_path / "lattices").iterdir())
    assert [lat.load_lattices(f)[0] for f in files] == [b.cut_ids for b in batches]


def test_the_oracle_is_never_worse(two_pass, batches):
    pytest.importorskip("k2", reason="lattices need k2")
    results = make_decoder(two_pass, batches, options=weighted(0.5)).decode(evaluate.LATTICE_METHODS)
    one_best, nbest, oracle, rescored = (wer.word_error_rate(r.utterances) for r in results)
    assert oracle < min(one_best, nbest) and oracle <= rescored


@pytest.mark.parametrize("method", RESCORE)
def test_the_weights_reach_from_the_first_pass_to_the_las(two_pass, batches, method):
    if "fast_beam" in method:
        pytest.importorskip("k2", reason="lattices need k2")
    first_pass = method[: -len("_las_rescore")]

    def decode(mu, **kwargs):
        options = weighted(mu, **kwargs)
        first, rescored = make_decoder(two_pass, batches, options=options).decode([method, first_pass])
        assert (first.method, rescored.method) == (first_pass, method)
        assert first.second_pass_s is None and rescored.second_pass_s > 0
        assert rescored.decode_s == pytest.approx(first.decode_s + rescored.second_pass_s)
        return first.utterances, rescored.utterances

    first, rescored = decode(0.0)
    assert rescored == first
    _, by_las = decode(1.0)
    assert by_las != first
    for (_, _, hyp), best in zip(by_las, choices_of_las(two_pass, batches, method)):
        assert hyp == best
    assert decode(1.0, rescore_nbest=1)[1] == first


def choices_of_las(model, batches, method):
    """Readable twin of rescoring with mu 1: teacher forcing with one hypothesis at a time."""
    for batch in batches:
        out, lens = model.encode(batch.features, batch.feature_lens)
        if "fast_beam" in method:
            nbests = lat.nbest(lat.fast_beam_search_lattice(model, out, lens, lat.FastBeamSearchConfig()))
        else:
            nbests = modified_beam_search(model, out, lens, 4)
        for n, nbest in enumerate(nbests):
            scores = []
            for hyp in nbest:
                y = torch.tensor([hyp.tokens], dtype=torch.int64)
                logits = model.las(out[n : n + 1], lens[n : n + 1], y, torch.tensor([y.size(1)]))
                log_probs = logits[0].log_softmax(-1)
                scores.append(sum(float(p[k]) for p, k in zip(log_probs, [*hyp.tokens, 1])))
            yield LetterTokenizer().decode(nbest[scores.index(max(scores))].tokens).split()


def test_beam_search_runs_once_for_both_passes(monkeypatch, two_pass, batches):
    calls = []
    monkeypatch.setattr(
        evaluate, "modified_beam_search", lambda *args: calls.append(args) or modified_beam_search(*args)
    )
    decoder = make_decoder(two_pass, batches, options=weighted(0.5))
    assert len(list(decoder.decode([RESCORE[0], "modified_beam_search"]))) == 2
    assert len(calls) == len(batches)


@pytest.mark.parametrize("method", RESCORE)
def test_tuning_sees_the_lists_that_decoding_chooses_from(two_pass, batches, method):
    if "fast_beam" in method:
        pytest.importorskip("k2", reason="lattices need k2")
    options = weighted(0.5, 0.3, rescore_nbest=3)
    decoder = make_decoder(two_pass, batches, options=options)
    pairs = list(decoder.scored_nbests(method))
    (result,) = decoder.decode([method])
    assert max(len(nbest.hyps) for nbest, _ in pairs) == 3
    best = [decoder.words(nbest.best(options.weights[method]).tokens) for nbest, _ in pairs]
    assert [(ref, hyp) for (_, ref), hyp in zip(pairs, best)] == [(r, h) for _, r, h in result.utterances]


def test_settings_name_what_a_method_uses():
    options = evaluate.SearchOptions(chunk_size=16, num_paths=50)
    assert options.suffix("greedy_search") == "streaming-chunk-size-16-max-sym-per-frame-1"
    assert options.of("fast_beam_search") == {"beam": 20.0, "max_contexts": 8, "max_states": 64}
    offline = dataclasses.replace(options, chunk_size=0)
    assert offline.suffix("modified_beam_search") == "beam-size-4"
    assert offline.suffix("fast_beam_search_nbest_oracle") == (
        "beam-20.0-max-contexts-8-max-states-64-num-paths-50-nbest-scale-0.5"
    )
    rescored = weighted(0.25, 1.0, rescore_nbest=10)
    assert rescored.of(RESCORE[0]) == {**rescored.of_nbest(RESCORE[0]), "mu": 0.25, "length_weight": 1.0,
                                       "tuned_on": "dev"}  # fmt: skip
    assert rescored.suffix(RESCORE[0]) == "beam-size-4-rescore-nbest-10-mu-0.25-length-weight-1.0"
    assert rescored.of_nbest(RESCORE[1]) == {**rescored.of("fast_beam_search_nbest"), "rescore_nbest": 10}


def test_methods_that_cannot_work_are_refused_at_once(build_model):
    offline = evaluate.SearchOptions()
    with pytest.raises(UserError, match="beem_search is not known; known: greedy_search"):
        evaluate.check_methods(["beem_search"], build_model(), offline, CPU)
    with pytest.raises(UserError, match="streaming_greedy_search needs a chunk size.*--chunk-size"):
        evaluate.check_methods(["streaming_greedy_search"], build_model(), offline, CPU)
    evaluate.check_methods(["greedy_search", "modified_beam_search"], build_model("lstm"), offline, CPU)
    with pytest.raises(
        UserError, match="modified_beam_search_las_rescore needs a LAS.*model.las.enabled=false"
    ):
        evaluate.check_methods(["greedy_search", RESCORE[0]], build_model(), offline, CPU)


def test_a_model_with_a_las_may_be_rescored(two_pass):
    evaluate.check_methods([RESCORE[0]], two_pass, evaluate.SearchOptions(), CPU)
