"""Pseudo-labels: what a teacher heard in a part without transcripts, kept so that many machines can share the
work, a killed job loses at most the unit it was in, and every arm of a comparison trains on the same set.

    run.json                what the labels depend on; a job with other settings is refused
    units/<k>.jsonl         a line for each cut of work unit k, written last: the unit is done
    units/<k>.soft          the teacher's encoder_out of these cuts, where it is stored (soft_targets.py)
    cuts.jsonl.gz           the cuts that the filters keep, with their labels as text: the frozen set
    dropped.jsonl           the others, each with the first reason that drops it
    summary.json            counts, hours, filters, size; written last: the set is finished

A line of a unit: {"id", "text", "num_tokens", "score", "confidence", "frames", "soft", "seconds"}. score is the
log-probability of the best hypothesis, confidence exp(score / num_tokens), the geometric mean of a token's
probability; frames is T'; soft is [offset in bytes, T'] or null; seconds is the cut's share of its batch's time.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from lhotse import SupervisionSegment
from lhotse.cut import Cut

from transducer_kd.data.dataset import batches_by_duration, cut_text
from transducer_kd.data.manifests import read_manifest
from transducer_kd.data.soft_targets import label_again, soft_row_bytes
from transducer_kd.data.validate import save_manifest
from transducer_kd.log import UserError, atomic_write, read_jsonl, write_json

REASONS = ("empty", "confidence", "length ratio", "repetition")  # in the order in which they are tried
_KEYS = ("id", "text", "num_tokens", "score", "confidence", "frames", "soft", "seconds")
_PERCENTILES = (5, 25, 50, 75, 95)
_LONGEST_REPEATED = 4  # words
# Whose weights these are is known by their hash.
_MAY_DIFFER = ("teacher.path", "teacher.checkpoint")

Label = Dict[str, Any]  # a line of a unit
Unit = List[List[Cut]]  # batches


@dataclass(frozen=True)
class Filters:
    """Which labels are kept. UserError for limits that make no sense."""

    min_confidence: float = 0.5
    min_token_rate: float = 0.02  # tokens per encoder frame (40 ms)
    max_token_rate: float = 0.6
    max_repeats: int = 3  # times that one to four words may stand directly after each other

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"--min-confidence {self.min_confidence} must be from 0 to 1")
        if not 0 <= self.min_token_rate <= self.max_token_rate:
            raise UserError(
                f"--min-token-rate {self.min_token_rate} must be 0 or more, and --max-token-rate "
                f"{self.max_token_rate} no less than that"
            )
        if self.max_repeats < 1:
            raise UserError(f"--max-repeats {self.max_repeats} must be 1 or more")

    def reason(self, label: Label) -> str:
        """The first of REASONS that drops `label`; "" where it is kept."""
        words = label["text"].split()
        if not words:
            return "empty"
        if label["confidence"] < self.min_confidence:
            return "confidence"
        if not self.min_token_rate <= label["num_tokens"] / label["frames"] <= self.max_token_rate:
            return "length ratio"
        return "repetition" if most_repeats(words) > self.max_repeats else ""


def most_repeats(words: Sequence[str]) -> int:
    """How many times one to four words stand directly after each other, at most: 1 where nothing repeats."""
    most = 1
    for n in range(1, _LONGEST_REPEATED + 1):
        same = 0  # words in a row that equal the one n words before them
        for earlier, word in zip(words, words[n:]):
            same = same + 1 if word == earlier else 0
            most = max(most, 1 + same // n)
    return most


# ---------------------------------------------------------------- work units


def work_units(cuts: Sequence[Cut], part: str, max_duration_s: float, unit_hours: float) -> List[Unit]:
    """All batches of a part in units of at least `unit_hours` of audio but for the last, the same at every
    call: they do not know who will do them. UserError for a part without cuts.
    """
    if not cuts:
        raise UserError(f"part {part} has no cuts: there is nothing to label")
    units: List[Unit] = []
    filled_s = float("inf")
    for batch in batches_by_duration(cuts, max_duration_s, part):
        if filled_s >= 3600 * unit_hours:
            units.append([])
            filled_s = 0.0
        units[-1].append(batch)
        filled_s += sum(cut.duration for cut in batch)
    return units


def cuts_sha256(cuts: Sequence[Cut]) -> str:
    """Hash of the ids and durations of a part's cuts, in their order."""
    digest = hashlib.sha256()
    for cut in cuts:
        digest.update(json.dumps([cut.id, round(cut.duration, 4)]).encode())
    return digest.hexdigest()


