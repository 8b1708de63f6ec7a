"""Where speech comes from: LibriSpeech-layout folders, CSV, Kaldi data folders, lhotse manifests, downloads.

Every reader answers with a list of Utterance; data/validate.py looks at the audio and makes lhotse manifests
of them. Readers raise UserError for what makes a whole part unreadable (a missing folder, a CSV without its
columns); faults of single utterances are found by the validation, which can skip them.
"""

import csv
import logging
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from transducer_kd.data.manifests import read_manifest
from transducer_kd.log import UserError, check_disk_space, one_line


@dataclass
class Utterance:
    """One stretch of speech and its transcript. Times in seconds from the start of the audio."""

    id: str
    recording_id: str
    audio: Path
    text: str
    speaker: str
    start_s: float = 0.0
    duration_s: Optional[float] = None  # None: to the end of the audio
    channel: Optional[int] = None  # None: the only one
    recording: Optional[Any] = None  # lhotse Recording, from ready manifests, which know more than a path


@dataclass
class PartNames:
    """Which parts of a corpus are for what."""

    train: List[str]
    dev: List[str]
    test: List[str]
    unlabelled: List[str] = field(default_factory=list)  # audio to learn from without its transcripts

    def all(self) -> List[str]:
        """Every part once, in order."""
        return list(dict.fromkeys(self.train + self.unlabelled + self.dev + self.test))


# mini LibriSpeech has no test part: every other speaker of its development part is kept for testing.
SPEAKER_HALVES = {"dev-clean-2-dev": ("dev-clean-2", 0), "dev-clean-2-test": ("dev-clean-2", 1)}
# The corpora that have names.
NAMED_PARTS: Dict[str, PartNames] = {
    "synthetic": PartNames(["train"], ["dev"], ["test-clean", "test-other"], ["unlabelled"]),
    "mini_librispeech": PartNames(["train-clean-5"], ["dev-clean-2-dev"], ["dev-clean-2-test"]),
    "librispeech": PartNames(["train-clean-100"], ["dev-clean", "dev-other"], ["test-clean", "test-other"]),
}
FULL_LIBRI_PARTS = ["train-clean-360", "train-other-500"]

# Archive and unpacked audio together, GB.
_DOWNLOAD_GB = {
    "train-clean-5": 0.7, "dev-clean-2": 0.3,
    "train-clean-100": 13.0, "train-clean-360": 48.0, "train-other-500": 62.0,
    "dev-clean": 0.7, "dev-other": 0.7, "test-clean": 0.7, "test-other": 0.7,
}  # fmt: skip


def find_parts(corpus_dir: Path) -> List[str]:
    """Folders of a LibriSpeech-layout corpus that hold transcripts. UserError when there is none."""
    corpus_dir = Path(corpus_dir)
    if not corpus_dir.is_dir():
        raise UserError(f"there is no folder {corpus_dir}")
    parts = sorted(d.name for d in corpus_dir.iterdir() if d.is_dir() and next(d.rglob("*.trans.txt"), None))
    if not parts:
        raise UserError(
            f"{corpus_dir} has no part in LibriSpeech layout; expected "
            "<part>/<speaker>/<chapter>/*.trans.txt with the audio beside it"
        )
    return parts


def guess_roles(parts: Sequence[str]) -> PartNames:
    """Parts by how their names begin: train*; dev* or valid*; test* or eval*; unlabelled*."""

    def starting(*beginnings: str) -> List[str]:
        return [part for part in parts if part.startswith(beginnings)]

    return PartNames(
        starting("train"), starting("dev", "valid"), starting("test", "eval"), starting("unlabelled")
    )


