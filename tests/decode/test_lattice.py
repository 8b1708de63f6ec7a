import builtins
import errno
import io
import math

import pytest
import torch

from transducer_kd.decode import lattice as lat
from transducer_kd.decode.greedy import Hypothesis
from transducer_kd.log import UserError

LENS = [5, 2, 1, 4]
UNPRUNED = lat.FastBeamSearchConfig(beam=1e4, max_contexts=1000, max_states=1000)


@pytest.fixture
def k2():
    return pytest.importorskip("k2", reason="lattices need k2")


@pytest.fixture(params=[1, 2, 3], ids="context_size={}".format)
def searched(k2, request, build_model, build_encoder_out):
    """(model, encoder_out, unpruned lattices)"""
    model = build_model(vocab_size=5, context_size=request.param)
    encoder_out, lens = build_encoder_out(LENS)
    return model, encoder_out, lat.fast_beam_search_lattice(model, encoder_out, lens, UNPRUNED)


def test_an_unpruned_lattice_holds_all_of_the_probability(searched):
    _, _, lattice = searched
    totals = lattice.get_tot_scores(use_double_scores=True, log_semiring=True)
    assert totals.tolist() == pytest.approx([0.0] * len(LENS), abs=1e-5)


def test_nbest_scores_are_the_exact_sums_over_alignments(searched, sequence_log_prob):
    model, encoder_out, lattice = searched
    nbests = lat.nbest(lattice, num_paths=200, nbest_scale=0.1)
    assert sum(map(len, nbests)) > 20
    for n, hyps in enumerate(nbests):
        assert len({tuple(h.tokens) for h in hyps}) == len(hyps), "a token sequence is listed twice"
        assert all(a.score >= b.score for a, b in zip(hyps, hyps[1:]))
        for hyp in hyps:
            exact = sequence_log_prob(model, encoder_out[n, : LENS[n]], hyp.tokens)
            assert hyp.score == pytest.approx(exact, abs=1e-4)


def test_one_best_is_the_best_alignment_and_its_times_are_frames(searched, sequence_log_prob):
    model, encoder_out, lattice = searched
    for n, hyp in enumerate(lat.one_best(lattice)):
        best = sequence_log_prob(model, encoder_out[n, : LENS[n]], hyp.tokens, combine=max)
        assert hyp.score == pytest.approx(best, abs=1e-4)
        others = [
            sequence_log_prob(model, encoder_out[n, : LENS[n]], h.tokens, combine=max)
            for h in lat.nbest(lattice, num_paths=200, nbest_scale=0.1)[n]
        ]
        assert hyp.score >= max(others) - 1e-4
        log_probs = alignment_log_prob(model, encoder_out[n, : LENS[n]], hyp)
        assert hyp.score == pytest.approx(log_probs, abs=1e-4)


def alignment_log_prob(model, encoder_out, hyp):
    """Log-probability of emitting hyp.tokens at hyp.timestamps and blank elsewhere."""
    decoder_out = model.decode_labels(torch.tensor([hyp.tokens], dtype=torch.int64))[0]
    table = model.joiner(encoder_out[:, None], decoder_out[None]).log_softmax(-1)
    emitted, total = dict(zip(hyp.timestamps, hyp.tokens)), 0.0
    u = 0
    for t in range(len(encoder_out)):
        total += float(table[t, u, emitted.get(t, 0)])
        u += t in emitted
    return total


def test_the_best_path_is_in_the_nbest_also_when_few_are_drawn(k2, build_model, build_encoder_out):
    model = build_model(vocab_size=30)
    encoder_out, lens = build_encoder_out([12])
    lattice = lat.fast_beam_search_lattice(model, encoder_out, lens, lat.FastBeamSearchConfig())
    best = lat.one_best(lattice)[0]
    assert best.tokens in [h.tokens for h in lat.nbest(lattice, num_paths=2, nbest_scale=0.1)[0]]


def test_pruning_loses_probability_but_no_stream(k2, build_model, build_encoder_out):
    model = build_model(vocab_size=20)
    encoder_out, lens = build_encoder_out([12, 3, 7])
    totals = []
    for config in (lat.FastBeamSearchConfig(1.0, 1, 1), lat.FastBeamSearchConfig(4.0, 2, 2), UNPRUNED):
        lattice = lat.fast_beam_search_lattice(model, encoder_out, lens, config)
        assert all(len(h.timestamps) == len(h.tokens) for h in lat.one_best(lattice))
        totals.append(lattice.get_tot_scores(use_double_scores=True, log_semiring=True).tolist())
    for few, some, all_paths in zip(*totals):
        assert -math.inf < few < some < all_paths < 1e-5


