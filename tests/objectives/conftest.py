"""Tiny transducers, sharp enough that teachers differ, and a batch of three unequal utterances.

VOCAB classes; frames (24 or fewer) are what 4x subsampling makes of the batch's features.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transducer_kd.config import DecoderConfig, EncoderConfig, LasConfig, ModelConfig
from transducer_kd.data.batch import PADDING_VALUE, Batch
from transducer_kd.models.transducer import Transducer

VOCAB = 11


def make_model(encoder_dim=16, seed=0, dropout=0.0, with_las=False, with_ctc=False, chunk_size=0):
    torch.manual_seed(seed)
    encoder = EncoderConfig(
        num_layers=1, encoder_dim=encoder_dim, num_heads=2, feedforward_dim=24, cnn_module_kernel=5,
        dropout=dropout, subsampling_channels=2, chunk_size=chunk_size, left_context=6,
    )  # fmt: skip
    decoder = DecoderConfig(decoder_dim=encoder_dim - 4, dropout=dropout)
    las = LasConfig(with_las, 0, decoder_dim=encoder_dim - 2, attention_dim=8, num_heads=2, dropout=dropout)
    model = Transducer(ModelConfig(encoder, decoder, encoder_dim - 6, las), VOCAB, with_ctc)
    with torch.no_grad():
        model.joiner.output_linear.weight.mul_(5.0)
        for head in (model.simple_am_proj, model.simple_lm_proj):
            head.weight.mul_(2.0)
        if model.las is not None:
            model.las.output.weight.mul_(4.0)
    return model


def make_batch(lens=(61, 90, 47), token_lens=(4, 7, 2), extra_frames=0, extra_tokens=0):
    generator = torch.Generator().manual_seed(1)
    features = torch.full((len(lens), max(lens) + extra_frames, 80), PADDING_VALUE)
    y = torch.zeros(len(lens), max(1, *token_lens) + extra_tokens, dtype=torch.int64)
    for i, (t, u) in enumerate(zip(lens, token_lens)):
        features[i, :t] = torch.randn(t, 80, generator=generator) * 3 - 8
        y[i, :u] = torch.randint(3, VOCAB, (u,), generator=generator)
    names = [f"cut-{i}" for i in range(len(lens))]
    return Batch(features, torch.tensor(lens), y, torch.tensor(token_lens), names, names)


def rows_of(batch, rows):
    """The utterances `rows` (a slice) as a batch of their own, without the padding that they do not need."""
    lens, y_lens = batch.feature_lens[rows], batch.y_lens[rows]
    features, y = batch.features[rows, : int(lens.max())], batch.y[rows, : int(y_lens.max())]
    return Batch(
        features, lens, y, y_lens, batch.cut_ids[rows], batch.texts[rows], batch.is_pseudo[rows]
    )  # fmt: skip


class OtherLength(nn.Module):
    """A teacher whose subsampling makes `more` frames more (negative: fewer) of everything than its model."""

    def __init__(self, model, more):
        super().__init__()
        self.model, self.more = model, more
        self.joiner, self.las = model.joiner, model.las
        self.simple_am_proj, self.simple_lm_proj = model.simple_am_proj, model.simple_lm_proj
        self.decode_labels = model.decode_labels

    def encode(self, x, x_lens):
        encoder_out, lens = self.model.encode(x, x_lens)
        return F.pad(encoder_out, (0, 0, 0, self.more), value=0.5), lens + self.more


@pytest.fixture(name="make_model")
def _make_model():
    return make_model


@pytest.fixture(name="make_batch")
def _make_batch():
    return make_batch


@pytest.fixture
def batch():
    return make_batch()


@pytest.fixture(name="rows_of")
def _rows_of():
    return rows_of


@pytest.fixture(name="other_length")
def _other_length():
    return OtherLength


@pytest.fixture
def check_autocast():
    """Function: the gradients of a model after a backward of each loss have, under bfloat16 autocast, the
    directions that they have in float32. losses: functions, each run under an autocast of its own.
    """
    if torch.__version__.startswith("1."):
        pytest.skip("a conformer in bfloat16 on a CPU needs torch 2")

    def check(model, *losses):
        found = []
        for enabled in (False, True):
            model.zero_grad(set_to_none=True)
            for compute in losses:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                    loss = compute()
                assert loss.dtype == torch.float32
                loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        for name, expected in found[0].items():
            similarity = torch.cosine_similarity(found[1][name].flatten(), expected.flatten(), dim=0)
            assert similarity > 0.8, (name, similarity)

    return check


@pytest.fixture
def gradients():
    """Function: backpropagate a scalar into a model -> {name: gradient, zeros where none}."""

    def backward(model, scalar):
        model.zero_grad(set_to_none=True)
        scalar.backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        }

    return backward
