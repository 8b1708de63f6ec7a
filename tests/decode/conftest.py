"""A small transducer with random weights, sharp enough that searches have something to choose between."""

import math

import pytest
import torch

from transducer_kd.config import DecoderConfig, EncoderConfig, ModelConfig
from transducer_kd.models.transducer import Transducer

ENCODER_DIM = 8


def build_model(kind="stateless", vocab_size=7, chunk_size=0, context_size=2, seed=0):
    torch.manual_seed(seed)
    config = ModelConfig(
        EncoderConfig(
            feature_dim=80,
            subsampling_channels=2,
            num_layers=2,
            encoder_dim=ENCODER_DIM,
            num_heads=2,
            feedforward_dim=16,
            cnn_module_kernel=5,
            dropout=0.0,
            chunk_size=chunk_size,
            left_context=6,
        ),
        DecoderConfig(kind=kind, decoder_dim=6, context_size=context_size),
        joiner_dim=10,
    )
    model = Transducer(config, vocab_size).eval()
    with torch.no_grad():
        model.joiner.output_linear.weight.mul_(4.0)
        model.joiner.output_linear.bias[0] = 1.5
        model.decoder.conv.weight.mul_(3.0) if kind == "stateless" else None
    return model.requires_grad_(False)


def build_encoder_out(lens, seed=1):
    torch.manual_seed(seed)
    return 2 * torch.randn(len(lens), max(lens), ENCODER_DIM), torch.tensor(lens)


def sequence_log_prob(model, encoder_frames, tokens, blank_ids=(0,), combine=math.fsum):
    """Readable twin: log-probability of `tokens` over all alignments with at most one token a frame.

    encoder_frames (T', D) of one utterance. blank_ids: tokens that emit nothing. combine: how the
    probabilities of alignments are joined, `math.fsum` for their sum or `max` for the best.
    """
    decoder_out = model.decode_labels(torch.tensor([tokens], dtype=torch.int64))[0]
    table = model.joiner(encoder_frames[:, None], decoder_out[None]).double().softmax(-1)
    forward = [1.0] + [0.0] * len(tokens)
    for frame in table:
        new = []
        for u in range(len(tokens) + 1):
            ways = [forward[u] * float(frame[u, k]) for k in blank_ids]
            if u > 0:
                ways.append(forward[u - 1] * float(frame[u - 1, tokens[u - 1]]))
            new.append(combine(ways))
        forward = new
    return math.log(forward[-1]) if forward[-1] > 0 else -math.inf


@pytest.fixture(name="build_model")
def _build_model():
    return build_model


@pytest.fixture(name="build_encoder_out")
def _build_encoder_out():
    return build_encoder_out


@pytest.fixture(name="sequence_log_prob")
def _sequence_log_prob():
    return sequence_log_prob
