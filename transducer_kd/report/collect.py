"""Reads what the phases of one experiment folder left behind and checks it: only this knows the files, and
exports.py those of what was exported.

    <recipe>/exp/<corpus>-<scale>/stages.jsonl               {"stage", "name", "seconds"} a line
    <recipe>/exp/<corpus>-<scale>/<phase>/metrics.json       list of decoding records, see RECORD_FIELDS
                                         /train_log.jsonl    {"kind": "train"|"valid", "step", ...} a line
                                         /config.json        resolved configuration
                                         /meta.json          commit, command, versions, parameter counts,
                                                             where first weights and teacher are from
                                         /.done              last line "ended <unix time>", from run.sh
                                         /delay.json         emission delay, from local/emission_delay.py
                                         /speed.json         of the encoder, from local/measure_speed.py
                                         /export/            model for the device, see exports.py
    <recipe>/exp/<corpus>-<scale>/beside.json                what stage 7 measured of other recipes' models
    <recipe>/exp/<corpus>-<scale>/labels/<phase>/summary.json   pseudo-labels, from local/pseudo_label.py
    <recipe>/exp/<corpus>-<scale>/init/                         first weights of phases

The result is one plain dict, which is also what report.json holds:

    {"recipe", "corpus", "scale", "is_synthetic",
     "phases":  [{"name", "params_deployed", "config", "meta", "ended", "training": {...} or None,
                  "delay", "speed", "export": {...} or None, and what phases.arrange and checks add: "role",
                  "teacher", "control_of", "compare_with", "has_las", "what", "begins_with", "is_selected",
                  "is_extracted", "learns_from", "label_set", "labelled_by", "is_stale", "is_unlike"}],
     "labels":  [{"name", "labelled_by", "summary": {...} or None}],
     "records": [record, ...],              every decoding of every phase, phases in the order above
     "beside":  {recipe/phase: {...}},      like "export": other recipes' models, measured with these
     "comparisons": [],                     paired ones, put here by who can make them (decode/compare.py)
     "stages":  [{"stage", "name", "seconds"}],
     "corpus_summary": {...} or None,       corpus.json of the synthetic corpus
     "machine": {"cpu", "cores", "memory_gb"},
     "missing": ["phase x has not been decoded ...", ...]}

A missing file is named under "missing"; a damaged one raises UserError.
"""

import math
import os
import platform
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from transducer_kd.log import UserError, read_json, read_jsonl
from transducer_kd.report import checks, exports
from transducer_kd.report.fields import Maybe, check
from transducer_kd.report.phases import arrange, is_extracted, is_pretraining

# Of a record, see fields.check. Anything else that it holds is kept as it is.
RECORD_FIELDS: Dict[str, Any] = {
    "recipe": str,
    "corpus": str,
    "scale": str,
    "phase": str,
    "mode": str,
    "params_deployed": int,
    "bytes": int,
    "test_set": str,
    "method": str,
    "wer": float,
    "wer_low": float,
    "wer_high": float,
    "errors": int,
    "ref_words": int,
    "audio_s": float,
    "decode_s": float,
    "commit": str,
    "command": str,
    "second_pass_s": Maybe(float),
    "recogs": Maybe(str),
    "index_bytes": Maybe(int),
    "params_dense": Maybe(int),
    "params_layers": Maybe(int),
}

_NO_PHASES = ("init", "labels", "log")
_OF_SPEED = ("chunk_ms_median", "chunk_ms_p95", "times_faster")  # null where there is none
_OF_DELAY = ("mean_frames", "low", "high", "median_frames", "tokens", "utterances")
_MAX_CURVE_POINTS = 400  # a figure shows no more, and report.html stays small


