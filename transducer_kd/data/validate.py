"""Looking at every utterance before hours are spent on it, and making lhotse manifests of the good ones.

A fault becomes a Problem: one line that names the utterance and its file and says what to do. The caller
stops at the first one or leaves all of them out; either way they are listed in a file.
"""

import gzip
import hashlib
import json
import logging
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import soundfile
from lhotse import Recording, SupervisionSegment
from lhotse.audio import AudioSource

from transducer_kd.data.corpora import Utterance
from transducer_kd.data.features import SAMPLING_RATE
from transducer_kd.log import UserError, atomic_write, progress

MIN_UTTERANCE_S = 0.1  # the encoder needs 7 feature frames for one of its own
OVERHANG_S = 0.1  # a segment may end this much after its audio and is shortened; more is a fault
_STREAMED_WAV_BYTES = 0x7FFFF000  # writers that do not know the length put about 2 or 4 GiB into the header


@dataclass
class CheckOptions:
    """What to accept.

    resample       other sampling rates than 16 kHz
    channel        which one of several to take; None: several are a fault
    text_norm      upper (LibriSpeech style) or none
    text_optional  an empty transcript is no fault
    decode         decode all audio, which alone finds damage inside FLAC: 4,000 audio-s/s per core
    """

    resample: bool = False
    channel: Optional[int] = None
    text_norm: str = "upper"
    text_optional: bool = False
    decode: bool = True
    num_jobs: int = 1


@dataclass
class Problem:
    utterance_id: str
    message: str


@dataclass
class AudioInfo:
    """What a file says of itself, or why it cannot be used (`fault`)."""

    sampling_rate: int = 0
    num_samples: int = 0
    num_channels: int = 0
    fault: str = ""


def inspect_audio(path: Path, decode: bool) -> AudioInfo:
    """Header and, with `decode`, every sample of one file. Faults are told, not raised."""
    if not path.exists():
        return AudioInfo(fault="does not exist; restore it or correct its path")
    if path.stat().st_size == 0:
        return AudioInfo(fault="is empty (0 bytes); copy it again")
    try:
        header = soundfile.info(str(path), verbose=True)
    except (RuntimeError, OSError):
        return AudioInfo(
            fault="is not audio that libsndfile can read, or its header is damaged; copy or convert it again"
        )
    info = AudioInfo(header.samplerate, header.frames, header.channels)
    cut = re.search(r"^\s*data : (\d+) \(should be \d+\)", header.extra_info, re.MULTILINE)
    if cut and 0 < int(cut.group(1)) < _STREAMED_WAV_BYTES:
        info.fault = "is truncated: shorter than its header says; copy it again"
    elif header.frames == 0:
        info.fault = "holds no samples; copy it again"
    elif decode:
        info.fault = _decoding_fault(path, header.frames)
    return info


def _decoding_fault(path: Path, expected: int) -> str:
    decoded = 0
    try:
        with soundfile.SoundFile(str(path)) as f:
            for block in f.blocks(blocksize=1 << 20, dtype="float32"):
                decoded += len(block)
                if not np.isfinite(block).all():
                    return "holds samples that are not finite; convert it again"
    except (RuntimeError, OSError):
        pass
    if decoded == expected:
        return ""
    return f"is truncated or damaged: {decoded} of {expected} samples decode; copy it again"


