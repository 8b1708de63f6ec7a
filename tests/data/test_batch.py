import numpy as np
import pytest
import torch

from transducer_kd.data.batch import PADDING_VALUE, Batch, collate


def test_collate_pads_features_with_the_floor_and_tokens_with_zero():
    features = [np.ones((3, 80), np.float32), np.full((5, 80), 2.0, np.float32)]
    batch = collate(features, [[4, 5], [6]], ["a", "b"], ["HI", "YO"])
    assert batch.features.shape == (2, 5, 80) and batch.features.dtype == torch.float32
    assert batch.feature_lens.tolist() == [3, 5] and batch.y_lens.tolist() == [2, 1]
    assert batch.y.tolist() == [[4, 5], [6, 0]] and batch.y.dtype == torch.int64
    assert torch.all(batch.features[0, 3:] == PADDING_VALUE) and torch.all(batch.features[0, :3] == 1)
    assert batch.audio_s == pytest.approx(0.08)


def test_padding_value_is_what_the_device_runtime_pads_with():
    assert pytest.approx(-23.025850929940457, abs=1e-12) == PADDING_VALUE


def test_utterances_without_text_still_have_a_column():
    batch = collate([np.zeros((9, 80), np.float32)], [[]], ["a"], [""])
    assert batch.y.shape == (1, 1) and batch.y_lens.tolist() == [0]


def test_to_moves_every_tensor_and_keeps_the_names():
    batch = collate([np.zeros((9, 80), np.float32)], [[1]], ["a"], ["X"])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and moved.cut_ids == ["a"] and moved.texts == ["X"]
    tensors = [moved.features, moved.feature_lens, moved.y, moved.y_lens]
    assert all(t.device.type == "meta" for t in tensors)