def test_a_batch_decodes_as_its_utterances_alone(k2, build_model, build_encoder_out):
    model = build_model(vocab_size=10)
    encoder_out, lens = build_encoder_out([10, 4, 7])
    config = lat.FastBeamSearchConfig(beam=8.0, max_contexts=4, max_states=8)
    together = lat.nbest(lat.fast_beam_search_lattice(model, encoder_out, lens, config), num_paths=20)
    for n, hyps in enumerate(together):
        alone = lat.fast_beam_search_lattice(
            model, encoder_out[n : n + 1, : lens[n]], lens[n : n + 1], config
        )
        (expected,) = lat.nbest(alone, num_paths=20)
        assert [h.tokens for h in hyps] == [h.tokens for h in expected]
        assert [h.score for h in hyps] == pytest.approx([h.score for h in expected], abs=1e-4)


def test_works_in_inference_mode_and_leaves_the_lattice_unchanged(k2, build_model, build_encoder_out):
    model = build_model()
    encoder_out, lens = build_encoder_out([4, 3])
    with torch.inference_mode():
        lattice = lat.fast_beam_search_lattice(model, encoder_out + 0, lens, UNPRUNED)
        first = lat.nbest(lattice, num_paths=10)
        assert lat.nbest(lattice, num_paths=10) == first


def test_lattices_are_saved_and_loaded(searched, tmp_path):
    _, _, lattice = searched
    path = tmp_path / "part" / "lattices.pt"
    lat.save_lattices(path, lattice, ["a", "b", "c", "d"])
    cut_ids, loaded = lat.load_lattices(path)
    assert cut_ids == ["a", "b", "c", "d"]
    assert lat.nbest(loaded, num_paths=20) == lat.nbest(lattice, num_paths=20)
    assert [p.name for p in path.parent.iterdir()] == ["lattices.pt"]


def test_a_full_disk_while_saving_is_an_error_that_leaves_no_file(searched, tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    def only_into_memory(content, target):
        assert isinstance(target, io.BytesIO), "torch 1.13 aborts when a write of its own fails"

    monkeypatch.setattr(torch, "save", only_into_memory)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="lattices.pt"):
        lat.save_lattices(tmp_path / "lattices.pt", searched[2], ["a", "b", "c", "d"])
    assert not list(tmp_path.iterdir())


def test_unreadable_lattice_files_are_named(k2, tmp_path):
    with pytest.raises(UserError, match="gone.pt does not exist"):
        lat.load_lattices(tmp_path / "gone.pt")
    (tmp_path / "bad.pt").write_text("no lattice")
    with pytest.raises(UserError, match="bad.pt is not a lattice file"):
        lat.load_lattices(tmp_path / "bad.pt")


def test_oracle_prefers_fewest_errors_then_score():
    words = {1: "a", 2: "b", 3: "c"}
    nbests = [[Hypothesis([1, 2], [], -1.0), Hypothesis([1, 3], [], -2.0), Hypothesis([3, 1], [], -3.0)]] * 3
    refs = [["a", "c"], ["c"], []]
    chosen = lat.oracle(nbests, refs, lambda tokens: [words[t] for t in tokens])
    assert [h.tokens for h in chosen] == [[1, 3], [1, 3], [1, 2]]


def test_lattice_oracle_finds_a_reference_that_is_in_the_nbest(searched):
    _, _, lattice = searched
    nbests = lat.nbest(lattice, num_paths=50)
    refs = [[str(t) for t in hyps[-1].tokens] for hyps in nbests]
    chosen = lat.oracle(nbests, refs, lambda tokens: [str(t) for t in tokens])
    assert [[str(t) for t in h.tokens] for h in chosen] == refs


def test_lstm_decoder_is_refused(k2, build_model, build_encoder_out):
    encoder_out, lens = build_encoder_out([2])
    with pytest.raises(UserError, match="LstmDecoder.*modified_beam_search"):
        lat.fast_beam_search_lattice(build_model("lstm"), encoder_out, lens, UNPRUNED)


def test_missing_k2_is_an_error_with_the_mend(monkeypatch, build_model, build_encoder_out):
    real_import = builtins.__import__

    def no_k2(name, *args, **kwargs):
        if name == "k2":
            raise ImportError("No module named 'k2'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_k2)
    encoder_out, lens = build_encoder_out([2])
    with pytest.raises(UserError, match="tools/setup.sh"):
        lat.fast_beam_search_lattice(build_model(), encoder_out, lens, UNPRUNED)
