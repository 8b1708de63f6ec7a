"""The frozen set of pseudo-labels that training reads: all units of a folder, filtered (pseudo_labels.py has
the files). Filters change this step alone: other ones need no decoding.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
from lhotse import SupervisionSegment
from lhotse.cut import Cut

from transducer_kd.data.dataset import cut_text
from transducer_kd.data.manifests import read_manifest
from transducer_kd.data.pseudo_labels import (
    Label,
    is_done,
    locked,
    read_unit,
    set_sha256,
    soft_row_bytes,
)
from transducer_kd.data.validate import save_manifest
from transducer_kd.log import UserError, atomic_write, read_json, write_json

REASONS = ("empty", "confidence", "length ratio", "repetition")  # in the order in which they are tried
_PERCENTILES = (5, 25, 50, 75, 95)
_LONGEST_REPEATED = 4  # words

# From (cut id, reference words, hypothesis words) to per cent; decode/wer.py has it.
WordErrorRate = Callable[[List[Tuple[str, List[str], List[str]]]], float]


@dataclass(frozen=True)
class Filters:
    """Which labels are kept. UserError for limits that make no sense."""

    min_confidence: float = 0.5  # P(hypothesis)^(1/U)
    min_token_rate: float = 0.02  # tokens per encoder frame (40 ms)
    max_token_rate: float = 0.6
    max_repeats: int = 3  # times that the same one to four words may stand directly after each other

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
    """How many times the same one to four words stand directly after each other, at most; 1: nothing
    repeats.
    """
    most = 1
    for n in range(1, _LONGEST_REPEATED + 1):
        same = 0  # words in a row that equal the one n words before them
        for earlier, word in zip(words, words[n:]):
            same = same + 1 if word == earlier else 0
            most = max(most, 1 + same // n)
    return most


def finished_set(folder: Path, filters: Filters, refilter: bool) -> Optional[Dict[str, Any]]:
    """summary.json where the set is finished with these filters, else None. UserError where it was made with
    other ones, which only `refilter` may change, or where a soft file is damaged.
    """
    path = folder / "summary.json"
    summary = read_json(path) if path.exists() else None
    if summary is None or summary["filters"] == asdict(filters):
        if summary is not None and summary["soft"]:
            _check_soft(folder, summary["soft"])
        return summary
    if refilter:
        return None
    there, here = summary["filters"], asdict(filters)
    shown = ", ".join(f"{name}: {there[name]} -> {here[name]}" for name in here if there[name] != here[name])
    raise UserError(
        f"{folder} holds a set that is frozen with other filters ({shown}); give the same, or --refilter to "
        "make it anew. Nothing is decoded again, but phases that were trained on it have to be trained anew "
        "(local/train.py --restart)"
    )


def _check_soft(folder: Path, soft: Dict[str, Any]) -> None:
    """UserError where a soft file is damaged. Their sizes together are quick to check; if wrong, each is."""
    units = folder / "units"
    if sum(path.stat().st_size for path in units.glob("*.soft")) != soft["bytes"]:
        for path in sorted(units.glob("*.jsonl")):
            read_unit(folder, int(path.stem), soft_row_bytes(soft["dim"], soft["dtype"]))


def finish(
    folder: Path,
    fbank_dir: Path,
    num_units: int,
    filters: Filters,
    refilter: bool,
    word_error_rate: WordErrorRate,
    created_by: Dict[str, str],
) -> Optional[Dict[str, Any]]:
    """Filter the labels and write the set, once all units are there -> its summary, or None before that.

    Any number of processes may call it, one does the work. UserError where no label is kept, where a unit is
    damaged, and as finished_set raises it.
    """
    missing = sum(not is_done(folder, k) for k in range(num_units))
    if missing:
        logging.info("%d of %d units are missing: the last of the other shards ends it", missing, num_units)
        return None
    with locked(folder):
        summary = finished_set(folder, filters, refilter)
        if summary is None:
            summary = _Merge(folder, fbank_dir, num_units, filters).write(word_error_rate, created_by)
    return summary


class _Merge:
    """The cuts of all parts with their labels, and why each is dropped; lists in the parts' order."""

    def __init__(self, folder: Path, fbank_dir: Path, num_units: int, filters: Filters):
        self.folder, self.filters, self.run = folder, filters, read_json(folder / "run.json")
        self.row_bytes = soft_row_bytes(self.run["dim"], self.run["soft"])
        found = {x["id"]: x for k in range(num_units) for x in read_unit(folder, k, self.row_bytes)}
        # Not load_cuts: paths are to stay as they are.
        paths = [Path(fbank_dir) / f"cuts_{part}.jsonl.gz" for part in self.run["part"].split(",")]
        self.cuts: List[Cut] = [cut for path in paths for cut in read_manifest("cuts", path)]
        if {cut.id for cut in self.cuts} != set(found):
            raise UserError(f"{paths[0]} has other cuts than {folder}/units; delete {folder} and label again")
        self.labels = [found[cut.id] for cut in self.cuts]
        self.reasons = [filters.reason(label) for label in self.labels]

    def write(self, word_error_rate: WordErrorRate, created_by: Dict[str, str]) -> Dict[str, Any]:
        path = self.folder / "summary.json"
        earlier = read_json(path)["sha256"] if path.exists() else ""
        # First, so that nobody takes what is half the old set for finished.
        path.unlink(missing_ok=True)
        for leftover in self.folder.glob(".*.tmp"):  # of a killed process
            leftover.unlink()
        summary = {**self._summary(), "label_wer": self._label_wer(word_error_rate)}
        kept = [self._labelled(i) for i, reason in enumerate(self.reasons) if not reason]
        save_manifest(kept, self.folder / "cuts.jsonl.gz")
        with atomic_write(self.folder / "dropped.jsonl") as f:
            for label, reason in zip(self.labels, self.reasons):
                if reason:
                    numbers = {key: label[key] for key in ("confidence", "num_tokens", "frames")}
                    line = {"id": label["id"], "text": label["text"], "reason": reason, **numbers}
                    f.write(json.dumps(line, ensure_ascii=False) + "\n")
        if not kept:
            counts = ", ".join(f"{reason} {self.reasons.count(reason)}" for reason in REASONS)
            raise UserError(
                f"the filters drop all {len(self.cuts)} cuts ({counts}; see {self.folder}/dropped.jsonl); "
                "loosen them, or train the teacher further"
            )
        summary.update(sha256=set_sha256(kept), created_by=created_by)
        write_json(path, summary)
        logging.info("%s: kept the labels of %d of %d cuts", self.folder, len(kept), len(self.cuts))
        if earlier not in ("", summary["sha256"]):
            logging.warning(
                "%s is another set now (sha256 %.12s -> %.12s): train the phases anew that learnt from it",
                self.folder,
                earlier,
                summary["sha256"],
            )
        return summary

    def _labelled(self, i: int) -> Cut:
        """Cut i with its label as its only text: nothing of a reference may stay."""
        cut, label = self.cuts[i], self.labels[i]
        cut.custom = {
            "score": label["score"],
            "confidence": label["confidence"],
            "teacher_sha256": self.run["teacher"]["sha256"],
        }
        if self.row_bytes:
            offset, frames = label["soft"]
            place = {"path": label["path"], "offset": offset, "frames": frames}
            cut.custom["soft"] = {**place, "dim": self.run["dim"], "dtype": self.run["soft"]}
        recording_id = cut.recording_id if cut.has_recording or cut.has_features else cut.id
        cut.supervisions = [
            SupervisionSegment(cut.id, recording_id, 0.0, cut.duration, cut.channel, label["text"])
        ]
        return cut

    def _summary(self) -> Dict[str, Any]:
        hours = sum(cut.duration for cut in self.cuts) / 3600
        soft = None
        if self.row_bytes:
            size = self.row_bytes * sum(label["frames"] for label in self.labels)
            soft = {"dtype": self.run["soft"], "dim": self.run["dim"], "bytes": size}
            soft["mb_per_hour"] = round(size / 1e6 / hours, 3)
        # Of all labels with words, also those that are dropped: limits are chosen by them.
        confidences = [label["confidence"] for label in self.labels if label["text"].split()]
        percentiles = np.percentile(confidences or [0.0], _PERCENTILES).tolist()
        return {
            **{key: self.run[key] for key in ("teacher", "part", "method")},
            "kept": self._count(""),
            "dropped": {reason: self._count(reason) for reason in REASONS},
            "filters": asdict(self.filters),
            "soft": soft,
            "confidence_percentiles": {str(p): round(c, 4) for p, c in zip(_PERCENTILES, percentiles)},
            "seconds": round(sum(label["seconds"] for label in self.labels), 2),
            "audio_s": round(3600 * hours, 2),
        }

    def _count(self, reason: str) -> Dict[str, float]:
        seconds = [cut.duration for cut, other in zip(self.cuts, self.reasons) if other == reason]
        return {"cuts": len(seconds), "hours": round(sum(seconds) / 3600, 4)}

    def _label_wer(self, word_error_rate: WordErrorRate) -> Optional[Dict[str, Optional[float]]]:
        """Of the cuts that have a reference; for information, nothing is chosen by it."""
        rates = {}
        for name, reasons in (("all", ("", *REASONS)), ("kept", ("",))):
            triples = [
                (cut.id, cut_text(cut).split(), label["text"].split())
                for cut, label, reason in zip(self.cuts, self.labels, self.reasons)
                if reason in reasons and cut_text(cut).split()
            ]
            rates[name] = round(word_error_rate(triples), 3) if triples else None
        return rates if rates["all"] is not None else None


def table(summary: Dict[str, Any]) -> str:
    """What was kept and dropped, for the terminal."""
    rows = [("kept", summary["kept"]), *summary["dropped"].items()]
    total = sum(count["cuts"] for _, count in rows)
    lines = [f"{'labels of ' + summary['part']:24}  {'cuts':>8}  {'share':>7}  {'hours':>9}"]
    for name, count in rows:
        share = f"{100 * count['cuts'] / total:.1f} %"
        lines.append(f"{name:24}  {count['cuts']:8d}  {share:>7}  {count['hours']:9.2f}")
    return "\n".join(lines)