def read_librispeech_part(corpus_dir: Path, part: str) -> List[Utterance]:
    """`<corpus_dir>/<part>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt` with lines `UTT TEXT` and
    UTT.flac. A part of SPEAKER_HALVES holds every other speaker of a folder, in the order of their names.
    """
    folder_name, half = SPEAKER_HALVES.get(part, (part, None))
    folder = Path(corpus_dir) / folder_name
    if not folder.is_dir():
        there = sorted(d.name for d in Path(corpus_dir).glob("*") if d.is_dir())
        raise UserError(
            f"there is no part {folder_name} in {corpus_dir}; parts there: {', '.join(there) or 'none'}"
        )
    utterances = []
    for transcripts in sorted(folder.rglob("*.trans.txt")):
        for line in read_lines(transcripts):
            utterance_id, _, text = line.partition(" ")
            audio = next(
                (
                    p
                    for p in (transcripts.parent / f"{utterance_id}.{ext}" for ext in ("flac", "wav"))
                    if p.exists()
                ),
                transcripts.parent / f"{utterance_id}.flac",
            )
            speaker = transcripts.relative_to(folder).parts[0]
            utterances.append(Utterance(utterance_id, utterance_id, audio, text.strip(), speaker))
    if not utterances:
        raise UserError(f"{folder} has no transcripts (<speaker>/<chapter>/*.trans.txt)")
    if half is not None:
        speakers = sorted({u.speaker for u in utterances})[half::2]
        utterances = [u for u in utterances if u.speaker in speakers]
    return utterances


def read_csv(path: Path) -> List[Utterance]:
    """A CSV with a header that names the columns path, text, speaker and, where wanted, id.

    Paths are relative to the CSV. Without an id column the utterance is called by its file's name. An empty
    speaker counts as one of its own.
    """
    path = Path(path)
    utterances = []
    rows = csv.DictReader(read_lines(path))
    missing = {"path", "text", "speaker"} - set(rows.fieldnames or [])
    if missing:
        raise UserError(
            f"{path}: column {', '.join(sorted(missing))} is missing; the first line must name the columns: "
            "path,text,speaker and, where wanted, id"
        )
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise UserError(
                f"{path}, row {number}: has not as many fields as the header; quote texts that hold commas"
            )
        audio = path.parent / row["path"]
        name = row.get("id") or audio.stem
        utterances.append(Utterance(name, name, audio, row["text"].strip(), row["speaker"] or name))
    if not utterances:
        raise UserError(f"{path} has a header but no rows")
    return utterances


def read_kaldi_dir(folder: Path) -> List[Utterance]:
    """A Kaldi data folder: wav.scp and text, with segments and utt2spk where present.

    Own reader, since lhotse's rounds durations down to milliseconds and leaves unreadable recordings out
    silently. Paths in wav.scp are relative to the current folder, as in Kaldi. UserError for a pipe.
    """
    folder = Path(folder)
    recordings = _kaldi_table(folder / "wav.scp")
    for name, source in recordings.items():
        if source.endswith("|"):
            raise UserError(
                f"{folder / 'wav.scp'}: recording {name} is a command ({source[:60]}); run it once, keep its "
                "output as a file, and name that"
            )
    texts = _kaldi_table(folder / "text")
    speakers = _kaldi_table(folder / "utt2spk") if (folder / "utt2spk").exists() else {}
    segments = folder / "segments"
    if not segments.exists():
        rows = [[name, name, "0", "-1"] for name in recordings]
    else:
        rows = [line.split() for line in read_lines(segments)]
    utterances = []
    for row in rows:
        try:
            name, recording_id, start, end = row
            start_s, end_s = float(start), float(end)
            audio = recordings[recording_id]
        except (ValueError, KeyError):
            raise UserError(
                f"{segments}: bad line '{' '.join(row)}'; expected: UTT RECORDING START END, the recording "
                "in wav.scp"
            ) from None
        duration_s = None if end_s == -1 else end_s - start_s
        text, speaker = texts.get(name, ""), speakers.get(name, name)
        utterances.append(Utterance(name, recording_id, Path(audio), text, speaker, start_s, duration_s))
    return utterances