def join_run(folder: Path, run: Dict[str, Any]) -> None:
    """Write `run` to run.json, or check that the labels there depend on the same. UserError that names what
    differs.
    """
    path = folder / "run.json"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if not path.exists():
            return write_json(path, run)
        there, here = _flat(_read_json(path)), _flat(run)
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
    """Keep what was found for unit k; soft: its soft file, b"" where there is none. UserError when the disk is
    full.
    """
    path = _unit_path(folder, k)
    for leftover in path.parent.glob(f".{path.stem}.*.tmp"):  # of a killed process
        leftover.unlink()
    if soft:
        with atomic_write(path.with_suffix(".soft"), "wb") as f:
            f.write(soft)
    with atomic_write(path) as f:
        f.writelines(json.dumps(label, ensure_ascii=False, allow_nan=False) + "\n" for label in labels)


def _unit_path(folder: Path, k: int) -> Path:
    return folder / "units" / f"{k:05d}.jsonl"


# ---------------------------------------------------------------- the set


def finished_set(folder: Path, filters: Filters, refilter: bool) -> Optional[Dict[str, Any]]:
    """summary.json where the set is finished with these filters, else None. UserError where it was made with
    other ones, which only `refilter` may change.
    """
    path = folder / "summary.json"
    summary = _read_json(path) if path.exists() else None
    if summary is None or summary["filters"] == asdict(filters):
        return summary
    if refilter:
        return None
    shown = ", ".join(
        f"{name}: {summary['filters'].get(name)} -> {value}"
        for name, value in asdict(filters).items()
        if summary["filters"].get(name) != value
    )
    raise UserError(
        f"{folder} holds a set frozen with other filters ({shown}), which models may have been trained on; "
        "give the same filters, or --refilter to make it again (nothing is decoded again)"
    )


def finish(
    folder: Path,
    fbank_dir: Path,
    num_units: int,
    filters: Filters,
    refilter: bool,
    created_by: Dict[str, str],
    word_error_rate: Callable[[List[Tuple[str, List[str], List[str]]]], float],
) -> Optional[Dict[str, Any]]:
    """Apply the filters and write the set -> its summary; None while units are missing.

    Any number of processes may call it, one does the work. word_error_rate: of (cut id, reference words,
    hypothesis words), in per cent. UserError where no label is kept, and for what finished_set refuses.
    """
    missing = sum(not is_done(folder, k) for k in range(num_units))
    if missing:
        logging.info("%d of %d units are missing yet: the set waits for other shards", missing, num_units)
        return None
    with _locked(folder):
        summary = finished_set(folder, filters, refilter)
        if summary is None:
            summary = _Merge(folder, fbank_dir, num_units, filters).write(created_by, word_error_rate)
    return summary


