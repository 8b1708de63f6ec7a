"""Joiner and transducer: projections, label shift, what counts as deployed."""

import pytest
import torch

from transducer_kd.config import DecoderConfig, EncoderConfig, ModelConfig
from transducer_kd.models.joiner import Joiner
from transducer_kd.models.transducer import Transducer


def make_config(kind="stateless"):
    encoder = EncoderConfig(
        feature_dim=20, subsampling_channels=4, num_layers=1, encoder_dim=16, num_heads=2, feedforward_dim=24,
        cnn_module_kernel=3,
    )  # fmt: skip
    return ModelConfig(encoder=encoder, decoder=DecoderConfig(kind=kind, decoder_dim=12), joiner_dim=10)


@torch.no_grad()
def test_joiner_broadcasts_and_takes_projected_input():
    torch.manual_seed(0)
    joiner = Joiner(encoder_dim=6, decoder_dim=5, joiner_dim=4, vocab_size=7)
    encoder_out, decoder_out = torch.randn(2, 9, 1, 6), torch.randn(2, 1, 3, 5)
    logits = joiner(encoder_out, decoder_out)
    assert logits.shape == (2, 9, 3, 7)
    by_hand = joiner.output_linear(
        (joiner.encoder_proj(encoder_out[1, 8, 0]) + joiner.decoder_proj(decoder_out[1, 0, 2])).tanh()
    )
    assert torch.allclose(logits[1, 8, 2], by_hand, atol=1e-6)
    projected = joiner(
        joiner.encoder_proj(encoder_out), joiner.decoder_proj(decoder_out), project_input=False
    )
    assert torch.equal(logits, projected)


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
@torch.no_grad()
def test_decode_labels_puts_blank_first(kind):
    torch.manual_seed(0)
    model = Transducer(make_config(kind), vocab_size=9).eval()
    y = torch.tensor([[3, 4, 5], [6, 0, 0]])
    decoder_out = model.decode_labels(y)
    assert decoder_out.shape == (2, 4, 12)
    assert torch.allclose(decoder_out[0], model.decoder(torch.tensor([[0, 3, 4, 5]]))[0], atol=1e-6)
    # Padding comes after the labels, so that it cannot reach the rows that count.
    assert torch.allclose(decoder_out[1, :2], model.decode_labels(torch.tensor([[6]]))[0], atol=1e-6)


def test_encode_passes_the_chunk_size_on():
    torch.manual_seed(0)
    model = Transducer(make_config(), vocab_size=9).eval()
    x, x_lens = torch.randn(1, 60, 20), torch.tensor([60])
    encoder_out, lens = model.encode(x, x_lens)
    assert encoder_out.shape == (1, 14, 16) and lens.tolist() == [14]
    assert not torch.allclose(encoder_out, model.encode(x, x_lens, chunk_size=2)[0])


def test_deployed_parameters_leave_out_what_only_training_uses():
    plain = Transducer(make_config(), vocab_size=9)
    with_ctc = Transducer(make_config(), vocab_size=9, with_ctc=True)
    total = sum(p.numel() for p in plain.parameters())
    heads = (16 + 1) * 9 + (12 + 1) * 9
    assert plain.deployed_parameters() == with_ctc.deployed_parameters() == total - heads
    assert plain.ctc_output is None and with_ctc.ctc_output(torch.zeros(1, 16)).shape == (1, 9)


def test_parameter_table_adds_up():
    model = Transducer(make_config(), vocab_size=9, with_ctc=True)
    rows = dict(line.rsplit(maxsplit=1) for line in model.parameter_table().splitlines())
    numbers = {name.strip(): int(number.replace(",", "")) for name, number in rows.items()}
    assert numbers["deployed"] == model.deployed_parameters()
    assert numbers["deployed"] + numbers["training only"] == sum(p.numel() for p in model.parameters())
    parts = [number for name, number in numbers.items() if name not in ("deployed", "training only")]
    assert sum(parts) == numbers["deployed"]
