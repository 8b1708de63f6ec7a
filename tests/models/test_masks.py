"""Masks against their definition in loops."""

import pytest
import torch

from transducer_kd.models.masks import FORBIDDEN, chunk_mask, sequence_bias, valid_mask


def test_valid_mask():
    assert valid_mask(torch.tensor([2, 0, 3]), 3).int().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 50])
@pytest.mark.parametrize("left_context", [0, 2, 64])
def test_chunk_mask(chunk_size, left_context):
    mask = chunk_mask(19, chunk_size, left_context, torch.device("cpu"))
    for query in range(19):
        start = query // chunk_size * chunk_size
        expected = [start - left_context <= key < start + chunk_size for key in range(19)]
        assert mask[query].tolist() == expected


def test_sequence_bias_joins_padding_and_chunks():
    bias = sequence_bias(torch.tensor([5, 3]), 5, chunk_size=2, left_context=1)
    assert bias.shape == (2, 1, 5, 5)
    assert (bias[1, 0, 2] == torch.tensor([FORBIDDEN, 0.0, 0.0, FORBIDDEN, FORBIDDEN])).all()
    assert (bias[0, 0, 2] == torch.tensor([FORBIDDEN, 0.0, 0.0, 0.0, FORBIDDEN])).all()
    full = sequence_bias(torch.tensor([5, 3]), 5, chunk_size=0, left_context=1)
    assert full.shape == (2, 1, 1, 5) and full[1].flatten().tolist() == [0.0, 0.0, 0.0, FORBIDDEN, FORBIDDEN]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_forbidden_is_finite_and_has_no_weight(dtype):
    scores = torch.tensor([0.0, FORBIDDEN]).to(dtype)
    assert scores.isfinite().all() and scores.float().softmax(0)[1] == 0