def collect(exp_dir: Path, corpus_json: Optional[Path] = None) -> Dict[str, Any]:
    """Everything known about the experiments in `exp_dir` (`<recipe>/exp/<corpus>-<scale>`).

    corpus_json: the synthetic corpus's description; by default looked for beside the features trained on.
    Raises UserError when there is nothing to report, or a file is damaged (it names the file).
    """
    exp_dir = Path(exp_dir).absolute()
    if not exp_dir.is_dir():
        raise UserError(f"{exp_dir} is not a folder; expected <recipe>/exp/<corpus>-<scale>")
    folders = [p for p in sorted(exp_dir.iterdir()) if _is_phase(p)]
    if not folders:
        raise UserError(
            f"{exp_dir} holds no phase (folder with config.json or metrics.json); train one first"
        )
    missing: List[str] = []
    phases, records = [], []
    for folder in folders:
        phase = _read_phase(folder, missing)
        own = read_records(folder / "metrics.json")
        if not own and not is_pretraining(phase):
            missing.append(f"phase {folder.name} has not been decoded (no metrics.json)")
        if phase["params_deployed"] is None:
            # A method that leaves the second pass out deploys less than the phase holds.
            phase["params_deployed"] = max((r["params_deployed"] for r in own), default=None)
        phase["export"], gaps = exports.read_export(folder, phase["ended"], own)
        missing += gaps
        phases.append(phase)
        records.extend({**record, "phase": folder.name} for record in own)
    labels = _read_label_sets(exp_dir / "labels", missing)
    phases = arrange(phases, exp_dir, labels)
    order = [p["name"] for p in phases]
    records.sort(key=lambda r: order.index(r["phase"]))
    stages = _read_stages(exp_dir / "stages.jsonl", order)
    if not stages:
        missing.append("stage times (no stages.jsonl: the stages were not run by run.sh)")
    missing += (
        checks.mark_stale(phases, stages, labels) + checks.mark_unlike(phases) + checks.not_there(phases)
    )
    beside: Dict[str, Dict[str, Any]] = {}
    if exports.current(phases):
        beside, gaps = exports.read_beside(exp_dir)
        missing += gaps
    corpus, scale = _corpus_and_scale(exp_dir.name, phases, records)
    summary = _read_corpus(corpus_json, phases)
    is_synthetic = corpus.startswith("synthetic")
    if is_synthetic and summary is None:
        missing.append("the description of the synthetic corpus (corpus.json)")
    return {
        "recipe": exp_dir.parent.parent.name,
        "corpus": corpus,
        "scale": scale,
        "is_synthetic": is_synthetic,
        "phases": phases,
        "labels": labels,
        "records": records,
        "comparisons": [],
        "beside": beside,
        "stages": stages,
        "corpus_summary": summary,
        "machine": machine(),
        "missing": missing,
    }


def read_records(path: Path) -> List[Dict[str, Any]]:
    """The decoding records of one phase, [] where there is no file. UserError names a bad file and field."""
    if not path.exists():
        return []
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: expected a list of records; move it away and decode again")
    for number, record in enumerate(records, 1):
        check(record, RECORD_FIELDS, f"{path}: record {number}", "decode again")
    return records


def machine() -> Dict[str, Any]:
    """Processor, cores this process may use, memory in GB. No host name: reports are published."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass  # not Linux
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory_gb = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    except (ValueError, OSError):
        memory_gb = None
    return {"cpu": cpu, "cores": cores, "memory_gb": memory_gb}


def _is_aside(folder: Path) -> bool:
    """Whether --restart (of run.sh: --force) moved it there, or it is only half made."""
    return ".old-" in folder.name or folder.name.startswith(".")


def _is_phase(folder: Path) -> bool:
    if not folder.is_dir() or _is_aside(folder) or folder.name in _NO_PHASES:
        return False
    return (folder / "config.json").exists() or (folder / "metrics.json").exists()


def _corpus_and_scale(folder: str, phases: List[Dict], records: List[Dict]) -> Tuple[str, str]:
    """As the records or the configurations name them; from the folder's name where there are none."""
    for known in [*records, *(p["config"] for p in phases if p["config"])]:
        if isinstance(known.get("corpus"), str) and isinstance(known.get("scale"), str):
            return known["corpus"], known["scale"]
    corpus, _, scale = folder.rpartition("-")
    return corpus, scale


def _read_phase(folder: Path, missing: List[str]) -> Dict[str, Any]:
    found: Dict[str, Any] = {"name": folder.name, "params_deployed": None}
    for name in ("config", "meta"):
        path = folder / f"{name}.json"
        found[name] = read_json(path) if path.exists() else None
        if found[name] is None:
            missing.append(f"{path.name} of phase {folder.name}")
        elif not isinstance(found[name], dict):
            raise UserError(f"{path}: expected an object")
    parameters = (found["meta"] or {}).get("parameters")
    if isinstance(parameters, dict):
        found["params_deployed"] = parameters.get("deployed")
    found["ended"] = _ended(folder / ".done")
    found["delay"] = _read_delay(folder / "delay.json")
    found["speed"] = _read_speed(folder / "speed.json")
    lines = read_jsonl(folder / "train_log.jsonl", ("kind", "step"))
    found["training"] = _training(lines)
    if not (lines or is_extracted(found, folder)):
        missing.append(f"the training log of phase {folder.name} (no train_log.jsonl)")
    return found


def _read_delay(path: Path) -> Optional[Dict[str, Any]]:
    if not path.exists():
        return None
    delay = read_json(path)
    try:
        _numbers(delay, "frame_ms")
        for part in delay["parts"].values():
            _numbers(part, *_OF_DELAY)
        reference = delay["reference"]["phase"]
        if not isinstance(reference, str) or not isinstance(delay["mode"], str):
            raise TypeError
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not what local/emission_delay.py writes; run it again") from None
    return delay


