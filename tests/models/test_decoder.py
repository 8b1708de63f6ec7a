"""Prediction networks: training forward, step interface and contexts agree."""

import pytest
import torch

from transducer_kd.config import DecoderConfig
from transducer_kd.models.decoder import LstmDecoder, StatelessDecoder

CPU = torch.device("cpu")


def make_decoder(kind, **changes):
    torch.manual_seed(0)
    cfg = DecoderConfig(kind=kind, decoder_dim=8, **changes)
    return (StatelessDecoder if kind == "stateless" else LstmDecoder)(cfg, vocab_size=11).eval()


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("stateless", {"context_size": 1}),
        ("stateless", {"context_size": 2}),
        ("stateless", {"context_size": 4}),
        ("lstm", {"num_layers": 1}),
        ("lstm", {"num_layers": 2, "dropout": 0.3}),
    ],
)
@torch.no_grad()
def test_steps_equal_the_training_forward(kind, changes):
    decoder = make_decoder(kind, **changes)
    y = torch.tensor([[0, 3, 4, 4, 9, 10, 1], [0, 7, 2, 8, 5, 6, 3], [0, 1, 1, 1, 1, 1, 1]])
    expected = decoder(y)
    assert expected.shape == (3, 7, 8)
    state = decoder.init_state(3, CPU)
    order = torch.arange(3)
    for u in range(7):
        out, state = decoder.step(y[order, u], state)
        assert torch.allclose(out, expected[order, u], atol=1e-6)
        # A search picks and reorders its hypotheses.
        pick = torch.tensor([2, 0, 1])
        order, state = order[pick], tuple(s[pick] for s in state)


@torch.no_grad()
def test_forward_context_takes_minus_one_before_the_start():
    decoder = make_decoder("stateless", context_size=3)
    start = decoder.forward_context(torch.tensor([[-1, -1, 0]]))
    assert torch.equal(start, decoder(torch.tensor([[0]]))[:, 0])
    y = torch.tensor([[0, 5, 6]])
    assert torch.allclose(decoder.forward_context(torch.tensor([[-1, 0, 5]])), decoder(y)[:, 1], atol=1e-6)
    assert torch.allclose(decoder.forward_context(torch.tensor([[0, 5, 6]])), decoder(y)[:, 2], atol=1e-6)


@torch.no_grad()
def test_stateless_forgets_and_lstm_remembers():
    a, b = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[0, 9, 4, 5]])
    stateless, lstm = make_decoder("stateless", context_size=2), make_decoder("lstm")
    assert torch.equal(stateless(a)[:, 3], stateless(b)[:, 3])
    assert not torch.equal(stateless(a)[:, 2], stateless(b)[:, 2])
    assert not torch.allclose(lstm(a)[:, 3], lstm(b)[:, 3])


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_no_output_sees_a_later_token(kind):
    decoder = make_decoder(kind)
    a, b = torch.tensor([[0, 3, 4, 5]]), torch.tensor([[0, 3, 9, 2]])
    assert torch.equal(decoder(a)[:, :2], decoder(b)[:, :2])


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_blank_embeds_to_zero_after_training_steps_too(kind):
    decoder = make_decoder(kind).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        decoder(torch.tensor([[0, 3, 0, 5]])).square().sum().backward()
        optimizer.step()
    embedding = decoder.embedding if kind == "stateless" else decoder.lstm.embedding
    assert (embedding.weight[0] == 0).all() and (embedding.weight[3] != 0).any()
