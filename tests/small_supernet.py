"""A small supernet with no parameter at a special value, and features for it."""

import dataclasses

import torch

from transducer_kd.config import DecoderConfig, EncoderConfig, ModelConfig
from transducer_kd.models.supernet import Supernet

VOCAB, CHUNK = 9, 3
ENCODER = EncoderConfig(
    feature_dim=20, subsampling_channels=2, num_layers=2, encoder_dim=16, num_heads=4, head_dim=6,
    feedforward_dim=24, cnn_module_kernel=5, dropout=0.0, chunk_size=CHUNK, left_context=6,
)  # fmt: skip


def make_config(kind, **changes):
    encoder = dataclasses.replace(ENCODER, **changes)
    return ModelConfig(encoder, DecoderConfig(decoder_dim=10), joiner_dim=11, pruned_groups=kind)


def make_supernet(kind, seed=0, **changes):
    """With masks that leave nothing out."""
    torch.manual_seed(seed)
    supernet = Supernet(make_config(kind, **changes), VOCAB, with_ctc=True).eval()
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.normal_(std=0.3)
    return supernet


def make_features():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 75, 20, generator=generator) * 3 - 8, torch.tensor([75, 58])
