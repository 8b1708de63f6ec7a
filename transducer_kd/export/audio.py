"""Samples for transcribe.py, piece by piece: of files, and of raw PCM from stdin. What can be wrong there.

A piece is float32 (S,), at 16 kHz, in [-1, 1] or a little beyond. No torch here, nor in what is imported.
"""

import logging
import os
import shlex
from pathlib import Path
from typing import BinaryIO, Iterator, NamedTuple, Optional

import numpy as np
import soundfile

from transducer_kd.export.sherpa import SAMPLING_RATE
from transducer_kd.log import UserError, one_line

RECORD = "arecord -q -t raw -f S16_LE -r 16000 -c 1"
_PIECE = SAMPLING_RATE // 5  # samples that are read at once
_BYTES_PER_SAMPLE = 2

_RAW_SUFFIXES = (".raw", ".pcm", ".s16", ".s16le")  # raw PCM: nothing in the file says what it holds
_LOUDEST = 2.0  # lossy codecs and resampling go a bit beyond 1; integers stored as floats go far beyond
_OPEN_ENDED = 0x7FFF0000  # bytes; who streams a WAV names a length from here up, because it knows none
_LEAST_MISSING_S = 0.1  # an MP3 frame is shorter: lengths are not more exact than that

# How files begin that are no raw PCM: (offset, bytes, kind).
_CONTAINERS = (
    (0, b"RIFF", "WAV"),
    (0, b"fLaC", "FLAC"),
    (0, b"OggS", "Ogg"),
    (0, b"ID3", "MP3"),
    (0, b"FORM", "AIFF"),
    (0, b"\x1aE\xdf\xa3", "WebM or Matroska"),
    (4, b"ftyp", "MP4"),
)
_TELLING_BYTES = 12  # so many show what it is


# ---------------------------------------------------------------- files


def open_audio(name: str) -> soundfile.SoundFile:
    """Open an audio file. UserError for one that is missing, no audio, empty, or not 16 kHz mono."""
    path, quoted = Path(name), shlex.quote(name)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "is no file" if path.exists() else "no such file"
        raise UserError(f"{path}: {kind}; name an audio file, or send raw PCM to stdin (-)")
    mend = f"ffmpeg -i {quoted} -ar 16000 -ac 1 {shlex.quote(str(path.with_suffix('.16k.wav')))}"
    if not path.stat().st_size:
        raise UserError(f"{path} is empty (0 bytes); record it again or leave it out")
    try:
        file = soundfile.SoundFile(name)
    except (TypeError, soundfile.LibsndfileError) as e:  # TypeError: what soundfile says to a name like a.raw
        if path.suffix.lower() in _RAW_SUFFIXES:
            raise UserError(f"{path}: raw PCM is heard from stdin: give - instead, and < {quoted}") from None
        raise UserError(f"{path} cannot be read as audio ({one_line(e)}); convert it: {mend}") from None
    problem = None
    if file.samplerate != SAMPLING_RATE:
        problem = (
            f"{path} has {file.samplerate} Hz, and the model hears {SAMPLING_RATE} Hz; convert it: {mend}"
        )
    elif file.channels != 1:
        problem = f"{path} has {file.channels} channels, and the model hears one; convert it: {mend}"
    elif not file.frames:
        wav, size = _wav_header(name), path.stat().st_size
        problem = f"{path} is empty: it has a header and no samples; record it again or leave it out"
        if wav and not wav.data_size and wav.data_start < size != wav.riff_size + 8:
            # As a recorder leaves it that was killed. ffmpeg takes a length of 0 as: to the end of the file.
            mend = f"convert it: {mend}"
            if file.subtype == "PCM_16":
                mend = f"send them to stdin, and give - instead: tail -c +{wav.data_start + 1} {quoted} | ..."
            problem = f"{path}: its header is unfinished, {size - wav.data_start} bytes follow it; {mend}"
    if problem:
        file.close()
        raise UserError(problem)
    return file


