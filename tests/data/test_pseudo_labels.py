"""Pseudo-labels on disk: soft targets, work units, and whose labels a folder holds.

The labels are made up; tests/decode/test_labelling.py has a model make them.
"""

import errno
import json
import os
import random
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from lhotse import MonoCut, SupervisionSegment

from transducer_kd.data import pseudo_labels
from transducer_kd.data.pseudo_labels import (
    cuts_sha256,
    join_run,
    pack_soft,
    read_soft_targets,
    set_sha256,
    soft_row_bytes,
    unpack_soft,
    work_units,
    write_unit,
)
from transducer_kd.log import UserError

sys.path.insert(0, str(Path(__file__).parent))
from made_up_labels import DIM, RUN, make_label  # noqa: E402

# ---------------------------------------------------------------- soft targets


def pack_int8_slowly(matrix):
    """Readable twin of pack_soft for int8: number by number, with struct's rounding to float16."""
    out = b""
    for row in matrix.astype(np.float64):
        largest = max(abs(value) for value in row)
        (scale,) = struct.unpack("<e", struct.pack("<e", largest / 127))
        if 127 * scale < largest:  # the next float16
            (scale,) = struct.unpack(
                "<e", struct.pack("<H", struct.unpack("<H", struct.pack("<e", scale))[0] + 1)
            )
        numbers = [round(value / scale) if scale else 0 for value in row]
        out += struct.pack(f"<{len(row)}be", *numbers, scale)
    return out


@pytest.mark.parametrize("magnitude", [1e-9, 1e-4, 1.0, 30.0, 5e4])
def test_int8_is_the_slow_twin_and_off_by_half_a_step_at_most(magnitude):
    rng = np.random.default_rng(0)
    matrix = (magnitude * rng.standard_normal((40, DIM))).astype(np.float32)
    matrix[3] = 0.0
    matrix[4] = matrix[5]
    packed = pack_soft(matrix, "int8")
    assert packed == pack_int8_slowly(matrix) and len(packed) == 40 * soft_row_bytes(DIM, "int8")
    back = unpack_soft(packed, DIM, "int8")
    assert back.shape == matrix.shape and back.dtype == np.float32
    # Half a step, which float16's rounding up made wider by at most 2^-10, and by its smallest number.
    step = np.abs(matrix).max(axis=1, keepdims=True) / 127 * (1 + 2**-10) + 2**-24
    assert np.all(np.abs(back - matrix) <= step / 2 * (1 + 1e-5))
    assert not back[3].any()


def test_float16_keeps_eleven_bits_and_nothing_is_nothing():
    matrix = np.random.default_rng(1).standard_normal((7, DIM)).astype(np.float32)
    packed = pack_soft(matrix, "float16")
    assert len(packed) == 7 * soft_row_bytes(DIM, "float16") == 7 * 2 * DIM
    back = unpack_soft(packed, DIM, "float16")
    assert back.dtype == np.float32 and np.all(np.abs(back - matrix) <= np.abs(matrix) * 2**-11 + 2**-25)
    assert pack_soft(matrix, "none") == b"" and soft_row_bytes(DIM, "none") == 0


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_targets_are_read_where_their_cut_is(tmp_path, dtype):
    rng = np.random.default_rng(2)
    matrices = [rng.standard_normal((frames, DIM)).astype(np.float32) for frames in (3, 11, 5)]
    (tmp_path / "units").mkdir()
    path = tmp_path / "units" / "00000.soft"
    path.write_bytes(b"".join(pack_soft(m, dtype) for m in matrices))
    offset = 0
    for m in matrices:
        soft = {"path": "units/00000.soft", "offset": offset, "frames": len(m), "dim": DIM, "dtype": dtype}
        expected = unpack_soft(pack_soft(m, dtype), DIM, dtype)
        assert np.array_equal(read_soft_targets(tmp_path, soft), expected)
        offset += len(m) * soft_row_bytes(DIM, dtype)
    path.write_bytes(path.read_bytes()[:-1])
    for damage in (lambda: None, path.unlink):
        damage()
        with pytest.raises(UserError, match=r"00000.soft is missing or damaged; delete .*00000.jsonl and"):
            read_soft_targets(tmp_path, soft)


# ---------------------------------------------------------------- units and run


def make_cuts(durations):
    return [MonoCut(f"c{i}", 0.0, duration, 0) for i, duration in enumerate(durations)]


def test_units_hold_every_cut_once_and_about_the_hours_asked_for():
    rng = random.Random(0)
    cuts = make_cuts([round(rng.uniform(0.5, 9.0), 2) for _ in range(300)])
    units = work_units(cuts, "part", max_duration_s=30.0, unit_hours=0.05)
    ids = [cut.id for unit in units for batch in unit for cut in batch]
    assert sorted(ids) == sorted(cut.id for cut in cuts)
    seconds = [sum(cut.duration for batch in unit for cut in batch) for unit in units]
    assert all(180 <= s < 210 for s in seconds[:-1]) and seconds[-1] < 210 and len(units) > 5
    assert all(max(c.duration for c in batch) * len(batch) <= 30 for unit in units for batch in unit)
    again = work_units(list(reversed(cuts)), "part", 30.0, 0.05)
    assert [cut.id for unit in again for batch in unit for cut in batch] == ids
    assert len(work_units(cuts, "part", 30.0, 100.0)) == 1
    with pytest.raises(UserError, match="part nothing has no cuts"):
        work_units([], "nothing", 30.0, 1.0)


