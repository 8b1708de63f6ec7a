"""The frozen set of pseudo-labels: what each filter drops, what the files say, and what is refused."""

import gzip
import json
import math
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, MonoCut, SupervisionSegment

from transducer_kd.data import label_set
from transducer_kd.data.features import FeatureFileWriter
from transducer_kd.data.label_set import REASONS, Filters, finish, most_repeats, table
from transducer_kd.data.pseudo_labels import (
    join_run,
    load_pseudo_labels,
    pack_soft,
    read_soft_targets,
    unpack_soft,
    write_unit,
)
from transducer_kd.decode.wer import word_error_rate
from transducer_kd.log import UserError

sys.path.insert(0, str(Path(__file__).parent))
from made_up_labels import DIM, RUN, make_label  # noqa: E402

DEFAULT = Filters()

# ---------------------------------------------------------------- filters


@pytest.mark.parametrize(
    "text, most",
    [
        ("", 1), ("a", 1), ("a b a b", 2), ("a a a b", 3), ("a b c a b c a b c", 3), ("x a b a b a b y", 3),
        ("a b c d a b c d", 2), ("a b c d e a b c d e", 1), ("a a b a a b", 2), ("a b a", 1),
        ("no no no no no", 5), ("b a a c a a", 2),
    ],
)  # fmt: skip
def test_repeats_by_example(text, most):
    assert most_repeats(text.split()) == most


def test_repeats_are_those_of_trying_every_place_and_length():
    rng = random.Random(0)
    for _ in range(300):
        words = [rng.choice("ab") for _ in range(rng.randrange(1, 12))]
        most = 1
        for n in range(1, 5):
            for start in range(len(words)):
                for count in range(2, len(words) + 1):
                    if words[start : start + n] * count == words[start : start + n * count]:
                        most = max(most, count)
        assert most_repeats(words) == most, words


def test_each_filter_drops_what_it_should_and_only_that():
    filters = Filters()
    good = make_label("x")
    assert filters.reason(good) == ""
    half = 5 * math.log(0.5)
    for label, reason in (
        ({**good, "text": "", "num_tokens": 0}, "empty"),
        ({**good, "text": " ", "num_tokens": 3}, "empty"),  # tokens, but no word
        ({**good, "text": "", "num_tokens": 0, "frames": 0}, "empty"),
        (make_label("x", score=half + 1e-9), ""),
        (make_label("x", score=half - 1e-3), "confidence"),
        # A long utterance is not worse than a short one with the same tokens: the score alone would say so.
        (make_label("x", num_tokens=50, score=10 * half + 1e-9, frames=200), ""),
        (make_label("x", frames=250), ""),
        (make_label("x", frames=251), "length ratio"),
        (make_label("x", num_tokens=12, frames=20), ""),
        (make_label("x", num_tokens=13, frames=20), "length ratio"),
        (make_label("x", text="very very very good"), ""),
        (make_label("x", text="very very very very good"), "repetition"),
        # The first reason counts.
        (make_label("x", text="so so so so", score=-10, frames=1), "confidence"),
        (make_label("x", text="so so so so", frames=1), "length ratio"),
    ):
        assert filters.reason(label) == reason, label
    assert Filters(max_repeats=4).reason(make_label("x", text="so so so so")) == ""
    assert Filters(min_confidence=0.0).reason(make_label("x", score=-1e4)) == ""


@pytest.mark.parametrize(
    "limits, option",
    [
        ({"min_confidence": 1.5}, "--min-confidence"), ({"min_confidence": float("nan")}, "--min-confidence"),
        ({"min_token_rate": 0.7}, "--min-token-rate"), ({"min_token_rate": -0.1}, "--min-token-rate"),
        ({"max_token_rate": float("nan")}, "--max-token-rate"), ({"max_repeats": 0}, "--max-repeats"),
    ],
)  # fmt: skip
def test_senseless_limits_are_refused(limits, option):
    with pytest.raises(UserError, match=option):
        Filters(**limits)


# ---------------------------------------------------------------- the set

TEXTS = {
    "u0": make_label("u0", "play the song", 4, -0.2, 12),
    "u1": make_label("u1", "", 0, -0.3, 9),
    "u2": make_label("u2", "turn on the lights", 5, -6.0, 14),
    "u3": make_label("u3", "stop", 1, -0.1, 100),
    "u4": make_label("u4", "go go go go now", 6, -0.6, 15),
    "u5": make_label("u5", "what time is it", 6, -1.2, 16),
}
REFERENCES = ["play a song", "hello", "turn on the light", "stop", "go now", "what time is it"]