class _Merge:
    """All units of a set with its part's cuts; holds everything in the part's order."""

    def __init__(self, folder: Path, fbank_dir: Path, num_units: int, filters: Filters):
        self.folder, self.filters = folder, filters
        self.run = _read_json(folder / "run.json")
        self.dtype = self.run["soft"] if self.run["soft"] != "none" else None
        labels = {label["id"]: label for k in range(num_units) for label in self._unit(k)}
        path = Path(fbank_dir) / f"cuts_{self.run['part']}.jsonl.gz"
        self.cuts: List[Cut] = read_manifest("cuts", path)  # not load_cuts: paths stay relative
        if sorted(cut.id for cut in self.cuts) != sorted(labels):
            raise UserError(f"{path} has other cuts than {folder}/units; delete {folder} and label again")
        self.labels = [labels[cut.id] for cut in self.cuts]
        self.references = [cut_text(cut).split() for cut in self.cuts]
        self.reasons = [filters.reason(label) for label in self.labels]

    def _unit(self, k: int) -> List[Label]:
        path = _unit_path(self.folder, k)
        labels = read_jsonl(path, _KEYS)
        if self.dtype:
            soft = path.with_suffix(".soft")
            needed = soft_row_bytes(self.run["dim"], self.dtype) * sum(label["frames"] for label in labels)
            if (soft.stat().st_size if soft.exists() else 0) != needed:
                raise UserError(
                    f"{soft} has not the {needed} bytes that its labels need; {label_again(soft)}"
                )
        return [{**label, "unit": path.stem} for label in labels]

    def write(self, created_by: Dict[str, str], word_error_rate: Callable) -> Dict[str, Any]:
        # First, so that nobody takes a set that is half the old one for finished.
        (self.folder / "summary.json").unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.tmp"):  # of a killed process
            leftover.unlink()
        found = list(zip(self.cuts, self.labels, self.reasons))
        with atomic_write(self.folder / "dropped.jsonl") as f:
            for cut, label, reason in found:
                if reason:
                    line = {"id": cut.id, "text": label["text"], "reason": reason}
                    numbers = {k: label[k] for k in ("confidence", "num_tokens", "frames")}
                    f.write(json.dumps({**line, **numbers}, ensure_ascii=False) + "\n")
        kept = [self._labelled(cut, label) for cut, label, reason in found if not reason]
        save_manifest(kept, self.folder / "cuts.jsonl.gz")
        if not kept:
            counts = ", ".join(f"{reason}: {self.reasons.count(reason)}" for reason in REASONS)
            raise UserError(
                f"the filters drop all {len(found)} cuts ({counts}; see {self.folder}/dropped.jsonl); loosen "
                "them, or train the teacher further"
            )
        summary = {**self._summary(word_error_rate), "sha256": _set_sha256(kept), "created_by": created_by}
        write_json(self.folder / "summary.json", summary)
        return summary

    def _labelled(self, cut: Cut, label: Label) -> Cut:
        """The cut with its label as its only text: nothing of a reference may stay."""
        custom = {
            "score": label["score"],
            "confidence": label["confidence"],
            "teacher_sha256": self.run["teacher"]["sha256"],
        }
        if self.dtype:
            offset, frames = label["soft"]
            custom["soft"] = {"path": f"units/{label['unit']}.soft", "offset": offset, "frames": frames}
            custom["soft"].update(dim=self.run["dim"], dtype=self.dtype)
        old = cut.supervisions[0] if cut.supervisions else None
        cut.supervisions = [
            SupervisionSegment(
                id=old.id if old else cut.id,
                recording_id=cut.recording_id if cut.has_recording else cut.id,
                start=old.start if old else 0.0,
                duration=old.duration if old else cut.duration,
                channel=cut.channel,
                text=label["text"],
                speaker=old.speaker if old else None,
            )
        ]
        cut.custom = custom
        return cut

    def _summary(self, word_error_rate: Callable) -> Dict[str, Any]:
        hours = sum(cut.duration for cut in self.cuts) / 3600
        soft = None
        if self.dtype:
            row_bytes = soft_row_bytes(self.run["dim"], self.dtype)
            size = row_bytes * sum(label["frames"] for label in self.labels)
            soft = {"dtype": self.dtype, "dim": self.run["dim"], "bytes": size}
            soft["mb_per_hour"] = round(size / 1e6 / hours, 3)
        percentiles = np.percentile([label["confidence"] for label in self.labels], _PERCENTILES)
        return {
            "teacher": self.run["teacher"],
            "part": self.run["part"],
            "method": self.run["method"],
            "kept": self._count(""),
            "dropped": {reason: self._count(reason) for reason in REASONS},
            "filters": asdict(self.filters),
            "soft": soft,
            # Of all labels, those dropped too: filters are chosen by them.
            "confidence_percentiles": {str(p): round(float(v), 4) for p, v in zip(_PERCENTILES, percentiles)},
            "label_wer": self._label_wer(word_error_rate),
            "seconds": round(sum(label["seconds"] for label in self.labels), 2),
            "audio_s": round(3600 * hours, 2),
        }

    def _count(self, reason: str) -> Dict[str, float]:
        seconds = [cut.duration for cut, other in zip(self.cuts, self.reasons) if other == reason]
        return {"cuts": len(seconds), "hours": round(sum(seconds) / 3600, 4)}

    def _label_wer(self, word_error_rate: Callable) -> Optional[Dict[str, Optional[float]]]:
        """None where the part has no references."""
        utterances = [
            (cut.id, words, label["text"].split())
            for cut, words, label in zip(self.cuts, self.references, self.labels)
        ]
        kept = [u for u, reason in zip(utterances, self.reasons) if not reason]
        if not any(words for _, words, _ in utterances):
            return None
        has_words = any(words for _, words, _ in kept)
        return {
            "all": round(word_error_rate(utterances), 3),
            "kept": round(word_error_rate(kept), 3) if has_words else None,
        }