def normalize_text(text: str, style: str) -> str:
    """LibriSpeech style (upper): upper case; letters, digits, apostrophes, single spaces. none: spaces only.

    >>> normalize_text("It’s twenty-one, please!", "upper")
    "IT'S TWENTY ONE PLEASE"
    """
    if style == "upper":
        text = unicodedata.normalize("NFKC", text).replace("\u2019", "'").upper()
        text = "".join(c if c == "'" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
        text = " ".join(word for word in text.split() if word.strip("'"))
    return " ".join(text.split())


def prepare_part(
    output_dir: Path, part: str, utterances: Sequence[Utterance], options: CheckOptions, skip_bad: bool
) -> None:
    """Check one part and write its manifests, unless they are up to date.

    Faults are listed in `problems_<part>.txt`. Raises UserError for the first one, or with `skip_bad` leaves
    the utterances out, counts them and names them in the log.
    """
    paths = {kind: output_dir / f"{kind}_{part}.jsonl.gz" for kind in ("recordings", "supervisions")}
    mark = output_dir / f".input_{part}"
    state = fingerprint(utterances, options)
    if all(path.exists() for path in paths.values()) and mark.exists() and mark.read_text() == state:
        logging.info("%s: manifests are up to date", part)
        return
    recordings, supervisions, problems = build_manifests(utterances, options)
    _report(output_dir / f"problems_{part}.txt", part, problems, skip_bad)
    if not supervisions:
        raise UserError(f"part {part}: none of its {len(utterances)} utterances is usable")
    save_manifest(recordings, paths["recordings"])
    save_manifest(supervisions, paths["supervisions"])
    with atomic_write(mark) as f:
        f.write(state)
    hours = sum(s.duration for s in supervisions) / 3600
    speakers = len({s.speaker for s in supervisions})
    logging.info("%s: %d utterances, %d speakers, %.2f h", part, len(supervisions), speakers, hours)


def _report(path: Path, part: str, problems: Sequence[Problem], skip_bad: bool) -> None:
    if not problems:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as f:
        f.writelines(problem.message + "\n" for problem in problems)
    if not skip_bad:
        more = f" ({len(problems) - 1} more faulty utterances in {path})" if len(problems) > 1 else ""
        raise UserError(f"part {part}, {problems[0].message}. Or leave it out with --bad-audio skip{more}")
    for problem in problems[:10]:
        logging.warning("part %s, left out: %s", part, problem.message)
    logging.warning("part %s: left out %d faulty utterances, all listed in %s", part, len(problems), path)


def build_manifests(
    utterances: Sequence[Utterance], options: CheckOptions
) -> Tuple[List[Recording], List[SupervisionSegment], List[Problem]]:
    """Check every utterance -> recordings, supervisions (in the order given), problems of those left out."""
    infos = _inspect_all(utterances, options)
    recordings: Dict[str, Recording] = {}
    segments: Dict[str, SupervisionSegment] = {}
    problems: List[Problem] = []
    for utterance in utterances:
        text = normalize_text(utterance.text, options.text_norm)
        fault = _text_fault(utterance, text, options)
        if utterance.id in segments:
            fault = f"the id appears twice (again with {utterance.audio}); give every utterance its own id"
        recording = recordings.get(utterance.recording_id)
        if not fault and recording is None:
            recording, fault = _build_recording(utterance, infos.get(str(utterance.audio)), options)
        if not fault:
            segment, fault = _build_segment(utterance, recording, text, options)
        if fault:
            problems.append(Problem(utterance.id, f"utterance {utterance.id}: {fault}"))
        else:
            recordings[utterance.recording_id], segments[utterance.id] = recording, segment
    return list(recordings.values()), list(segments.values()), problems


def _inspect_all(utterances: Sequence[Utterance], options: CheckOptions) -> Dict[str, AudioInfo]:
    paths = list(dict.fromkeys(str(u.audio) for u in utterances if _is_plain_file(u)))
    with ThreadPoolExecutor(options.num_jobs) as pool:  # libsndfile works outside Python's lock
        infos = pool.map(lambda path: inspect_audio(Path(path), options.decode), paths)
        return dict(zip(paths, progress(infos, total=len(paths), desc="checking audio files")))


def _is_plain_file(utterance: Utterance) -> bool:
    recording = utterance.recording
    return recording is None or (len(recording.sources) == 1 and recording.sources[0].type == "file")


def _text_fault(utterance: Utterance, text: str, options: CheckOptions) -> str:
    if any(c == "\ufffd" or (unicodedata.category(c) == "Cc" and c != "\t") for c in utterance.text):
        return f"its transcript {utterance.text[:60]!r} holds undecodable characters; mend its encoding"
    if not text and not options.text_optional:
        return (
            f"its transcript is empty (audio {utterance.audio}); add the text, or name the part in "
            "--unlabelled-parts"
        )
    return ""


def _build_recording(
    utterance: Utterance, info: Optional[AudioInfo], options: CheckOptions
) -> Tuple[Optional[Recording], str]:
    path = utterance.audio
    if info is not None and info.fault:
        return None, f"audio file {path} {info.fault}"
    recording = utterance.recording
    if recording is None:
        recording = Recording(
            id=utterance.recording_id,
            sources=[AudioSource("file", list(range(info.num_channels)), str(path.absolute()))],
            sampling_rate=info.sampling_rate,
            num_samples=info.num_samples,
            duration=info.num_samples / info.sampling_rate,
        )
    elif info is not None and not recording.transforms and info.num_samples < recording.num_samples - 1:
        return None, (
            f"audio file {path} has {info.num_samples} samples, its manifest says {recording.num_samples}; "
            "make the manifest again"
        )
    if recording.sampling_rate != SAMPLING_RATE:
        if not options.resample:
            return None, (
                f"audio file {path} has {recording.sampling_rate} Hz, {SAMPLING_RATE} Hz is needed; convert "
                "it, or pass --resample"
            )
        recording = recording.resample(SAMPLING_RATE)
    return recording, ""


def _build_segment(
    utterance: Utterance, recording: Recording, text: str, options: CheckOptions
) -> Tuple[Optional[SupervisionSegment], str]:
    channels = sorted(recording.channel_ids)
    channel = options.channel if options.channel is not None else utterance.channel
    if channel is None and len(channels) > 1:
        return None, (
            f"audio file {utterance.audio} has {len(channels)} channels, 1 is needed; mix it down, or pass "
            f"--channel {channels[0]} to take that one"
        )
    channel = channels[0] if channel is None or len(channels) == 1 else channel
    if channel not in channels:
        return None, f"audio file {utterance.audio} has no channel {channel}, only {channels}"
    start, end_of_audio = utterance.start_s, recording.duration
    end = end_of_audio if utterance.duration_s is None else start + utterance.duration_s
    if start < 0 or end <= start:
        times = f"{start:.3f}-{end:.3f} s"
        return None, f"its segment {times} of {utterance.audio} ends before it starts; correct the times"
    if end > end_of_audio + OVERHANG_S:
        return None, (
            f"its segment ends at {end:.3f} s, but {utterance.audio} has only {end_of_audio:.3f} s; "
            "correct the times"
        )
    duration = min(end, end_of_audio) - start
    if duration < MIN_UTTERANCE_S:
        missing = f"it has {duration:.3f} s of {utterance.audio}, {MIN_UTTERANCE_S} s are needed"
        return None, f"{missing}; leave it out"
    segment = SupervisionSegment(
        id=utterance.id, recording_id=recording.id, start=start, duration=round(duration, 8),
        channel=channel, text=text, speaker=utterance.speaker,
    )  # fmt: skip
    return segment, ""


def save_manifest(items: Iterable[Any], path: Path) -> None:
    """Write lhotse objects as `.jsonl.gz`, atomically, and byte for byte the same for the same items."""
    with atomic_write(path, "wb") as raw:
        # No time and no name in the header: they would make equal manifests differ.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0) as f:
            for item in items:
                f.write(json.dumps(item.to_dict(), ensure_ascii=False).encode() + b"\n")


def fingerprint(utterances: Iterable[Utterance], options: CheckOptions) -> str:
    """Hash of everything the manifests depend on; audio files by size and time, without reading them."""
    accepted = (options.resample, options.channel, options.text_norm, options.text_optional, options.decode)
    digest = hashlib.sha256(repr(accepted).encode())
    for u in utterances:
        try:
            status = u.audio.stat()
            state = (status.st_size, status.st_mtime_ns)
        except OSError:
            state = (0, 0)
        times = (u.start_s, u.duration_s, u.channel)
        digest.update(repr((u.id, u.recording_id, str(u.audio), u.text, u.speaker, times, state)).encode())
    return digest.hexdigest()