@pytest.fixture
def labelled(tmp_path):
    """A folder with fbank/ and labels/, in which all units are done but nothing is filtered."""
    (tmp_path / "fbank").mkdir()
    folder = tmp_path / "labels"
    join_run(folder, RUN)
    cuts = []
    with open(tmp_path / "fbank" / "feats.f16", "wb") as f:
        writer = FeatureFileWriter(f, "feats.f16")
        for i, text in enumerate(REFERENCES):
            duration = 0.5 + 0.1 * i
            matrix = np.full((round(100 * duration), 80), -float(i), dtype=np.float32)
            said = SupervisionSegment(
                f"s{i}", f"r{i}", 0.0, duration, text=text, speaker="anna", custom={"texts": [text]}
            )
            features = writer.write(matrix, f"r{i}", 0.0, duration)
            cuts.append(MonoCut(f"u{i}", 0.0, duration, 0, [said], features, custom={"said": text}))
    CutSet.from_cuts(cuts).to_file(tmp_path / "fbank" / "cuts_unlabelled.jsonl.gz")
    for k, ids in enumerate((["u4", "u1"], ["u5", "u0", "u2"], ["u3"])):
        labels, rows = [], b""
        for cut_id in ids:
            label = {**TEXTS[cut_id], "soft": [len(rows), TEXTS[cut_id]["frames"]]}
            rows += pack_soft(soft_of(cut_id), "int8")
            labels.append(label)
        write_unit(folder, k, labels, rows)
    return tmp_path


def soft_of(cut_id):
    rng = np.random.default_rng(int(cut_id[1:]))
    return rng.standard_normal((TEXTS[cut_id]["frames"], DIM)).astype(np.float32)


def finish_set(base, filters=DEFAULT, refilter=False, num_units=3, command="make labels"):
    created_by = {"commit": "f00", "command": command}
    return finish(base / "labels", base / "fbank", num_units, filters, refilter, word_error_rate, created_by)


def content(base):
    return {name: (base / "labels" / name).read_bytes() for name in ("cuts.jsonl.gz", "dropped.jsonl")}


def test_the_set_has_the_kept_cuts_in_the_parts_order_and_says_why_others_are_dropped(labelled):
    summary = finish_set(labelled)
    assert json.loads((labelled / "labels" / "summary.json").read_text()) == summary
    dropped = [json.loads(line) for line in (labelled / "labels" / "dropped.jsonl").read_text().splitlines()]
    assert [(d["id"], d["reason"]) for d in dropped] == [
        ("u1", "empty"), ("u2", "confidence"), ("u3", "length ratio"), ("u4", "repetition"),
    ]  # fmt: skip
    assert (
        dropped[1]["text"] == "turn on the lights" and dropped[1]["confidence"] == TEXTS["u2"]["confidence"]
    )
    cuts = load_pseudo_labels(labelled / "labels", labelled / "fbank")
    assert [(c.id, c.supervisions[0].text) for c in cuts] == [
        ("u0", "play the song"),
        ("u5", "what time is it"),
    ]
    for cut in cuts:
        (said,) = cut.supervisions
        assert (said.start, said.duration) == (0.0, cut.duration)
        # Features are those of the part.
        features = cut.load_features()
        assert features.shape == (round(100 * cut.duration), 80) and np.all(features == -float(cut.id[1:]))
        soft = read_soft_targets(labelled / "labels", cut.custom["soft"])
        assert np.array_equal(soft, unpack_soft(pack_soft(soft_of(cut.id), "int8"), DIM, "int8"))
        label = TEXTS[cut.id]
        assert (cut.custom["score"], cut.custom["confidence"]) == (label["score"], label["confidence"])
        assert cut.custom["teacher_sha256"] == "a" * 64


def test_no_reference_is_left_in_the_set(labelled):
    finish_set(labelled)
    text = gzip.decompress((labelled / "labels" / "cuts.jsonl.gz").read_bytes()).decode()
    assert "play a song" not in text and '"said"' not in text and '"texts"' not in text


def test_paths_of_features_stay_relative_and_follow_the_folder_that_is_given(labelled):
    finish_set(labelled)
    lines = gzip.decompress((labelled / "labels" / "cuts.jsonl.gz").read_bytes()).decode().splitlines()
    paths = [json.loads(line)["features"]["storage_path"] for line in lines]
    assert paths == ["feats.f16"] * 2
    moved = labelled / "moved"
    (labelled / "fbank").rename(moved)
    (labelled / "labels").rename(labelled / "labels-moved")
    cuts = load_pseudo_labels(labelled / "labels-moved", moved)
    assert cuts[0].features.storage_path == str(moved / "feats.f16")
    assert cuts[0].load_features().shape == (50, 80)
    assert read_soft_targets(labelled / "labels-moved", cuts[0].custom["soft"]).shape == (12, DIM)


