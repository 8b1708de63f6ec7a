"""LAS: what a position may see, padding, and scores of n-best lists against one hypothesis at a time."""

import pytest
import torch

from transducer_kd.config import EncoderConfig, LasConfig, ModelConfig, from_dict, load_config, to_dict
from transducer_kd.data import tokenizer
from transducer_kd.log import UserError
from transducer_kd.models.las import SOS_EOS_ID, Las, prefix_table

V = 11
HYPS = [
    # Prefixes in common, the empty one, one twice, and one that only ends like another.
    [[3, 4, 5], [3, 4, 6, 2], [3], [], [3, 4, 5], [7, 4, 6, 2]],
    [[]],
    [],  # an utterance whose lattice was empty
    [[7, 2, 9, 9, 9, 10], [8]],
]


def make_las(num_encoder_layers=0, **changes):
    torch.manual_seed(0)
    encoder = EncoderConfig(encoder_dim=16, num_heads=2, feedforward_dim=20, cnn_module_kernel=5)
    las = LasConfig(True, num_encoder_layers, decoder_dim=10, attention_dim=12, num_heads=3, **changes)
    return Las(ModelConfig(encoder=encoder, las=las), V).eval()


def make_batch():
    """encoder_out (4, 9, 16), its lengths, y (4, 5) and its lengths."""
    torch.manual_seed(1)
    y_lens = torch.tensor([5, 0, 3, 1])
    y = torch.randint(2, V, (4, 5)) * (torch.arange(5) < y_lens[:, None])
    return torch.randn(4, 9, 16), torch.tensor([9, 4, 1, 6]), y, y_lens


@pytest.fixture(params=[0, 2], ids=["shared encoder", "two layers more"])
def las(request):
    return make_las(request.param)


def score_reference(las, encoder_out, hyp):
    """One hypothesis of one utterance, one token at a time, nothing padded: encoder_out (1, T', D)."""
    total, lens = 0.0, torch.tensor([encoder_out.size(1)])
    for u, token in enumerate([*hyp, SOS_EOS_ID]):
        prefix = torch.tensor([hyp[:u]], dtype=torch.int64)
        logits = las(encoder_out, lens, prefix, torch.tensor([u]))
        total += logits[0, u].log_softmax(0)[token].item()
    return total


def test_id_is_the_tokenizers():
    assert SOS_EOS_ID == tokenizer.SOS_EOS_ID


@torch.no_grad()
def test_forward_equals_attention_written_out():
    las = make_las(num_layers=2)
    encoder_out, lens, y, y_lens = make_batch()
    logits = las(encoder_out, lens, y, y_lens)
    assert logits.shape == (4, 6, V)
    for n in range(4):
        frames, tokens = encoder_out[n, : lens[n]], y[n, : y_lens[n]]
        read = las.lstm(torch.cat([torch.tensor([1]), tokens])[None])[0][0]
        keys, values = las.key_value(frames).chunk(2, dim=-1)
        heads = []
        for h in range(3):
            part = slice(4 * h, 4 * h + 4)
            weights = (las.query(read)[:, part] @ keys[:, part].T / 2.0).softmax(-1)
            heads.append(weights @ values[:, part])
        expected = las.output(torch.tanh(las.combine(torch.cat([read, *heads], dim=-1))))
        assert torch.allclose(logits[n, : y_lens[n] + 1, 1:], expected, atol=1e-5)


@torch.no_grad()
def test_blank_has_no_probability(las):
    probabilities = las(*make_batch()).softmax(-1)
    assert (probabilities[..., 0] == 0).all()
    assert torch.allclose(probabilities.sum(-1), torch.ones(4, 6))


@torch.no_grad()
def test_a_position_sees_only_the_tokens_before_it(las):
    encoder_out, lens, y, _ = make_batch()
    y_lens = torch.full((4,), 5)
    other = y.clone()
    other[:, 2] = (y[:, 2] + 1) % V
    a, b = las(encoder_out, lens, y, y_lens), las(encoder_out, lens, other, y_lens)
    assert torch.equal(a[:, :3], b[:, :3])
    assert ((a[:, 3:] - b[:, 3:]).abs().amax((1, 2)) > 1e-4).all()


@torch.no_grad()
def test_padding_of_frames_tokens_and_batch_changes_nothing(las):
    encoder_out, lens, y, y_lens = make_batch()
    together = las(encoder_out, lens, y, y_lens)
    noisy_frames = torch.where(torch.arange(9)[:, None] < lens[:, None, None], encoder_out, torch.tensor(1e3))
    noisy_tokens = torch.where(torch.arange(5) < y_lens[:, None], y, torch.tensor(-1))
    for n in range(4):
        one = slice(n, n + 1)
        alone = las(encoder_out[one, : lens[n]], lens[one], y[one, : y_lens[n]], y_lens[one])
        valid = y_lens[n] + 1
        assert torch.allclose(together[n, :valid], alone[0], atol=1e-5)
        noisy = las(noisy_frames, lens, noisy_tokens, y_lens)
        assert torch.allclose(together[n, :valid], noisy[n, :valid], atol=1e-5)


def test_padding_gets_no_gradient(las):
    encoder_out, lens, y, y_lens = make_batch()
    encoder_out.requires_grad_()
    logits = las(encoder_out, lens, y, y_lens)
    valid = torch.arange(6) < y_lens[:, None] + 1
    logits[valid].log_softmax(-1)[:, 1:].sum().backward()
    padded = torch.arange(9) >= lens[:, None]
    assert (encoder_out.grad[padded] == 0).all()
    assert (encoder_out.grad[~padded] != 0).any(-1).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in las.parameters())