def _read_speed(path: Path) -> Optional[Dict[str, Any]]:
    if not path.exists():
        return None
    speed = read_json(path)
    try:
        _numbers(speed, "num_threads", "audio_s")
        for timing in speed["modes"].values():
            measured = [name for name in _OF_SPEED if timing[name] is not None]
            _numbers(timing, "rtf", *measured)
        if not isinstance(speed["reference"], str):
            raise TypeError
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: not what local/measure_speed.py writes; run it again") from None
    return speed


def _read_label_sets(folder: Path, missing: List[str]) -> List[Dict[str, Any]]:
    found = []
    for place in sorted(folder.iterdir() if folder.is_dir() else []):
        if not place.is_dir() or _is_aside(place):
            continue
        path = place / "summary.json"
        summary = read_json(path) if path.exists() else None
        if summary is None:
            missing.append(f"pseudo-labels of {place.name}, which are not finished (no summary.json)")
        else:
            try:
                for count in (summary["kept"], *summary["dropped"].values()):
                    _numbers(count, "cuts", "hours")
            except (TypeError, KeyError, AttributeError):
                raise UserError(f"{path}: not what local/pseudo_label.py writes; run it again") from None
        found.append({"name": place.name, "summary": summary})
    return found


def _numbers(tree: Dict[str, Any], *names: str) -> None:
    """TypeError or KeyError unless `tree` has numbers of these names."""
    for name in names:
        if not isinstance(tree[name], (int, float)) or isinstance(tree[name], bool):
            raise TypeError(name)


def _ended(mark: Path) -> Optional[float]:
    """The time in the last line of run.sh's mark; None where it did not end the training."""
    lines = mark.read_text(encoding="utf-8").splitlines() if mark.exists() else []
    found = re.fullmatch(r"ended (\d+(?:\.\d+)?)", lines[-1]) if lines else None
    return float(found[1]) if found else None


def _training(lines: List[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    """What a training log says: its length, its speed, its last validation and its curves."""
    train = [line for line in lines if line["kind"] == "train"]
    valid = [line for line in lines if line["kind"] == "valid"]
    if not train:
        return None
    audio_s = elapsed_s = 0.0
    for line in train:
        # A throughput is that of the window which its line closes, so it is weighted by the window's length.
        window_s = max(line.get("elapsed_s", 0.0) - elapsed_s, 0.0)
        audio_s += line.get("audio_s_per_s", 0.0) * window_s
        elapsed_s += window_s
    return {
        "updates": train[-1]["step"],
        "epochs": train[-1].get("epoch"),
        "elapsed_s": elapsed_s,
        "audio_s_per_s": audio_s / elapsed_s if elapsed_s else None,
        "last_valid": valid[-1] if valid else None,
        "train_curve": _thinned(train),
        "valid_curve": _thinned(valid),
    }


def _thinned(lines: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    step = max(math.ceil(len(lines) / _MAX_CURVE_POINTS), 1)
    # From the end, so that the last point is always there.
    return lines[::-1][::step][::-1]


def _read_stages(path: Path, phases: List[str]) -> List[Dict[str, Any]]:
    """The last time of every step: one that was run again replaces its earlier line.

    A stage may have several steps (6: decoding of each phase, then the report), which differ by name. What a
    recipe once called otherwise is the same step, "decode" for one that is now "decode teacher"; but the name
    of a phase is always that of its training.
    """
    latest: Dict[str, Dict[str, Any]] = {}
    for line in read_jsonl(path, ("stage", "name", "seconds")):
        words = set(str(line["name"]).split())
        for name, other in list(latest.items()):
            earlier = set(name.split())
            is_same = other["stage"] == line["stage"] and (earlier < words or words < earlier)
            if is_same and not {name, line["name"]} & set(phases):
                del latest[name]
        latest[str(line["name"])] = line
    return sorted(latest.values(), key=lambda line: (len(str(line["stage"])), str(line["stage"])))


def _read_corpus(path: Optional[Path], phases: List[Dict[str, Any]]) -> Optional[Dict[str, Any]]:
    if path is None:
        # <data>/fbank and <data>/download/LibriSpeech/corpus.json have the same parent.
        folders = [((p["config"] or {}).get("data") or {}).get("fbank_dir") for p in phases]
        candidates = [Path(f).parent / "download" / "LibriSpeech" / "corpus.json" for f in folders if f]
        path = next((c for c in candidates if c.exists()), None)
    if path is None:
        return None
    summary = read_json(Path(path))
    if not isinstance(summary, dict) or not isinstance(summary.get("parts"), dict):
        raise UserError(f"{path}: expected an object with parts")
    return summary