def test_the_summary_counts_hours_sizes_and_errors(labelled):
    summary = finish_set(labelled)
    assert summary["teacher"] == RUN["teacher"]
    assert (summary["part"], summary["method"]) == ("unlabelled", "modified_beam_search")
    assert summary["kept"] == {"cuts": 2, "hours": round(1.5 / 3600, 4)}
    assert list(summary["dropped"]) == list(REASONS)
    assert {r: c["cuts"] for r, c in summary["dropped"].items()} == dict.fromkeys(REASONS, 1)
    assert summary["filters"] == asdict(Filters())
    # 166 frames of 6 + 2 bytes in 4.5 s.
    assert summary["soft"] == {"dtype": "int8", "dim": DIM, "bytes": 1328,
                               "mb_per_hour": round(1328e-6 * 3600 / 4.5, 3)}  # fmt: skip
    confidences = [x["confidence"] for x in TEXTS.values() if x["text"]]
    assert summary["confidence_percentiles"]["50"] == pytest.approx(np.median(confidences), abs=1e-4)
    assert list(summary["confidence_percentiles"]) == ["5", "25", "50", "75", "95"]
    # All: a for the, hello missing, lights for light, three words more: 6 of 15. Kept: the first, 1 of 7.
    assert summary["label_wer"] == {"all": pytest.approx(100 * 6 / 15, abs=1e-3),
                                    "kept": pytest.approx(100 / 7, abs=1e-3)}  # fmt: skip
    assert (summary["seconds"], summary["audio_s"]) == (1.5, 4.5)
    assert summary["created_by"] == {"commit": "f00", "command": "make labels"}
    lines = [line.split() for line in table(summary).splitlines()]
    assert lines[0][:3] == ["labels", "of", "unlabelled"]
    assert lines[1] == ["kept", "2", "33.3", "%", "0.00"]
    assert [line[0] for line in lines[2:]] == ["empty", "confidence", "length", "repetition"]


def test_a_part_without_references_has_no_error_rate_and_needs_no_supervision(labelled):
    path = labelled / "fbank" / "cuts_unlabelled.jsonl.gz"
    cuts = list(CutSet.from_file(path))
    for cut in cuts:
        cut.supervisions = []
    CutSet.from_cuts(cuts).to_file(path)
    assert finish_set(labelled)["label_wer"] is None
    assert [c.supervisions[0].text for c in load_pseudo_labels(labelled / "labels", labelled / "fbank")] == [
        "play the song",
        "what time is it",
    ]


def test_nothing_is_finished_while_units_are_missing(labelled):
    assert finish_set(labelled, num_units=4) is None
    assert not (labelled / "labels" / "cuts.jsonl.gz").exists()
    with pytest.raises(UserError, match=r"has no summary.json.*run local/pseudo_label.py"):
        load_pseudo_labels(labelled / "labels", labelled / "fbank")


def test_a_finished_set_is_frozen_until_it_is_to_be_filtered_anew(labelled, caplog):
    first = finish_set(labelled)
    before = content(labelled)
    assert finish_set(labelled, command="again") == first
    loose = replace(Filters(), min_confidence=0.25, max_repeats=4)
    with pytest.raises(UserError) as error:
        finish_set(labelled, loose)
    assert "(min_confidence: 0.5 -> 0.25, max_repeats: 3 -> 4)" in str(error.value)
    assert "--refilter" in str(error.value) and content(labelled) == before
    assert "phases that were trained on it have to be trained anew (local/train.py --restart)" in str(
        error.value
    )
    caplog.clear()
    again = finish_set(labelled, loose, refilter=True)
    assert again["kept"]["cuts"] == 4 and again["sha256"] != first["sha256"]
    changed = f"sha256 {first['sha256'][:12]} -> {again['sha256'][:12]}): train the phases anew"
    assert changed in caplog.text
    ids = [cut.id for cut in load_pseudo_labels(labelled / "labels", labelled / "fbank")]
    assert ids == ["u0", "u2", "u4", "u5"]
    assert finish_set(labelled, refilter=True)["sha256"] == first["sha256"] and content(labelled) == before


def test_files_are_the_same_byte_for_byte_at_any_time(labelled, monkeypatch):
    finish_set(labelled)
    before = content(labelled)
    (labelled / "labels" / "summary.json").unlink()
    monkeypatch.setattr("time.time", lambda: 0.0)
    finish_set(labelled)
    assert content(labelled) == before


