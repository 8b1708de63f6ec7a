"""What the tests of training batches share."""

import torch


def encoder_lens(frames: int) -> int:
    return ((frames - 1) // 2 - 1) // 2


def ids_of(batches):
    return [cut_id for batch in batches for cut_id in batch.cut_ids]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.cut_ids == b.cut_ids and a.texts == b.texts
        for name in (
            "features",
            "feature_lens",
            "y",
            "y_lens",
            "is_pseudo",
            "teacher_out",
            "teacher_out_lens",
        ):
            x, z = getattr(a, name), getattr(b, name)
            assert (x is z is None) or torch.equal(x, z), name
