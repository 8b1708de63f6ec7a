"""Memory of a stream: of its own process alone, and constant."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_features import speechlike
from transducer_kd.export import memory
from transducer_kd.log import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def pcm(tmp_path_factory):
    """Three minutes."""
    path = tmp_path_factory.mktemp("pcm") / "audio.pcm"
    memory.write_pcm(path, np.resize(speechlike(160000), 3 * memory.MINUTE))
    return path


def test_samples_are_read_as_they_were_written(tmp_path):
    samples = np.array([0.0, 0.5, -1.0, 1.0, -3.0, 3.0, 1 / 32768], dtype=np.float32)
    memory.write_pcm(tmp_path / "a.pcm", samples)
    pieces = list(memory.read_pcm(tmp_path / "a.pcm", 3))
    assert [len(piece) for piece in pieces] == [3, 3, 1] and pieces[0].dtype == np.float32
    most = 32767 / 32768
    assert np.concatenate(pieces).tolist() == [0.0, 0.5, -1.0, most, -1.0, most, 1 / 32768]


def test_memory_now_and_at_most():
    before = memory.memory_mb("VmRSS")
    block = np.ones(10_000_000)  # 80 MB
    during = memory.memory_mb("VmRSS")
    del block
    after = memory.memory_mb("VmRSS")
    assert 75 < during - before < 90 and during - after > 75
    assert memory.memory_mb("VmHWM") >= during - 1


def test_memory_is_measured_where_linux_tells(monkeypatch):
    monkeypatch.setattr(memory, "_STATUS", Path("/nonexistent/status"))
    with pytest.raises(UserError, match="measure memory on Linux"):
        memory.memory_mb("VmRSS")


def test_a_stream_takes_no_more_memory_in_its_last_minute(streaming_folder, pcm):
    ours = np.ones(50_000_000)  # 400 MB, which are not the stream's
    found = memory.measure(streaming_folder, "float", pcm)
    del ours
    first, last = found["first_minute"], found["last_minute"]
    assert 10 < found["baseline_mb"] < first["resident_mb"] <= found["peak_mb"] < 200
    assert first["resident_mb"] - 1 < last["resident_mb"] < first["resident_mb"] + 1
    assert 0 < last["chunk_ms_median"] <= last["chunk_ms_p95"]
    assert last["chunk_ms_median"] < 3 * first["chunk_ms_median"]
    # Five minutes of samples are 19 MB, and their features 10: neither is kept.
    assert found["peak_mb"] < last["resident_mb"] + 3


def test_what_has_no_two_minutes_tells_no_growth(streaming_folder, offline_folder, pcm, tmp_path):
    found = memory.hear_file(offline_folder, "float", pcm)
    assert found["first_minute"] is None and found["last_minute"] is None
    assert found["peak_mb"] >= found["baseline_mb"]
    memory.write_pcm(tmp_path / "short.pcm", speechlike(memory.MINUTE + 5000))
    assert memory.hear_file(streaming_folder, "float", tmp_path / "short.pcm")["first_minute"] is None


def test_the_process_has_no_torch():
    code = "import sys, transducer_kd.export.memory; sys.exit(bool({'torch', 'onnx'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_process_that_fails_is_one_clear_error(streaming_folder, tmp_path, pcm):
    shutil.copytree(streaming_folder, tmp_path / "export")
    (tmp_path / "export" / "joiner.onnx").unlink()
    with pytest.raises(UserError, match="memory of float ended with status 1 .*joiner.onnx.*PCM_FILE"):
        memory.measure(tmp_path / "export", "float", pcm)


@pytest.mark.parametrize(
    "argv, status, message",
    [([], 2, "MODEL_DIR"), (["x", "float", "y"], 1, "there is no file y"), (["x", "half", "y"], 2, "choose")],
)
def test_by_hand_a_mistake_is_one_line(argv, status, message):
    command = [sys.executable, "-m", "transducer_kd.export.memory", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status and message in done.stderr and "Traceback" not in done.stderr