def test_other_cuts_have_another_hash():
    cuts = make_cuts([1.0, 2.0, 3.0])
    assert cuts_sha256(cuts) == cuts_sha256(make_cuts([1.0, 2.0, 3.0]))
    others = [cuts[:2], cuts[::-1], make_cuts([1.0, 2.0, 3.1]), []]
    assert len({cuts_sha256(c) for c in (cuts, *others)}) == 5


def test_a_set_is_named_by_its_labels_and_by_what_is_stored_with_them():
    def name(text="stop", teacher="a", **soft):
        (cut,) = make_cuts([1.0])
        cut.supervisions = [SupervisionSegment("s", "r", 0.0, 1.0, text=text)]
        cut.custom = {
            "teacher_sha256": teacher,
            **({"soft": {"offset": 0, "frames": 24, **soft}} if soft else {}),
        }
        return set_sha256([cut])

    stored = {"dtype": "int8", "dim": 6}
    others = [
        name(),
        name("go"),
        name(**stored),
        name(teacher="b", **stored),
        name(**{**stored, "dtype": "float16"}),
        name(**{**stored, "dim": 8}),
    ]
    assert len(set(others)) == 6
    assert name() == name(teacher="b")  # of labels alone it does not matter who made them
    assert name(**stored) == name(**stored, path="units/00007.soft")


@pytest.mark.parametrize(
    "key, value, shown",
    [
        ("teacher", {"path": "exp/other", "checkpoint": "epoch-3", "sha256": "d" * 64},
         "(teacher.sha256: aaaaaaaaaaaa -> dddddddddddd)"),
        ("part", "other", "(part: unlabelled -> other)"),
        ("cuts_sha256", "e" * 64, "(cuts_sha256: cccccccccccc -> eeeeeeeeeeee)"),
        ("beam_size", 8, "(beam_size: 4 -> 8)"),
        ("soft", "none", "(soft: int8 -> none)"),
        ("unit_hours", 1.0, "(unit_hours: 0.001 -> 1.0)"),
    ],
)  # fmt: skip
def test_a_folder_belongs_to_one_run(tmp_path, key, value, shown):
    folder = tmp_path / "deep" / "labels"
    join_run(folder, RUN)
    join_run(folder, RUN)
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UserError) as error:
        join_run(folder, {**RUN, key: value})
    assert (
        shown in str(error.value) and str(folder) in str(error.value) and "--output-dir" in str(error.value)
    )
    assert (folder / "run.json").read_bytes() == before and json.loads(before) == RUN


def test_the_same_weights_elsewhere_are_the_same_run(tmp_path):
    join_run(tmp_path, RUN)
    teacher = {"path": "moved/teacher", "checkpoint": "epoch-2", "sha256": RUN["teacher"]["sha256"]}
    join_run(tmp_path, {**RUN, "teacher": teacher})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="run.json is not valid JSON .*; delete"):
        join_run(tmp_path, RUN)


def test_a_full_disk_leaves_a_unit_undone(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    for soft, name in ((b"12", "00003.soft"), (b"", "00003.jsonl")):
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=f"no space left on the disk while writing .*{name}"):
            write_unit(tmp_path, 3, [make_label("a")], soft)
        monkeypatch.undo()
        assert not pseudo_labels.is_done(tmp_path, 3) and not list((tmp_path / "units").iterdir())


def test_leftovers_of_a_killed_process_go_with_their_own_unit(tmp_path):
    (tmp_path / "units").mkdir()
    for name in (".00003.jsonl.x.tmp", ".00003.soft.y.tmp", ".00004.soft.z.tmp"):
        (tmp_path / "units" / name).write_text("half")
    write_unit(tmp_path, 3, [make_label("a")], b"rows")
    names = sorted(p.name for p in (tmp_path / "units").iterdir())
    assert names == [".00004.soft.z.tmp", "00003.jsonl", "00003.soft"]


def test_writers_of_one_unit_leave_each_other_alone(tmp_path, monkeypatch):
    """The second writer comes while the first has its temporary file open."""
    replace, opened, may_go_on = os.replace, threading.Event(), threading.Event()

    def slow(source, target):
        if not opened.is_set():
            opened.set()
            assert may_go_on.wait(10)
        replace(source, target)

    monkeypatch.setattr(os, "replace", slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(write_unit, tmp_path, 3, [make_label("a")], b"rows")
        assert opened.wait(10)
        second = pool.submit(write_unit, tmp_path, 3, [make_label("a")], b"rows")
        time.sleep(0.1)
        may_go_on.set()
        first.result(), second.result()
    assert sorted(p.name for p in (tmp_path / "units").iterdir()) == ["00003.jsonl", "00003.soft"]


def test_a_disk_without_locks_is_a_clear_error(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pseudo_labels.fcntl, "flock", refuse)
    with pytest.raises(
        UserError, match=r"\.lock cannot be locked \(No locks available\); use an --output-dir"
    ):
        join_run(tmp_path, RUN)