@pytest.mark.parametrize("dies_at", ["save_manifest", "write_json"])
def test_a_merge_that_is_killed_is_not_taken_for_finished(labelled, monkeypatch, dies_at):
    first = finish_set(labelled)
    before = content(labelled)

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(label_set, dies_at, killed)
    with pytest.raises(KeyboardInterrupt):
        finish_set(labelled, Filters(min_confidence=0.0), refilter=True)
    monkeypatch.undo()
    (labelled / "labels" / ".cuts.jsonl.gz.x.tmp").write_text("half")
    with pytest.raises(UserError, match="labels are not finished"):
        load_pseudo_labels(labelled / "labels", labelled / "fbank")
    assert finish_set(labelled) == first and content(labelled) == before
    names = sorted(p.name for p in (labelled / "labels").iterdir())
    assert names == [".lock", "cuts.jsonl.gz", "dropped.jsonl", "run.json", "summary.json", "units"]


def test_of_processes_that_end_together_one_makes_the_set(labelled, monkeypatch):
    made, save = [], label_set.save_manifest

    def slow(items, path):
        made.append(path)
        time.sleep(0.1)
        save(items, path)

    monkeypatch.setattr(label_set, "save_manifest", slow)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(finish_set, labelled, command=str(i)) for i in range(3)]
    assert len(made) == 1 and len({json.dumps(future.result()) for future in futures}) == 1


def test_filters_that_keep_nothing_leave_no_set(labelled):
    with pytest.raises(UserError, match=r"drop all 6 cuts \(empty 1, confidence 5, length ratio 0, rep"):
        finish_set(labelled, Filters(min_confidence=1.0))
    assert len((labelled / "labels" / "dropped.jsonl").read_text().splitlines()) == 6
    assert finish_set(labelled)["kept"]["cuts"] == 2  # nothing was frozen


def test_a_set_that_is_not_that_of_its_summary_is_refused(labelled):
    finish_set(labelled)
    summary = (labelled / "labels" / "summary.json").read_text()
    finish_set(labelled, Filters(min_confidence=0.0), refilter=True)
    (labelled / "labels" / "summary.json").write_text(summary)
    with pytest.raises(UserError, match="is not the set that summary.json describes"):
        load_pseudo_labels(labelled / "labels", labelled / "fbank")


def test_damaged_units_are_named(labelled):
    units = labelled / "labels" / "units"
    good = (units / "00001.soft").read_bytes()
    for bad in (good[:-1], good + b"x"):
        (units / "00001.soft").write_bytes(bad)
        with pytest.raises(UserError, match="00001.soft is missing or damaged; delete .*00001.jsonl"):
            finish_set(labelled)
    (units / "00001.soft").write_bytes(good)
    lines = (units / "00001.jsonl").read_text().splitlines(keepends=True)
    (units / "00001.jsonl").write_text("".join(["{}\n", *lines[1:]]))
    with pytest.raises(UserError, match="00001.jsonl:1: expected an object with id"):
        finish_set(labelled)
    (units / "00001.jsonl").write_text("".join(lines))
    assert finish_set(labelled)["kept"]["cuts"] == 2


def test_soft_files_that_are_damaged_later_do_not_pass_for_finished(labelled):
    summary = finish_set(labelled)
    path = labelled / "labels" / "units" / "00001.soft"
    good = path.read_bytes()
    for damage in (lambda: path.write_bytes(good[:-1]), lambda: path.unlink()):
        damage()
        for again in (finish_set, lambda base: label_set.finished_set(base / "labels", DEFAULT, False)):
            with pytest.raises(UserError, match="00001.soft is missing or damaged; delete .*00001.jsonl"):
                again(labelled)
        # What it says to do helps: the unit is missing then, and is labelled again.
        lines = path.with_suffix(".jsonl").read_text()
        path.with_suffix(".jsonl").unlink()
        assert label_set.finished_set(labelled / "labels", DEFAULT, False) == summary
        path.write_bytes(good)
        path.with_suffix(".jsonl").write_text(lines)
        assert finish_set(labelled) == summary


def test_a_part_that_changed_under_the_labels_is_refused(labelled):
    path = labelled / "fbank" / "cuts_unlabelled.jsonl.gz"
    CutSet.from_cuts(list(CutSet.from_file(path))[:-1]).to_file(path)
    with pytest.raises(UserError, match="cuts_unlabelled.jsonl.gz has other cuts than"):
        finish_set(labelled)