def load_pseudo_labels(folder: Path, fbank_dir: Path) -> List[Cut]:
    """The cuts of a finished set, each with one supervision, whose text is the label.

    As in load_cuts, relative paths of features are in fbank_dir. cut.custom has score, confidence,
    teacher_sha256 and, where the teacher is stored, soft, with a path that can be opened: for
    soft_targets.read_soft_targets. UserError where the set is not finished, or not the one that summary.json describes.
    """
    folder, fbank_dir = Path(folder), Path(fbank_dir)
    path = folder / "summary.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: no finished labels; run local/pseudo_label.py (every shard)")
    cuts: List[Cut] = read_manifest("cuts", folder / "cuts.jsonl.gz")
    if _set_sha256(cuts) != _read_json(path)["sha256"]:
        raise UserError(
            f"{folder}/cuts.jsonl.gz is not the set of its summary.json; delete both and run "
            "local/pseudo_label.py again"
        )
    for cut in cuts:
        if cut.has_features:
            cut.features.storage_path = str(fbank_dir / cut.features.storage_path)
        if "soft" in cut.custom:
            cut.custom["soft"]["path"] = str(folder / cut.custom["soft"]["path"])
    return cuts


def table(summary: Dict[str, Any]) -> str:
    """What was kept and dropped, for the terminal."""
    rows = [("kept", summary["kept"]), *summary["dropped"].items()]
    total = sum(count["cuts"] for _, count in rows)
    lines = [f"{'labels of ' + summary['part']:24}  {'cuts':>8}  {'share':>7}  {'hours':>9}"]
    for name, count in rows:
        share = f"{100 * count['cuts'] / total:.1f} %"
        lines.append(f"{name:24}  {count['cuts']:8d}  {share:>7}  {count['hours']:9.2f}")
    return "\n".join(lines)


def _set_sha256(cuts: Sequence[Cut]) -> str:
    digest = hashlib.sha256()
    for cut in cuts:
        digest.update(json.dumps([cut.id, cut_text(cut)]).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, on whichever machine; the system frees the lock of a process that dies."""
    path = folder / ".lock"
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX)
        except OSError as e:
            raise UserError(
                f"{path} cannot be locked ({e.strerror}); put --output-dir on a disk that can"
            ) from e
        yield


def _read_json(path: Path) -> Dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON; delete {path.parent} and label again") from None


def _flat(tree: Dict[str, Any], prefix: str = "") -> Dict[str, Any]:
    out: Dict[str, Any] = {}
    for key, value in tree.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)