def file_pieces(name: str) -> Iterator[np.ndarray]:
    """The samples of a file. UserError where it is damaged, or where they are no samples."""
    num_samples = 0
    with open_audio(name) as file:
        # Not file.blocks(): after the end of a file that was cut off it repeats the last block.
        while True:
            try:
                piece = file.read(_PIECE, dtype="float32")
            except soundfile.LibsndfileError as e:
                raise UserError(
                    f"{name} is damaged: it breaks off after {_seconds(num_samples)} of "
                    f"{_seconds(file.frames)} ({one_line(e)}); fetch it or record it again"
                ) from None
            if not len(piece):
                return
            if not np.isfinite(piece).all():
                raise UserError(
                    f"{name} holds samples that are no numbers (NaN or infinite); record it again"
                )
            if np.abs(piece).max() > _LOUDEST:
                raise UserError(
                    f"{name} holds samples outside [-1, 1] ({np.abs(piece).max():.0f}); scale them, or write "
                    "it with 16-bit integers"
                )
            num_samples += len(piece)
            yield piece


def warn_of_missing(name: str, num_samples: int) -> None:
    """Say so where a file that was read to its end had fewer samples than its header names."""
    with open_audio(name) as file:
        promised = file.frames
    wav = _wav_header(name)
    if wav and wav.data_size < _OPEN_ENDED:  # libsndfile counts what is there
        promised *= max(1.0, wav.data_size / (os.path.getsize(name) - wav.data_start))
    if promised - num_samples >= _LEAST_MISSING_S * SAMPLING_RATE:
        logging.warning(
            "%s: %s are missing: its header names %s; it was cut off or damaged, fetch it or record it again",
            name, _seconds(promised - num_samples), _seconds(promised),
        )  # fmt: skip


class _WavHeader(NamedTuple):
    """Lengths that a WAV names, in bytes."""

    riff_size: int  # of the file without 8 bytes
    data_start: int  # where its samples begin
    data_size: int  # of them


def _wav_header(name: str) -> Optional[_WavHeader]:
    """None for what is no WAV."""
    with open(name, "rb") as f:
        start = f.read(12)
        if start[:4] != b"RIFF":
            return None
        while True:
            chunk = f.read(8)
            if len(chunk) < 8:
                return None
            size = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                return _WavHeader(int.from_bytes(start[4:8], "little"), f.tell(), size)
            f.seek(size + size % 2, os.SEEK_CUR)


def _seconds(num_samples: float) -> str:
    return f"{num_samples / SAMPLING_RATE:.1f} s"


# ---------------------------------------------------------------- stdin


def stdin_pieces(file: BinaryIO) -> Iterator[np.ndarray]:
    """Samples of raw PCM as they come in. UserError where none come, or where it is no raw PCM."""
    data = file.read1(_TELLING_BYTES)
    while 0 < len(data) < _TELLING_BYTES:
        more = file.read1(_TELLING_BYTES - len(data))
        if not more:
            break
        data += more
    _check_raw(data)
    if len(data) < _BYTES_PER_SAMPLE:
        raise UserError(f"no audio came from stdin; send raw PCM there: {RECORD} | ...")
    while True:
        whole = len(data) // _BYTES_PER_SAMPLE * _BYTES_PER_SAMPLE
        if whole:
            yield np.frombuffer(data[:whole], dtype="<i2").astype(np.float32) / 32768
        more = file.read1(_PIECE * _BYTES_PER_SAMPLE)
        if not more:
            break
        data = data[whole:] + more
    if len(data) > whole:
        logging.warning("stdin ended in the middle of a sample (an odd byte): is it 16-bit PCM?")


def _check_raw(data: bytes) -> None:
    """UserError where stdin begins with `data` as a file does that is no raw PCM."""
    mend = (
        "give the file's name instead of -, or convert it on the way: ffmpeg -i - -f s16le -ar 16000 -ac 1 -"
    )
    for offset, magic, kind in _CONTAINERS:
        if data[offset:].startswith(magic):
            raise UserError(f"stdin holds a file ({kind}), and raw PCM is wanted; {mend}")
    # An MP3 frame begins with 11 ones, layer III, and indices of rates that are not all ones. Samples can
    # do so too, if rarely: FF FB is -1025. (Without the layer FF FF would, -1, and many recordings begin so.)
    if len(data) > 2 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2 and data[2] < 0xF0 and ~data[2] & 0x0C:
        logging.warning("stdin begins as an MP3 does, and is heard as raw PCM; if it is one, %s", mend)