def read_manifests(folder: Path, part: str) -> List[Utterance]:
    """lhotse's `*recordings_<part>.jsonl[.gz]` with `*supervisions_<part>`, or `*cuts_<part>`."""
    folder = Path(folder)
    mend = "make it again"
    cuts = _manifest_file(folder, "cuts", part)
    if cuts is not None:
        from lhotse import CutSet  # late: --help should not wait for it

        recordings, segments, _ = CutSet.from_cuts(read_manifest("cuts", cuts, mend)).decompose()
    else:
        paths = [_manifest_file(folder, kind, part) for kind in ("recordings", "supervisions")]
        if None in paths:
            raise UserError(
                f"{folder} has neither recordings_{part} with supervisions_{part}, nor cuts_{part}"
            )
        recordings = read_manifest("recordings", paths[0], mend)
        segments = read_manifest("supervisions", paths[1], mend)
    known = {recording.id: recording for recording in recordings or []}
    utterances = []
    for segment in segments or []:
        recording = known.get(segment.recording_id)
        if recording is None:
            raise UserError(
                f"part {part} in {folder}: supervision {segment.id} names recording {segment.recording_id}, "
                "which the recordings do not have"
            )
        if not Path(str(recording.sources[0].source)).is_absolute():
            recording = recording.with_path_prefix(Path.cwd())
        channel = segment.channel if isinstance(segment.channel, int) else segment.channel[0]
        utterances.append(
            Utterance(
                segment.id, recording.id, Path(str(recording.sources[0].source)), segment.text or "",
                segment.speaker or segment.id, segment.start, segment.duration, channel, recording,
            )
        )  # fmt: skip
    if not utterances:
        raise UserError(f"the manifests of part {part} in {folder} hold no supervision")
    return utterances


def download(corpus: str, parts: Sequence[str], download_dir: Path) -> Path:
    """Fetch the parts of (mini) LibriSpeech that are not there yet -> the folder that holds the parts.

    A part whose folder is there is left alone, unless its archive lies beside it without lhotse's
    `.completed` mark: then the unpacking was cut short, and is done again.
    """
    download_dir = Path(download_dir)
    corpus_dir = download_dir / "LibriSpeech"
    missing = []
    for part in dict.fromkeys(SPEAKER_HALVES.get(part, (part, None))[0] for part in parts):
        unpacked, marked = (corpus_dir / part).is_dir(), (corpus_dir / part / ".completed").exists()
        if unpacked and (marked or not (download_dir / f"{part}.tar.gz").exists()):
            logging.info("%s is there already: %s", part, corpus_dir / part)
        else:
            missing.append(part)
    if missing:
        check_disk_space(
            download_dir, 1e9 * sum(_DOWNLOAD_GB[p] for p in missing), f"downloading {', '.join(missing)}"
        )
    for part in missing:
        address = (
            f"https://www.openslr.org/resources/{31 if corpus == 'mini_librispeech' else 12}/{part}.tar.gz"
        )
        from lhotse.recipes import download_librispeech

        previous = socket.getdefaulttimeout()
        socket.setdefaulttimeout(60)
        try:
            download_librispeech(download_dir, dataset_parts=[part])
        except Exception as e:  # urllib, tarfile, socket each have their own
            raise UserError(
                f"cannot download {part} ({one_line(e)}); is there a network? Fetch {address} in another way "
                f"and unpack it in {download_dir}, or pass --corpus-dir with a folder that has it"
            ) from None
        finally:
            socket.setdefaulttimeout(previous)
    return corpus_dir


def read_lines(path: Path) -> List[str]:
    """Non-empty lines of a UTF-8 text file. UserError when it is missing or not UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline=None) as f:
            return [line.rstrip("\n") for line in f if line.strip()]
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}); convert it, e.g. with iconv") from None


def _kaldi_table(path: Path) -> Dict[str, str]:
    table: Dict[str, str] = {}
    for line in read_lines(path):
        key, *value = line.split(maxsplit=1)
        if key in table:
            raise UserError(f"{path}: id {key} appears twice")
        table[key] = value[0].strip() if value else ""
    return table


def _manifest_file(folder: Path, kind: str, part: str) -> Optional[Path]:
    for suffix in ("jsonl.gz", "jsonl"):
        found = sorted(folder.glob(f"{kind}_{part}.{suffix}")) or sorted(
            folder.glob(f"*_{kind}_{part}.{suffix}")
        )
        if found:
            return found[0]
    return None
