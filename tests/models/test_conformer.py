"""The encoder's promises: streaming equals masking, padding is invisible, and no frame sees a later chunk."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from transducer_kd.config import EncoderConfig
from transducer_kd.models.conformer import Conformer, depthwise_conv
from transducer_kd.models.subsampling import subsampled_lens

CONFIG = EncoderConfig(
    feature_dim=20, subsampling_channels=4, num_layers=2, encoder_dim=16, num_heads=2, feedforward_dim=32,
    cnn_module_kernel=7, dropout=0.1, left_context=8,
)  # fmt: skip


def make_encoder(**changes):
    torch.manual_seed(0)
    encoder = Conformer(dataclasses.replace(CONFIG, **changes)).eval()
    # Biases start at zero and norms at one, which would hide a mistake that shifts or scales.
    with torch.no_grad():
        for p in encoder.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
    return encoder


def make_batch(lens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lens), max(lens), 20, generator=generator) * 3 - 8
    return x, torch.tensor(lens)


def stream(encoder, x, x_lens, chunk_size):
    """All chunks of a padded batch, one after another -> (N, T', D), out_lens."""
    state = encoder.streaming_init(x.size(0), x.device)
    window = 4 * chunk_size + 3
    outputs, total = [], torch.zeros_like(x_lens)
    for start in range(0, subsampled_lens(x.size(1)), chunk_size):
        chunk = x[:, 4 * start : 4 * start + window]
        chunk = F.pad(chunk, (0, 0, 0, window - chunk.size(1)), value=-20.0)
        y, lens, state = encoder.streaming_forward(chunk, (x_lens - 4 * start).clamp(0, window), state)
        assert y.shape == (x.size(0), chunk_size, encoder.encoder_dim)
        outputs.append(y)
        total += lens
    assert (state.processed_lens == chunk_size * len(outputs)).all()
    return torch.cat(outputs, dim=1), total


@pytest.mark.parametrize("left_context", [0, 8, 64])
@pytest.mark.parametrize("chunk_size", [1, 3, 8, 16])
@torch.no_grad()
def test_streaming_equals_masked_forward(chunk_size, left_context):
    encoder = make_encoder(left_context=left_context, chunk_size=chunk_size)
    # The fewest frames there can be, less than a chunk, not a multiple of 4, and more than the left context.
    x, x_lens = make_batch([322, 101, 7, 30, 67])
    expected, out_lens = encoder(x, x_lens)
    streamed, streamed_lens = stream(encoder, x, x_lens, chunk_size)
    assert torch.equal(out_lens, subsampled_lens(x_lens)) and torch.equal(out_lens, streamed_lens)
    for n, length in enumerate(out_lens.tolist()):
        assert (expected[n, :length] - streamed[n, :length]).abs().max() < 1e-4


@torch.no_grad()
def test_streams_that_start_at_different_times_share_a_batch():
    encoder = make_encoder(chunk_size=2)
    x, x_lens = make_batch([75])  # 18 encoder frames
    expected, _ = encoder(x, x_lens)
    window = 4 * 2 + 3
    state = encoder.streaming_init(1, x.device)
    for start in (0, 2, 4):
        _, _, state = encoder.streaming_forward(
            x[:, 4 * start : 4 * start + window], torch.tensor([window]), state
        )
    fresh = encoder.streaming_init(1, x.device)
    joined = type(state)(
        *(torch.cat([a, b], dim=a.dim() - 2 if a.dim() > 1 else 0) for a, b in zip(state, fresh))
    )
    chunk = torch.cat([x[:, 24 : 24 + window], x[:, :window]])
    y, _, state = encoder.streaming_forward(chunk, torch.tensor([window, window]), joined)
    assert torch.allclose(y[0], expected[0, 6:8], atol=1e-4)
    assert torch.allclose(y[1], expected[0, 0:2], atol=1e-4)
    assert state.processed_lens.tolist() == [8, 2]


def test_state_has_the_shapes_of_the_device_runtime():
    state = make_encoder(num_layers=3, left_context=5).streaming_init(4, torch.device("cpu"))
    assert state.cached_attn.shape == (3, 5, 4, 2 * 16)  # keys and values
    assert state.cached_conv.shape == (3, 7 // 2, 4, 16)
    assert state.processed_lens.shape == (4,) and state.processed_lens.dtype == torch.int64


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_padding_changes_neither_output_nor_gradient(chunk_size):
    encoder = make_encoder()
    x, x_lens = make_batch([90, 38, 7])
    for n, length in enumerate(x_lens.tolist()):
        results = []
        for features, lens in ((x, x_lens), (x[n : n + 1, :length], x_lens[n : n + 1])):
            features = features.clone()
            for other, valid in zip(features, lens.tolist()):
                other[valid:] = 1e3  # wild padding must not matter
            features.requires_grad_()
            y, out_lens = encoder(features, lens, chunk_size)
            row = n if len(lens) > 1 else 0
            y = y[row, : out_lens[row]]
            (gradient,) = torch.autograd.grad(y.square().mean(), features)
            results.append((y, gradient[row, :length]))
            assert gradient.isfinite().all() and (gradient[row, length:] == 0).all()
        (y, gradient), (y_alone, gradient_alone) = results
        assert (y - y_alone).abs().max() < 1e-5
        assert (gradient - gradient_alone).abs().max() < 1e-5


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_no_output_sees_beyond_its_chunk(chunk_size):
    encoder = make_encoder()
    x, x_lens = make_batch([63])
    x.requires_grad_()
    y, _ = encoder(x, x_lens, chunk_size)
    for frame in range(y.size(1)):
        (gradient,) = torch.autograd.grad(y[0, frame].square().sum(), x, retain_graph=True)
        chunk_end = (frame // chunk_size + 1) * chunk_size
        first_unseen = 4 * chunk_end + 3
        assert (gradient[0, first_unseen:] == 0).all()
        last_seen = min(first_unseen, 63) - 1
        if chunk_end <= y.size(1):
            assert (gradient[0, last_seen] != 0).any()


def test_left_context_bounds_what_one_layer_sees():
    encoder = make_encoder(num_layers=1, cnn_module_kernel=1, left_context=2)
    x, x_lens = make_batch([63])
    x.requires_grad_()
    y, _ = encoder(x, x_lens, 3)
    (gradient,) = torch.autograd.grad(y[0, 7].square().sum(), x)  # in the chunk 6, 7, 8: sees the frames 4..8
    seen = gradient[0].abs().sum(1).nonzero().flatten()
    assert (seen.min().item(), seen.max().item()) == (4 * 4, 4 * 8 + 6)


def test_full_context_sees_everything():
    encoder = make_encoder()
    x, x_lens = make_batch([63])
    x.requires_grad_()
    y, _ = encoder(x, x_lens, 0)
    (gradient,) = torch.autograd.grad(y[0, 0].square().sum(), x)
    assert (gradient[0].abs().sum(1) != 0).sum() == 63


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@torch.no_grad()
def test_traced_streaming_core_equals_the_module():
    encoder = make_encoder()
    state = encoder.streaming_init(2, torch.device("cpu"))
    x, _ = make_batch([19, 19])
    traced = torch.jit.trace_module(
        encoder, {"streaming_core": (x, *state)}, check_trace=False
    ).streaming_core
    caches, traced_state = state, state
    for seed in range(4):
        x, x_lens = make_batch([19, 19], seed)
        y, _, caches = encoder.streaming_forward(x, x_lens, caches)
        traced_y, attn, conv = traced(x, *traced_state)
        traced_state = type(state)(attn, conv, traced_state.processed_lens + 4)
        assert torch.allclose(y, traced_y, atol=1e-5)
    assert torch.allclose(caches.cached_attn, traced_state.cached_attn, atol=1e-5)
    assert torch.allclose(caches.cached_conv, traced_state.cached_conv, atol=1e-5)


@torch.no_grad()
def test_too_short_and_wrong_lengths_are_named():
    encoder = make_encoder()
    x, _ = make_batch([20, 20])
    with pytest.raises(ValueError, match=r"at least 7 feature frames.*\[20, 6\]"):
        encoder(x, torch.tensor([20, 6]))
    with pytest.raises(ValueError, match="at most the 20"):
        encoder(x, torch.tensor([20, 21]))
    with pytest.raises(ValueError, match=r"4\*chunk_size\+3 feature frames, not 20"):
        encoder.streaming_forward(x, torch.tensor([20, 20]), encoder.streaming_init(2, x.device))


@torch.no_grad()
def test_chunk_size_none_is_the_configured_one():
    x, x_lens = make_batch([60])
    encoder = make_encoder(chunk_size=3)
    assert torch.equal(encoder(x, x_lens)[0], encoder(x, x_lens, 3)[0])
    assert not torch.allclose(encoder(x, x_lens)[0], encoder(x, x_lens, 0)[0])


def test_every_parameter_gets_a_gradient():
    encoder = make_encoder()
    x, x_lens = make_batch([60, 33])
    encoder(x, x_lens)[0].square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_dropout_acts_in_training_only():
    encoder = make_encoder()
    x, x_lens = make_batch([60])
    assert torch.equal(encoder(x, x_lens)[0], encoder(x, x_lens)[0])
    encoder.train()
    assert not torch.equal(encoder(x, x_lens)[0], encoder(x, x_lens)[0])


@pytest.mark.skipif(torch.__version__ < "2", reason="torch 1.13 has no bfloat16 layer_norm on a CPU")
def test_bfloat16_autocast_stays_close():
    encoder = make_encoder()
    x, x_lens = make_batch([60, 33])
    with torch.no_grad():
        expected, _ = encoder(x, x_lens, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = encoder(x, x_lens, 3)
    y.float().square().mean().backward()
    assert (y.float() - expected)[0].abs().mean() < 0.05
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("kernel", [1, 2, 8, 15])
def test_depthwise_conv_equals_conv1d(kernel):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 20, 6), torch.randn(6, 1, kernel), torch.randn(6)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = depthwise_conv(x, weight, bias)
    twin = F.conv1d(x.transpose(1, 2), weight, bias, groups=6).transpose(1, 2)
    assert torch.allclose(y, twin, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), leaves), torch.autograd.grad(twin.square().sum(), leaves)
    ):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_initial_scale_is_independent_of_depth():
    x, x_lens = make_batch([200])
    for num_layers in (1, 12):
        torch.manual_seed(0)
        encoder = Conformer(dataclasses.replace(CONFIG, num_layers=num_layers)).eval()
        frames = encoder.subsampling(x)
        with torch.no_grad():
            encoder.norm = torch.nn.Identity()
            stream_scale = encoder(x, x_lens)[0].std() / frames.std()
        assert 0.9 < stream_scale < 1.6
