"""Pseudo-labels: what a teacher heard in speech without transcripts, kept so that many machines can share the
work, a killed job loses at most the unit it was in, and every arm of a comparison trains on the same set.

    run.json            what the labels depend on; a job with other settings is refused
    units/<k>.jsonl     a line for each cut of work unit k, written last: the unit is done
    units/<k>.soft      the teacher's encoder_out of these cuts, where it is stored
    cuts.jsonl.gz       the cuts that the filters keep, with their labels as text: the frozen set
    dropped.jsonl       the others, each with the reason that dropped it
    summary.json        counts, hours, filters, sizes; written last: the set is finished (label_set.py)

A line of a unit has the keys of LABEL_KEYS: score is log P of the best hypothesis, to which the blanks of all
frames belong, confidence is P^(1/U) for its U tokens; frames is T', soft [offset in bytes, T'] or null, and
seconds the cut's share of the time that its batch took.

A soft file is rows, one for each encoder frame, those of a cut together; little-endian, D = encoder_dim:

    float16   D float16                        2 D bytes
    int8      D int8 q, then one float16 s     D + 2 bytes; the values are q s, s is the frame's largest / 127
"""

import contextlib
import fcntl
import hashlib
import json
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence

import numpy as np
from lhotse.cut import Cut

from transducer_kd.config import flat
from transducer_kd.data.dataset import batches_by_duration, cut_text
from transducer_kd.data.manifests import read_manifest
from transducer_kd.log import UserError, atomic_write, read_json, read_jsonl, write_json

SOFT_TYPES = ("none", "float16", "int8")
LABEL_KEYS = ("id", "text", "num_tokens", "score", "confidence", "frames", "soft", "seconds")
# Whose weights these are is known by their hash.
_MAY_DIFFER = ("teacher.path", "teacher.checkpoint")

Label = Dict[str, Any]  # a line of a unit
Unit = List[List[Cut]]  # batches


# ---------------------------------------------------------------- reading


def load_pseudo_labels(folder: Path, fbank_dir: Path) -> List[Cut]:
    """The cuts of a finished set, each with one supervision, whose text is the label.

    As in load_cuts, relative paths of features are in fbank_dir. cut.custom has score, confidence,
    teacher_sha256 and, where the teacher is stored, soft, which is for read_soft_targets. UserError where the
    set is not finished, or not the one that its summary.json describes.
    """
    summary = read_summary(folder)
    cuts: List[Cut] = read_manifest("cuts", Path(folder) / "cuts.jsonl.gz")
    if set_sha256(cuts) != summary["sha256"]:
        raise UserError(
            f"{folder}/cuts.jsonl.gz is not the set that summary.json describes; delete both and run "
            "local/pseudo_label.py again"
        )
    for cut in cuts:
        if cut.has_features:
            cut.features.storage_path = str(Path(fbank_dir) / cut.features.storage_path)
    return cuts


def read_summary(folder: Path) -> Dict[str, Any]:
    """summary.json of a finished set. UserError where the set is not finished."""
    path = Path(folder) / "summary.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no summary.json, so its labels are not finished; run local/pseudo_label.py, with "
            "all of its shards"
        )
    return read_json(path)


def set_sha256(cuts: Sequence[Cut]) -> str:
    """The name of a frozen set: hash of its ids, its labels and, where the teacher is stored, whose encoder
    output that is, its type and dimension.
    """
    digest = hashlib.sha256()
    for cut in cuts:
        soft = (cut.custom or {}).get("soft")
        stored = [cut.custom["teacher_sha256"], soft["dtype"], soft["dim"]] if soft else []
        digest.update(json.dumps([cut.id, cut_text(cut), *stored]).encode())
    return digest.hexdigest()


def read_soft_targets(folder: Path, soft: Dict[str, Any]) -> np.ndarray:
    """The teacher's encoder_out (T',D) float32 of a cut, from its cut.custom["soft"]: {"path" in folder,
    "offset" in bytes, "frames", "dim", "dtype"}. UserError where the file is missing or cut short.
    """
    path = Path(folder) / soft["path"]
    size = soft["frames"] * soft_row_bytes(soft["dim"], soft["dtype"])
    rows = b""
    if path.exists():
        with open(path, "rb") as f:
            f.seek(soft["offset"])
            rows = f.read(size)
    if len(rows) < size:
        raise damaged_soft(path)
    return unpack_soft(rows, soft["dim"], soft["dtype"])


def damaged_soft(path: Path) -> UserError:
    """The error for a soft file that is not as its unit's labels say."""
    return UserError(
        f"{path} is missing or damaged; delete {path.with_suffix('.jsonl')} and run local/pseudo_label.py "
        "again"
    )


# ---------------------------------------------------------------- soft targets


def soft_row_bytes(dim: int, dtype: str) -> int:
    """Bytes of an encoder frame of `dim` channels."""
    return {"none": 0, "float16": 2 * dim, "int8": dim + 2}[dtype]


