"""A small supernet with no parameter at a special value, and features for it."""

import dataclasses

import pytest
import torch

from transducer_kd.config import DecoderConfig, EncoderConfig, ModelConfig
from transducer_kd.models.supernet import Supernet

ENCODER = EncoderConfig(
    feature_dim=20, subsampling_channels=2, num_layers=2, encoder_dim=16, num_heads=4, head_dim=6,
    feedforward_dim=24, cnn_module_kernel=5, dropout=0.0, chunk_size=3, left_context=6,
)  # fmt: skip


def make_supernet(kind, seed=0, **changes):
    torch.manual_seed(seed)
    encoder = dataclasses.replace(ENCODER, **changes)
    config = ModelConfig(encoder, DecoderConfig(decoder_dim=10), joiner_dim=11, pruned_groups=kind)
    supernet = Supernet(config, 9, with_ctc=True).eval()
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.normal_(std=0.3)
    return supernet


def make_features():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 75, 20, generator=generator) * 3 - 8, torch.tensor([75, 58])


@pytest.fixture(name="make_supernet")
def _make_supernet():
    return make_supernet


@pytest.fixture
def features():
    return make_features()
