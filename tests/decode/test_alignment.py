"""Best paths through full lattices against enumerated ones, and delays with numbers worked out by hand."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from transducer_kd.data.batch import Batch
from transducer_kd.decode import alignment
from transducer_kd.decode.alignment import (
    arc_log_probs,
    best_paths,
    emission_frames,
    measure_delay,
    summarise,
)
from transducer_kd.log import UserError
from transducer_kd.losses.rnnt_reference import arcs_reference, loss_of_arcs_reference, rnnt_loss_reference


def random_arcs(lens, y_lens, seed=0):
    """token (N,T',U) and blank (N,T',U+1) with large numbers in the padding."""
    torch.manual_seed(seed)
    n, num_frames, num_tokens = len(lens), max(lens), max(y_lens)
    token, blank = -5 * torch.rand(n, num_frames, num_tokens), -5 * torch.rand(n, num_frames, num_tokens + 1)
    for i, (t, u) in enumerate(zip(lens, y_lens)):
        for arcs, used in ((token, u), (blank, u + 1)):
            arcs[i, t:] = arcs[i, :, used:] = 100.0
    return token, blank


def path_score(token, blank, frames):
    """Log-probability of emitting token u in frame frames[u], which never fall; one lattice."""
    score = sum(float(token[t, u]) for u, t in enumerate(frames))
    return score + sum(float(row[sum(f <= t for f in frames)]) for t, row in enumerate(blank))


def best_path_reference(token, blank):
    """Slow twin: token (T',U), blank (T',U+1) of one lattice -> frames, score; node by node."""
    best = {}
    for t, u in itertools.product(range(blank.size(0)), range(blank.size(1))):
        arriving = []
        if (t, u) == (0, 0):
            arriving.append((0.0, ()))
        if t > 0:
            score, frames = best[t - 1, u]
            arriving.append((score + float(blank[t - 1, u]), frames))
        if u > 0:
            score, frames = best[t, u - 1]
            arriving.append((score + float(token[t, u - 1]), (*frames, t)))
        best[t, u] = max(arriving)
    score, frames = best[blank.size(0) - 1, blank.size(1) - 1]
    return list(frames), score + float(blank[-1, -1])


@pytest.mark.parametrize("num_frames, num_tokens", [(1, 0), (1, 3), (4, 0), (2, 3), (4, 4), (6, 2)])
def test_the_best_of_all_paths(num_frames, num_tokens):
    for seed in range(10):
        token, blank = random_arcs([num_frames], [num_tokens], seed)
        paths = list(itertools.combinations_with_replacement(range(num_frames), num_tokens))
        scores = [path_score(token[0], blank[0], path) for path in paths]
        # The paths are those of training: their sum is its loss.
        boundary = torch.tensor([[0, 0, num_tokens, num_frames]])
        loss = float(loss_of_arcs_reference(token, blank, boundary))
        assert math.log(sum(map(math.exp, scores))) == pytest.approx(-loss, abs=1e-5)
        frames, score = best_paths(token, blank, torch.tensor([num_frames]), torch.tensor([num_tokens]))
        assert tuple(frames[0].tolist()) == paths[int(np.argmax(scores))]
        assert float(score) == pytest.approx(max(scores), abs=1e-9)


def test_a_padded_batch_against_the_slow_twin():
    lens, y_lens = [30, 1, 17, 25, 9], [12, 4, 0, 25, 3]
    token, blank = random_arcs(lens, y_lens)
    frames, scores = best_paths(token, blank, torch.tensor(lens), torch.tensor(y_lens))
    for n, (t, u) in enumerate(zip(lens, y_lens)):
        expected, score = best_path_reference(token[n, :t, :u], blank[n, :t, : u + 1])
        assert frames[n, :u].tolist() == expected
        assert float(scores[n]) == pytest.approx(score, abs=1e-9)
    assert max(np.bincount(frames[0, :12])) > 1  # frames that emit several tokens are among them


def test_long_lattices_lose_no_digits():
    """Running sums of 200 unlikely tokens are in the thousands; what decides is a thousandth."""
    token, blank = torch.full((1, 400, 200), -30.0), torch.full((1, 400, 201), -30.0)
    expected = torch.arange(200) * 2
    token[0, expected, torch.arange(200)] += 1e-3
    frames, score = best_paths(token, blank, torch.tensor([400]), torch.tensor([200]))
    assert torch.equal(frames[0], expected)
    assert float(score) == pytest.approx(-30.0 * 600 + 0.2, abs=1e-3)


# ---------------------------------------------------------------- of a model


@pytest.fixture
def model(build_model):
    return build_model()


def make_batch(lens=(131, 60, 99), y_lens=(9, 3, 5)):
    torch.manual_seed(3)
    features = 4 * torch.randn(len(lens), max(lens), 80) - 8
    y = torch.randint(3, 7, (len(lens), max(y_lens)))
    names = [f"cut-{n}" for n in range(len(lens))]
    return Batch(features, torch.tensor(lens), y, torch.tensor(y_lens), names, names)


@pytest.mark.parametrize("logits_at_once", [1, 300, 1 << 20])
def test_arcs_are_those_of_the_joiner_at_every_node(model, build_encoder_out, monkeypatch, logits_at_once):
    monkeypatch.setattr(alignment, "_LOGITS_AT_ONCE", logits_at_once)
    encoder_out, lens = build_encoder_out([7, 1, 4])
    y, y_lens = torch.randint(1, 7, (3, 5)), torch.tensor([2, 5, 0])
    token, blank = arc_log_probs(model, encoder_out, lens, y, y_lens)
    assert token.shape == (3, 7, 5) and blank.shape == (3, 7, 6)
    for n, (t, u) in enumerate(zip(lens.tolist(), y_lens.tolist())):
        decoder_out = model.decode_labels(y[n : n + 1, :u])
        logits = model.joiner(encoder_out[n : n + 1, :t, None], decoder_out[:, None])
        expected = arcs_reference(logits, y[n : n + 1, :u])
        for got, want, nodes in zip((token, blank), expected, (u, u + 1)):
            torch.testing.assert_close(got[n, :t, :nodes], want[0])
            got[n, :t, :nodes] = 0.0
            assert not got[n].any()
        # What an utterance is aligned by is what its loss sums over.
        loss = rnnt_loss_reference(logits, y[n : n + 1, :u], torch.tensor([[0, 0, u, t]]))
        assert best_path_reference(*(a[0] for a in expected))[1] <= -float(loss) + 1e-5


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_each_model_runs_in_its_own_mode(build_model, chunk_size):
    model, batch = build_model(chunk_size=chunk_size), make_batch()
    frames, lens = emission_frames(model, batch)
    for n, num_tokens in enumerate(batch.y_lens.tolist()):
        one = slice(n, n + 1)
        x, x_lens = batch.features[one, : batch.feature_lens[n]], batch.feature_lens[one]
        encoder_out, _ = model.encode(x, x_lens, chunk_size=chunk_size)
        y = batch.y[one, :num_tokens]
        arcs = arcs_reference(model.joiner(encoder_out[:, :, None], model.decode_labels(y)[:, None]), y)
        assert frames[n, :num_tokens].tolist() == best_path_reference(*(a[0] for a in arcs))[0]
        assert lens[n] == encoder_out.size(1)
    other, _ = emission_frames(build_model(chunk_size=4 - chunk_size), batch)
    assert not torch.equal(frames, other)


def delayed(model, num_frames):
    """The same model, whose encoder tells everything so many frames later, after frames that say blank."""
    torch.manual_seed(0)
    candidates = 20 * torch.randn(500, model.encoder.encoder_dim)
    contexts = model.decode_labels(torch.cartesian_prod(*[torch.arange(3, 7)] * 2))[:, -1]
    blank = model.joiner(candidates[:, None], contexts).log_softmax(-1)[..., 0].min(1).values
    silence = candidates[blank.argmax()].expand(num_frames, -1)
    assert blank.max() > -0.1

    def encode(x, x_lens):
        encoder_out, lens = model.encode(x, x_lens)
        return torch.stack([torch.cat([silence, row]) for row in encoder_out]), lens + num_frames

    parts = ("joiner", "decode_labels", "vocab_size", "blank_id", "parameters")
    return SimpleNamespace(encode=encode, **{name: getattr(model, name) for name in parts})


@pytest.mark.parametrize("num_frames", [0, 1, 6])
def test_a_model_that_hears_later_has_that_delay(model, num_frames):
    delay = measure_delay(delayed(model, num_frames), model, [make_batch()], "test")
    d = float(num_frames)
    assert (delay.mean_frames, delay.low, delay.high, delay.median_frames) == (d, d, d, d)
    assert (delay.tokens, delay.utterances, delay.left_out) == (17, 3, 0)
    earlier = measure_delay(model, delayed(model, num_frames), [make_batch()], "test")
    assert earlier.mean_frames == -d


def test_what_has_no_loss_is_left_out_and_named(model, caplog):
    whole, odd = make_batch(), make_batch(lens=(31, 27, 99), y_lens=(6, 6, 0))  # T' 7, 5 and 24
    odd.feature_lens[1] = 23
    odd.cut_ids = ["fits", "short", "silent"]
    delay = measure_delay(model, model, [whole, odd], "dev")
    assert (delay.utterances, delay.tokens, delay.left_out) == (4, 23, 2)
    assert "dev: left out 2 utterances" in caplog.text and caplog.text.rstrip().endswith("short, silent")
    with pytest.raises(UserError, match="part dev has no utterance with text and T' >= U"):
        measure_delay(model, model, [make_batch(y_lens=(0, 0, 0))], "dev")


def test_a_damaged_model_is_named(model):
    batch = make_batch()
    model.joiner.output_linear.bias[batch.y[1, 0]] = float("nan")
    with pytest.raises(UserError, match="cut cut-0: .*no finite log-probability"):
        emission_frames(model, batch)


# ---------------------------------------------------------------- statistics


def test_all_tokens_count_equally():
    delay = summarise([np.array([4]), np.array([0, 0, 1]), np.array([-2, 3])], left_out=5)
    assert delay.mean_frames == 1.0 and delay.median_frames == 0.5
    assert (delay.tokens, delay.utterances, delay.left_out) == (6, 3, 5)
    assert delay.line() == (
        f"delay 1.00 frames (40 ms), 95% interval {delay.low:.2f} to {delay.high:.2f}, median 0.5 "
        "(6 tokens of 3 utterances)"
    )


def test_the_interval_is_over_utterances_and_repeatable():
    """Tokens of an utterance are late together: drawn one by one they would look like more than they are."""
    rng = np.random.default_rng(1)
    delays = [np.full(10, value) for value in rng.normal(3.0, 1.0, size=100)]
    delay = summarise(delays)
    mean, error = np.mean(np.stack(delays)[:, 0]), np.std(np.stack(delays)[:, 0]) / 10
    assert delay.mean_frames == pytest.approx(mean)
    assert (delay.low, delay.high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.02)
    assert summarise(delays) == delay
    alone = summarise(delays[:1])
    assert alone.low == alone.high == pytest.approx(alone.mean_frames)