def pack_soft(matrix: np.ndarray, dtype: str) -> bytes:
    """(T',D) float32 -> rows of a soft file; none for dtype "none".

    Of a value v, float16 keeps all but 2^-11 v, int8 all but s/2.
    """
    if dtype == "none":
        return b""
    if dtype == "float16":
        return matrix.astype("<f2").tobytes()
    largest = np.abs(matrix).max(axis=1)
    scale = (largest / 127).astype(np.float16)
    # Rounded up: the largest value has to fit. A product of float16 and 127 is exact in float32.
    too_small = 127 * scale.astype(np.float32) < largest
    scale = np.where(too_small, np.nextafter(scale, np.float16(np.inf)), scale).astype("<f2")[:, None]
    q = np.rint(matrix / np.where(scale > 0, scale, 1).astype(np.float32)).astype(np.int8)
    return np.hstack([q.view(np.uint8), scale.view(np.uint8)]).tobytes()


def unpack_soft(rows: bytes, dim: int, dtype: str) -> np.ndarray:
    """Rows of a soft file -> (T',D) float32."""
    if dtype == "float16":
        return np.frombuffer(rows, dtype="<f2").reshape(-1, dim).astype(np.float32)
    table = np.frombuffer(rows, dtype=np.uint8).reshape(-1, dim + 2)
    scale = np.ascontiguousarray(table[:, dim:]).view("<f2").astype(np.float32)
    return table[:, :dim].view(np.int8) * scale


# ---------------------------------------------------------------- work units


def work_units(cuts: Sequence[Cut], parts: str, max_duration_s: float, unit_hours: float) -> List[Unit]:
    """All batches of `cuts`, in units of `unit_hours` of audio or a little more, the same at every call: they
    do not depend on who will do them. UserError where there are no cuts.
    """
    if not cuts:
        raise UserError(f"part {parts} has no cuts: there is nothing to label")
    units: List[Unit] = []
    filled_s = float("inf")
    for batch in batches_by_duration(cuts, max_duration_s, parts):
        if filled_s >= 3600 * unit_hours:
            units.append([])
            filled_s = 0.0
        units[-1].append(batch)
        filled_s += sum(cut.duration for cut in batch)
    return units


def cuts_sha256(cuts: Sequence[Cut]) -> str:
    """Hash of the ids and durations of the cuts to be labelled, in their order."""
    digest = hashlib.sha256()
    for cut in cuts:
        digest.update(json.dumps([cut.id, round(cut.duration, 4)]).encode())
    return digest.hexdigest()


def join_run(folder: Path, run: Dict[str, Any]) -> None:
    """Write `run` to run.json, or check that the labels there depend on the same; UserError names what
    differs.
    """
    path = folder / "run.json"
    with locked(folder):
        if not path.exists():
            write_json(path, run)
        there, here = flat(read_json(path, f"delete {folder} and label again")), flat(run)
    keys = [k for k in sorted({**there, **here}) if there.get(k) != here.get(k) and k not in _MAY_DIFFER]
    if keys:
        shown = ", ".join(f"{k}: {_short(there.get(k))} -> {_short(here.get(k))}" for k in keys)
        raise UserError(
            f"{folder} holds labels that were made otherwise ({shown}); use another --output-dir, or delete "
            "the folder"
        )


def is_done(folder: Path, k: int) -> bool:
    """Whether unit k has its labels."""
    return _unit_path(folder, k).exists()


def write_unit(folder: Path, k: int, labels: Sequence[Label], soft: bytes) -> None:
    """Keep what was found for unit k; soft: its soft file. UserError when the disk is full."""
    path = _unit_path(folder, k)
    with locked(folder):
        for leftover in path.parent.glob(f".{path.stem}.*.tmp"):  # of a killed process: no other is writing
            leftover.unlink()
        if soft:
            with atomic_write(path.with_suffix(".soft"), "wb") as f:
                f.write(soft)
        with atomic_write(path) as f:
            f.writelines(json.dumps(label, ensure_ascii=False) + "\n" for label in labels)


def read_unit(folder: Path, k: int, row_bytes: int) -> List[Label]:
    """Labels of unit k, each with the "path" of its soft file in the folder. row_bytes: of that file, 0 where
    there is none. UserError where a file is damaged.
    """
    path = _unit_path(folder, k)
    labels = read_jsonl(path, LABEL_KEYS)
    soft = path.with_suffix(".soft")
    size = row_bytes * sum(label["frames"] for label in labels)
    if size and (not soft.exists() or soft.stat().st_size != size):
        raise damaged_soft(soft)
    return [{**label, "path": f"units/{soft.name}"} for label in labels]


def _unit_path(folder: Path, k: int) -> Path:
    return folder / "units" / f"{k:05d}.jsonl"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, on whichever machine; the system frees the lock of a process that dies."""
    path = folder / ".lock"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as e:
            raise UserError(
                f"{path} cannot be locked ({e.strerror}); use an --output-dir on another disk"
            ) from e
        yield


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
