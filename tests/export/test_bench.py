"""What the bench makes of the seconds it is given: medians, ratios within a turn, and what does not count."""

from types import SimpleNamespace

import numpy as np
import pytest

from transducer_kd.export import bench
from transducer_kd.export.bench import Amounts
from transducer_kd.export.timed import Heard
from transducer_kd.log import UserError

FIRST = {"resident_mb": 60.0, "chunk_ms_median": 2.0, "chunk_ms_p95": 3.0}
MINUTES = {"first_minute": FIRST, "last_minute": {**FIRST, "resident_mb": 60.5}}


class Folder:
    """A model folder that takes `seconds` of the model in each of its turns, and as many bytes."""

    def __init__(self, name, seconds, mode="streaming", precisions=("float",)):
        self.path, self.mode, self.precisions = name, mode, precisions
        self.seconds = seconds

    def bytes(self, mode, precision):
        assert mode == self.mode
        return 800 if precision == "float" else 200


@pytest.fixture
def run(monkeypatch):
    """Function: measures folders; what was done is in run.log."""
    log, peaks = [], iter([70.0, 90.0, 71.0] * 9)

    def candidate(folder, precision):
        seconds = iter(folder.seconds)

        def hear(pieces, clock):
            given = sum(len(piece) for piece in pieces)
            log.append((folder.path, precision, given))
            return [Heard(1.0, []), Heard(1.0, [own := next(seconds), own])]

        return SimpleNamespace(mode=folder.mode, piece_samples=1600, hear=hear)

    def memory_of(path, precision, pcm):
        log.append((path, precision, pcm.stat().st_size))
        return {"baseline_mb": 40.0, "peak_mb": next(peaks), **MINUTES}

    monkeypatch.setattr(bench, "Candidate", candidate)
    monkeypatch.setattr(bench.memory, "measure", memory_of)

    def measure(*folders, lengths=(), **amounts):
        wanted = Amounts(**amounts)
        lengths = lengths or [round(16000 * wanted.audio_s)]  # of the utterances: one, which is a turn
        speech = [np.zeros(num_samples, dtype=np.float32) for num_samples in lengths]
        return bench.measure({f.path: f for f in folders}, speech, wanted)

    measure.log = log
    return measure


def test_a_time_is_the_median_of_the_turns_that_count(run):
    # The first turn is for warming up.
    teacher = Folder("teacher", [99, 4, 8, 40])
    student = Folder("student", [99, 2, 1, 10])
    first, second = run(teacher, student, audio_s=10, turns=3, stream_s=20, streams=1)
    assert (first.phase, second.phase) == ("teacher", "student")
    assert first.rtf_features == 0.2 and first.rtf_model == 1.6 and first.rtf == 1.8
    assert (second.rtf, second.rtf_model) == (0.6, 0.4)
    # Within the turns: 8 / 4, 16 / 2, 80 / 20; and with 2 s of features.
    assert second.times_faster_model == 4 and second.times_faster == pytest.approx(82 / 22)
    assert first.times_faster == first.times_faster_model == first.times_smaller == 1
    # From the arrival of the second piece: 1 + s and 1 + 2s.
    assert first.chunk_ms_median == pytest.approx(1000 * (9 + 17) / 2)
    assert first.chunk_ms_p95 == pytest.approx(1000 * (9 + 0.95 * 8))


def test_models_take_turns_on_whole_utterances_of_the_wanted_length(run):
    names = [Folder("a", [1] * 9, precisions=("float", "int8")), Folder("b", [1] * 9)]
    rows = run(*names, lengths=(10000, 22000), audio_s=2.5, turns=2, stream_s=130, streams=2)
    everyone = [("a", "float"), ("a", "int8"), ("b", "float")]
    turn = [(*who, size) for who in everyone for size in (10000, 22000, 10000)]
    stream = [(*who, 2 * 130 * 16000) for who in everyone]
    assert run.log == 3 * turn + 2 * stream
    assert rows[0].rtf_features == pytest.approx(3 * 2 / (42000 / 16000))


def test_pauses_lie_between_the_utterances_of_a_long_stream(run, monkeypatch):
    streams = []
    monkeypatch.setattr(bench.memory, "write_pcm", lambda path, samples: streams.append(samples))
    monkeypatch.setattr(bench.memory, "measure", lambda *_: {"baseline_mb": 1.0, "peak_mb": 1.0, **MINUTES})
    folder = Folder("a", [1] * 4)
    bench.measure({"a": folder}, [np.ones(16000), np.ones(8000)], Amounts(1, 1, 6, 1))
    gap = round(bench.GAP_S * 16000)
    edges = np.flatnonzero(np.diff(streams[0])) + 1
    assert (
        edges.tolist()[:4] == [16000, 16000 + gap, 24000 + gap, 24000 + 2 * gap] and len(streams[0]) == 96000
    )


def test_memory_is_the_median_of_the_processes(run):
    (row,) = run(Folder("a", [1, 1]), turns=1, streams=3)
    assert (row.baseline_mb, row.peak_mb) == (40, 71)
    assert {"first_minute": row.first_minute, "last_minute": row.last_minute} == MINUTES


def test_int8_of_the_reference_is_compared_with_its_float(run):
    both = Folder("a", [1] * 9, precisions=("float", "int8"))
    rows = run(both, Folder("b", [1] * 9, precisions=("int8",)), turns=2)
    assert [(row.phase, row.precision, row.times_smaller) for row in rows] == [
        ("a", "float", 1),
        ("a", "int8", 4),
        ("b", "int8", 4),
    ]
    assert [row["precision"] for row in bench.as_json(rows, "a")] == ["float", "int8"]
    assert bench.as_json(rows, "b")[0]["rtf"] == rows[2].rtf
    lines = bench.table(rows).splitlines()
    assert len(lines) == 4 and all(line.endswith("+0.5 MB, +0.00 ms") for line in lines[1:])


def test_a_model_that_does_not_stream_has_no_chunks(run, monkeypatch):
    nothing = {"baseline_mb": 40.0, "peak_mb": 80.0, "first_minute": None, "last_minute": None}
    monkeypatch.setattr(bench.memory, "measure", lambda *_: nothing)
    teacher, student = Folder("a", [4] * 3, mode="offline"), Folder("b", [2] * 3)
    rows = run(teacher, student, turns=2, streams=2)
    assert rows[0].mode == "offline" and rows[0].chunk_ms_median is None and rows[0].chunk_ms_p95 is None
    assert rows[0].first_minute is None and rows[0].peak_mb == 80
    assert rows[1].mode == "streaming" and rows[1].times_faster_model == 2
    assert "-" in bench.table(rows).splitlines()[1].split()


def test_a_reference_without_float_files_is_refused(run):
    with pytest.raises(UserError, match="a has no float files.*export the phase again"):
        run(Folder("a", [1], precisions=("int8",)), Folder("b", [1]))
    assert run.log == []
