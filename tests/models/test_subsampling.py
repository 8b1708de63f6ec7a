"""Subsampling: its length formula, its window and its fast first convolution."""

import pytest
import torch
import torch.nn.functional as F

from transducer_kd.models.subsampling import (
    LOOKAHEAD_FRAMES,
    MIN_FEATURE_FRAMES,
    SUBSAMPLING_FACTOR,
    ConvSubsampling,
    subsampled_lens,
)


@pytest.fixture(scope="module")
def subsampling():
    torch.manual_seed(0)
    return ConvSubsampling(feature_dim=20, channels=4, encoder_dim=8)


def test_length_formula_is_the_output_length(subsampling):
    for num_frames in range(MIN_FEATURE_FRAMES, 40):
        assert subsampling(torch.zeros(1, num_frames, 20)).shape == (1, subsampled_lens(num_frames), 8)


def test_length_formula_on_tensors_and_short_input():
    lens = list(range(0, 60))
    assert subsampled_lens(torch.tensor(lens)).tolist() == [subsampled_lens(n) for n in lens]
    assert [subsampled_lens(n) for n in (0, 1, 6, 7, 10, 11)] == [0, 0, 0, 1, 1, 2]


def test_a_chunk_window_gives_exactly_its_frames():
    assert (SUBSAMPLING_FACTOR, LOOKAHEAD_FRAMES) == (4, 3)
    assert [subsampled_lens(4 * chunk + 3) for chunk in (1, 2, 8, 16)] == [1, 2, 8, 16]


def test_frame_depends_on_its_seven_feature_frames_only(subsampling):
    x = torch.randn(1, 31, 20, requires_grad=True)
    (gradient,) = torch.autograd.grad(subsampling(x)[0, 3].square().sum(), x)
    touched = gradient[0].abs().sum(1).nonzero().flatten().tolist()
    assert touched == list(range(12, 19))


def test_first_convolution_equals_conv2d(subsampling):
    x = torch.randn(2, 23, 20)
    expected = F.conv2d(x.unsqueeze(1), subsampling.conv1.weight, subsampling.conv1.bias, stride=2)
    assert torch.allclose(subsampling._first(x), expected, atol=1e-6)
