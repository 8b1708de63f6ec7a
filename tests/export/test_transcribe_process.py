"""The program of transcribe.py in a process of its own: its errors, its pipes, its memory."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.export.test_transcribe import SAMPLES, as_pcm, written

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def wav(tmp_path):
    return written(tmp_path / "a.wav")


class Process:
    """The program in a process of its own."""

    def __init__(self, *args, **pipes):
        command = [sys.executable, "-m", "transducer_kd.export.transcribe", *map(str, args)]
        self.popen = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **pipes
        )

    def end(self, pcm=None):
        out, err = self.popen.communicate(pcm, timeout=120)
        return self.popen.returncode, out.decode(), err.decode()


def test_an_error_is_one_line(streaming_folder, tmp_path):
    status, out, err = Process(streaming_folder, written(tmp_path / "8k.wav", rate=8000)).end()
    assert (status, out, err.count("\n")) == (1, "", 1) and "has 8000 Hz" in err


def test_one_pass_needs_no_torch(streaming_folder, wav):
    program = (
        "import sys; from transducer_kd.export import transcribe\n"
        f"transcribe.main([{str(streaming_folder)!r}, {str(wav)!r}])\n"
        "print(sorted({'torch', 'lhotse', 'onnxruntime', 'onnx', 'sentencepiece'} & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines()[-1] == "[]"


def test_words_are_there_while_audio_still_comes(streaming_folder):
    process = Process(streaming_folder, "-", stdin=subprocess.PIPE)
    process.popen.stdin.write(as_pcm(SAMPLES[:24000]))
    process.popen.stdin.flush()
    first = process.popen.stdout.readline().decode()
    assert first.endswith(" ...\n") and process.popen.poll() is None
    status, out, err = process.end(as_pcm(SAMPLES[24000:]))
    assert (status, err) == (0, "") and out.splitlines()[-1].startswith(first[:-5])


def test_a_reader_that_has_had_enough_ends_it_quietly(streaming_folder, wav):
    process = Process(streaming_folder, *[wav] * 30)
    process.popen.stdout.readline()
    process.popen.stdout.close()
    assert process.popen.stderr.read() == b"" and process.popen.wait(timeout=60) == 0


def test_five_minutes_take_no_more_memory_than_one(streaming_folder):
    """Five minutes of samples are 19 MB, and their features 10 MB."""
    minute = as_pcm(np.tile(SAMPLES, 24))
    process = Process(streaming_folder, "-", "--final-only", stdin=subprocess.PIPE)

    def resident_mb():
        (size,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.popen.pid}/status").read_text())
        return int(size) / 1024

    used = []
    for _ in range(5):
        # What a pipe holds (64 kB) has not been heard yet when write returns: 2 seconds.
        process.popen.stdin.write(minute)
        process.popen.stdin.flush()
        used.append(resident_mb())
    status, out, err = process.end()
    assert (status, err) == (0, "") and out
    assert used[-1] - used[0] < 4, used
