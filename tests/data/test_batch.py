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


def test_stored_teachers_are_padded_and_absent_where_there_are_none():
    features, tokens = [np.zeros((n, 80), np.float32) for n in (9, 5, 7)], [[1], [2, 3], [4]]
    stored = [None, np.full((3, 6), 2.0, np.float32), np.ones((1, 6), np.float32)]
    batch = collate(features, tokens, "abc", "XYZ", [False, True, True], stored)
    assert batch.is_pseudo.tolist() == [False, True, True] and batch.is_pseudo.dtype == torch.bool
    assert batch.teacher_out.shape == (3, 3, 6) and batch.teacher_out.dtype == torch.float32
    assert batch.teacher_out_lens.tolist() == [0, 3, 1]
    assert batch.teacher_out.sum((1, 2)).tolist() == [0.0, 36.0, 6.0]
    plain = collate(features, tokens, "abc", "XYZ", None, [None] * 3)
    assert plain.is_pseudo.tolist() == [False] * 3 and plain.teacher_out is plain.teacher_out_lens is None


def test_selected_utterances_keep_what_is_theirs():
    features = [np.full((n, 80), n, np.float32) for n in (9, 5, 7)]
    stored = [np.full((n, 6), n, np.float32) for n in (4, 2, 3)]
    batch = collate(features, [[1, 2, 3], [4], [5, 6]], "abc", "XYZ", [True, False, True], stored)
    part = batch.select(torch.tensor([2, 1]))
    assert (
        part.cut_ids == ["c", "b"] and part.texts == ["Z", "Y"] and part.is_pseudo.tolist() == [True, False]
    )
    assert part.feature_lens.tolist() == [7, 5] and part.features.shape == (2, 7, 80)
    assert torch.all(part.features[0] == 7) and torch.all(part.features[1, 5:] == PADDING_VALUE)
    assert part.y.tolist() == [[5, 6, 0], [4, 0, 0]] and part.y_lens.tolist() == [2, 1]
    assert part.teacher_out.shape == (2, 3, 6) and part.teacher_out_lens.tolist() == [3, 2]


def test_to_moves_every_tensor_and_keeps_the_names():
    stored = [np.zeros((2, 6), np.float32)]
    batch = collate([np.zeros((9, 80), np.float32)], [[1]], ["a"], ["X"], [True], stored)
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and moved.cut_ids == ["a"] and moved.texts == ["X"]
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 7 and all(t.device.type == "meta" for t in tensors)
