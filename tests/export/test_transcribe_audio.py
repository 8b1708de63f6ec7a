"""What transcribe.py reads: samples as they are, and a word about what is wrong with them."""

import io
import re
import struct
import subprocess

import numpy as np
import pytest
import soundfile

from tests.export.test_transcribe import SAMPLES, as_pcm, written
from transducer_kd.export import audio
from transducer_kd.log import UserError

PCM = as_pcm(SAMPLES)
HEARD = np.frombuffer(PCM, dtype="<i2").astype(np.float32) / 32768


def wav_bytes(pcm, data_size, riff_size=None, before=b"", after=b""):
    """A WAV whose header names what it likes."""
    body = b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 16000, 32000, 2, 16) + before
    body += b"data" + struct.pack("<I", data_size) + pcm + after
    return b"RIFF" + struct.pack("<I", len(body) if riff_size is None else riff_size) + body


def read(path):
    """All samples of a file, as transcribe.py reads them."""
    pieces = list(audio.file_pieces(str(path)))
    audio.warn_of_missing(str(path), sum(map(len, pieces)))
    return np.concatenate(pieces)


def refusal(read_it):
    with pytest.raises(UserError) as raised:
        read_it()
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3"])
def test_a_whole_file_is_read_as_it_is(tmp_path, caplog, name):
    path = written(tmp_path / name)
    # soundfile seeks after every piece, and an MP3 is not quite the same after that.
    tolerance = 0.05 if name == "a.mp3" else 0
    np.testing.assert_allclose(read(path), soundfile.read(path, dtype="float32")[0], 0, tolerance)
    assert caplog.text == ""


def test_a_flac_that_breaks_off(tmp_path):
    path = written(tmp_path / "a.flac")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    seconds, whole = re.search(
        "a.flac is damaged: it breaks off after ([0-9.]*) s of ([0-9.]*) s", refusal(lambda: read(path))
    ).groups()
    assert 0.5 < float(seconds) < 2 and whole == "2.5"


def test_an_mp3_that_breaks_off_ends_there(tmp_path, caplog):
    """SoundFile.blocks would repeat its last block as often as the header has it."""
    path = written(tmp_path / "a.mp3", np.tile(SAMPLES, 4))
    whole = read(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    half = read(path)
    assert 0.4 < len(half) / len(whole) < 0.6
    assert "a.mp3: 5." in caplog.text and "s are missing: its header names 10.0 s" in caplog.text


@pytest.mark.parametrize("before", [b"", b"LIST\x03\x00\x00\x00abc\x00"])
def test_a_wav_that_is_shorter_than_its_header_names(tmp_path, caplog, before):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(PCM, len(PCM) + 3 * 32000, before=before))
    np.testing.assert_array_equal(read(path), HEARD)
    assert "a.wav: 3.0 s are missing: its header names 5.5 s" in caplog.text


@pytest.mark.parametrize("data_size", [len(PCM), 0xFFFFFFFF, 0x7FFFFFFF - 36, 0x80000000])
def test_a_wav_that_was_streamed_names_no_length(tmp_path, caplog, data_size):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(PCM, data_size))
    np.testing.assert_array_equal(read(path), HEARD)
    assert caplog.text == ""


@pytest.mark.parametrize("riff_size", [0, 36, 0xFFFFFFFF])
def test_a_wav_with_an_unfinished_header(tmp_path, riff_size):
    path = tmp_path / "a b.wav"
    path.write_bytes(wav_bytes(PCM, 0, riff_size, before=b"LIST\x04\x00\x00\x00abcd"))
    message = refusal(lambda: read(path))
    assert f"its header is unfinished, {len(PCM)} bytes follow it; send them to stdin" in message
    (command,) = re.findall(r"tail -c .* '.*'", message)
    assert subprocess.run(command, shell=True, capture_output=True, check=True).stdout == PCM


def test_a_wav_that_is_empty_with_something_after_it(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(b"", 0, after=b"LIST\x04\x00\x00\x00abcd"))
    assert "is empty: it has a header and no samples" in refusal(lambda: read(path))


def test_samples_out_of_range(tmp_path):
    np.testing.assert_array_equal(read(written(tmp_path / "a.wav", SAMPLES * 8)), SAMPLES * 8)
    message = refusal(lambda: read(written(tmp_path / "b.wav", SAMPLES * 32768)))
    assert "b.wav holds samples outside [-1, 1]" in message and "scale them" in message


# ---------------------------------------------------------------- stdin


def heard(data, step=1000):
    """What comes of stdin, of which a read gets `step` bytes."""

    class Pipe(io.BytesIO):
        def read1(self, size=-1):
            return self.read(min(step, size))

    return np.concatenate(list(audio.stdin_pieces(Pipe(data))))


@pytest.mark.parametrize("step", [1, 2, 3, 12, 13, 100000])
def test_raw_pcm(caplog, step):
    for data in (PCM[:5000], PCM[:4], PCM[:2]):
        np.testing.assert_array_equal(heard(data, step), HEARD[: len(data) // 2])
    assert caplog.text == ""
    np.testing.assert_array_equal(heard(PCM[:4999], step), HEARD[:2499])
    assert "an odd byte" in caplog.text


@pytest.mark.parametrize("step", [1, 2, 100])
def test_stdin_that_is_no_raw_pcm(step, tmp_path):
    def first_bytes(name):
        return written(tmp_path / name).read_bytes()[:400]

    for data, kind in (
        (first_bytes("a.wav"), "WAV"),
        (first_bytes("a.flac"), "FLAC"),
        (first_bytes("a.ogg"), "Ogg"),
        (first_bytes("a.aiff"), "AIFF"),
        (b"ID3\x03" + PCM, "MP3"),
        (b"\x00\x00\x00\x20ftypM4A " + PCM, "MP4"),
        (b"\x1a\x45\xdf\xa3" + PCM, "WebM or Matroska"),
    ):
        assert f"stdin holds a file ({kind}), and raw PCM is wanted" in refusal(lambda d=data: heard(d, step))


@pytest.mark.parametrize("data", [b"", b"\x01"])
def test_stdin_without_audio(data):
    assert "no audio came from stdin" in refusal(lambda: heard(data))


def test_an_mp3_without_a_tag_is_heard_with_a_warning(tmp_path, caplog):
    """Samples may begin like that, so it is no error."""
    mp3 = written(tmp_path / "a.mp3").read_bytes()
    assert len(heard(mp3, 1)) == len(mp3) // 2
    assert "stdin begins as an MP3 does" in caplog.text
    caplog.clear()
    for first in ([-1, -1], [-1, 0], [-257, 5], [0, -1025]):  # quiet beginnings
        heard(np.array([*first, 7, 8, 9, 10, 11], dtype="<i2").tobytes())
    assert caplog.text == ""