@torch.no_grad()
@pytest.mark.parametrize("share_prefixes", [True, False])
def test_scores_equal_one_hypothesis_at_a_time(las, share_prefixes):
    encoder_out, lens, _, _ = make_batch()
    scores = las.score(encoder_out, lens, HYPS, share_prefixes)
    assert [len(s) for s in scores] == [6, 1, 0, 2]
    for n, nbest in enumerate(HYPS):
        for hyp, score in zip(nbest, scores[n]):
            expected = score_reference(las, encoder_out[n : n + 1, : lens[n]], hyp)
            assert score.item() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_a_score_does_not_depend_on_the_other_hypotheses(las):
    encoder_out, lens, _, _ = make_batch()
    together = las.score(encoder_out, lens, HYPS)
    alone = las.score(encoder_out, lens, [nbest[1:2] for nbest in HYPS])
    assert torch.allclose(together[0][1], alone[0][0], atol=1e-5)
    assert torch.allclose(together[3][1], alone[3][0], atol=1e-5)
    assert together[0][0] == together[0][4]


@torch.no_grad()
def test_nothing_to_score_gives_nothing(las):
    encoder_out, lens, _, _ = make_batch()
    assert [len(s) for s in las.score(encoder_out, lens, [[], [], [], []])] == [0, 0, 0, 0]
    (only_empty,) = las.score(encoder_out[:1], lens[:1], [[[], []]])
    assert only_empty.shape == (2,) and only_empty[0] == only_empty[1] < 0


@torch.no_grad()
def test_probabilities_of_all_continuations_sum_to_one():
    las = make_las()
    encoder_out, lens, _, _ = make_batch()
    hyps = [[]] + [[k] for k in range(1, V)]
    ended = las.score(encoder_out[:1], lens[:1], [hyps])[0]
    # p([]) + sum_k p(k) = 1, where p(k) = p([k], end) / p(end | [k])
    y = torch.arange(1, V)[:, None]
    frames = encoder_out[:1].expand(V - 1, -1, -1)
    logits = las(frames, lens[:1].expand(V - 1), y, torch.ones(V - 1, dtype=torch.int64))
    end_after = logits[:, 1].log_softmax(-1)[:, SOS_EOS_ID]
    assert (ended[1:] - end_after)[0].item() == pytest.approx(ended[0].item(), abs=1e-5)  # k = <sos/eos>
    assert (ended[1:] - end_after).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_scores_are_differentiable_and_so_are_shared_prefixes():
    encoder_out, lens, _, _ = make_batch()
    gradients = []
    for share_prefixes in (True, False):
        las = make_las(1)
        weights = iter(torch.linspace(-1, 1, 9))
        total = sum(s * next(weights) for n in las.score(encoder_out, lens, HYPS, share_prefixes) for s in n)
        total.backward()
        gradients.append([p.grad for p in las.parameters()])
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-5)


def test_prefixes_are_shared_within_an_utterance_only():
    table = prefix_table([[[3, 4], [3, 5], [3, 4]], [[3]]], True)
    # (), 3, 34, 35 of the first and (), 3 of the second
    assert table.utterance.tolist() == [0, 0, 0, 0, 1, 1]
    assert table.slot.tolist() == [0, 1, 2, 3, 0, 1]
    assert table.hyp.tolist() == [0, 0, 0, 1, 3, 3]
    assert table.position.tolist() == [0, 1, 2, 2, 0, 1]
    assert table.token_prefix.tolist() == [0, 1, 2, 0, 1, 3, 0, 1, 2, 4, 5]
    assert table.token.tolist() == [3, 4, 1, 3, 5, 1, 3, 4, 1, 3, 1]
    assert table.token_hyp.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert len(prefix_table([[[3, 4], [3, 5], [3, 4]], [[3]]], False).slot) == 11


@torch.no_grad()
def test_bfloat16_autocast_is_close():
    las = make_las()  # torch 1.13 cannot run a conformer layer in bfloat16 on a CPU
    encoder_out, lens, y, y_lens = make_batch()
    exact = las.score(encoder_out, lens, HYPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = las.score(encoder_out, lens, HYPS)
        assert las(encoder_out, lens, y, y_lens).isfinite().all()
    assert rough[0].dtype == torch.float32
    assert torch.allclose(torch.cat(exact), torch.cat(rough), atol=0.3)


def test_mistakes_are_named():
    las = make_las()
    encoder_out, lens, _, _ = make_batch()
    with pytest.raises(ValueError, match="1 n-best lists were given for 4 utterances"):
        las.score(encoder_out, lens, HYPS[:1])
    with pytest.raises(ValueError, match=r"a hypothesis of utterance 1 holds blank \(0\): \[3, 0\]"):
        las.score(encoder_out, lens, [[], [[3, 0]], [], []])


def test_configuration():
    old = to_dict(load_config(None))
    del old["model"]["las"]  # as in a checkpoint that was written before there was a LAS
    assert from_dict(old).model.las == LasConfig() and not LasConfig().enabled
    with pytest.raises(UserError, match=r"model\.las\.attention_dim=10 must be a multiple of num_heads=4"):
        load_config(None, ["model.las.attention_dim=10"])


def test_overfits_a_batch():
    """All start with the same <sos/eos>: even the first tokens can only be told apart by the frames."""
    las = make_las().train()
    for module in las.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    encoder_out, lens, y, y_lens = make_batch()
    optimizer = torch.optim.Adam(las.parameters(), lr=0.03)
    valid = torch.arange(6) < y_lens[:, None] + 1
    target = torch.nn.functional.pad(y, (0, 1)).masked_fill(torch.arange(6) == y_lens[:, None], SOS_EOS_ID)
    for _ in range(60):
        optimizer.zero_grad()
        logits = las(encoder_out, lens, y, y_lens)
        loss = torch.nn.functional.cross_entropy(logits[valid], target[valid])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
