"""What stage 7 leaves behind in the folder of a phase, read and checked; device.py makes tables of it.

<phase>/export/model.json    which weights, and the files of the model folder with their bytes
               /gate.json    what the parity gate found: PyTorch against sherpa-onnx, float and int8
               /bench.json   sizes, real-time factors, latencies and memory of one run of the benchmark
beside.json                  what that run measured of other recipes' models, and where these are
"""

import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from transducer_kd.log import UserError, read_json
from transducer_kd.report.fields import Maybe, check

_MEND = "run stage 7 again"
_ORIGIN = {"commit": str, "command": str}
_FILES = {str: {"bytes": int, "sha256": str}}
_MODEL = {
    **_ORIGIN,
    "checkpoint": str,
    "files": _FILES,
    "int8": Maybe({"relaxed": [{"module": str, "how": str}]}),
}
_WORDS = {
    "mode": str,
    "implementation": str,
    "two_pass": bool,
    "test_set": str,
    "num_utts": int,
    "identical_share": Maybe(float),
    "wer": float,
    "wer_low": float,
    "wer_high": float,
    "wer_difference": Maybe(float),
    "passed": Maybe(bool),
}
_TENSORS = {
    "part": str,
    "output": str,
    "max_difference": Maybe(float),  # null where an output has another shape, or is not finite
    "starts_at": Maybe(str),
    "passed": bool,
}
_ODD = {"mode": str, "input": str, "words": {str: Maybe(str)}, "same": bool, "passed": bool}
_GATE = {
    **_ORIGIN,
    "passed": bool,
    "runtime": str,
    "least_identical": float,
    "most_worse": float,
    "least_same_unseen": float,
    "tensors": [_TENSORS],
    "words": [_WORDS],
    "odd": [_ODD],
}
_MINUTE = {"resident_mb": float, "chunk_ms_median": float, "chunk_ms_p95": float}
_TIMING = {
    "precision": str,
    "mode": str,
    "bytes": int,
    "rtf": float,
    "rtf_model": Maybe(float),
    "times_faster": Maybe(float),
    "times_faster_model": Maybe(float),
    "times_smaller": Maybe(float),
    "chunk_ms_median": Maybe(float),
    "chunk_ms_p95": Maybe(float),
    "baseline_mb": Maybe(float),
    "peak_mb": Maybe(float),
    "first_minute": Maybe(_MINUTE),
    "last_minute": Maybe(_MINUTE),
}
RUN = {  # what is the same for all that one run of the benchmark measured
    **_ORIGIN,
    "reference": str,
    "num_threads": int,
    "runtime": str,
    "turns": int,
    "audio_s": float,
    "stream_s": float,
}
_MEASURED = {"checkpoint": str, "rows": [_TIMING]}
_BENCH = {**RUN, **_MEASURED}
_BESIDE = {**RUN, "models": [{"name": str, "folder": str, "files": _FILES, **_MEASURED}]}


def read_export(
    phase_folder: Path, ended: Optional[float], decoded: Sequence[Dict[str, Any]]
) -> Tuple[Optional[Dict[str, Any]], List[str]]:
    """What was exported of a phase, and a sentence for each thing that is missing of it.

    ended: when run.sh's training of the phase ended, None where that is not known. decoded: its records.
    Returns None where nothing was exported, else {"model", "gate", "bench", "is_stale"}: what the three files
    hold (gate and bench None where they are missing, bench also where it is of another export), and whether
    the export has other weights than the phase now. Raises UserError that names a damaged file and its field.
    """
    name, folder = phase_folder.name, phase_folder / "export"
    if not folder.is_dir():
        return None, []
    if not (folder / "model.json").exists():
        return None, [f"the export of phase {name}, which is not finished (no model.json): {_MEND}"]
    export: Dict[str, Any] = {
        "model": _read(folder / "model.json", _MODEL),
        "gate": _read(folder / "gate.json", _GATE),
        "bench": _read(folder / "bench.json", _BENCH),
    }
    why = _why_stale(phase_folder, export["model"]["checkpoint"], ended, decoded)
    export["is_stale"] = why is not None
    if why:
        return export, [f"the export of phase {name} is stale and left out: {why}; {_MEND}"]
    gaps = []
    if export["gate"] is None:
        gaps.append(f"the parity gate of the export of phase {name} (no gate.json): {_MEND}")
    if export["bench"] is None:
        gaps.append(f"the benchmark of the export of phase {name} (no bench.json): {_MEND}")
    elif not _is_of(export["bench"], export["model"]):
        export["bench"] = None
        gaps.append(f"the benchmark of the export of phase {name}, which is of another export: {_MEND}")
    return export, gaps


def current(phases: Sequence[Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """{phase: what was exported of it}, without stale exports and those of stale phases."""
    exported = [p for p in phases if p["export"] and not p["is_stale"]]
    return {p["name"]: p["export"] for p in exported if not p["export"]["is_stale"]}


def read_beside(exp_dir: Path) -> Tuple[Dict[str, Dict[str, Any]], List[str]]:
    """Other recipes' models that were measured with those of `exp_dir`, and a sentence for each that is gone,
    another by now, or damaged.

    Returns {recipe/phase: {"model", "gate", "bench"}}, as read_export gives them, of those exports that are
    still what was measured. Raises UserError where beside.json itself is damaged.
    """
    run = _read(exp_dir / "beside.json", _BESIDE)
    if run is None:
        return {}, []
    about = {name: run[name] for name in RUN}
    found, gaps = {}, []
    for measured in run["models"]:
        name, folder = measured["name"], Path(os.path.normpath(exp_dir / measured["folder"]))
        try:
            model, gate = _read(folder / "model.json", _MODEL), _read(folder / "gate.json", _GATE)
        except UserError as error:  # another recipe's
            gaps.append(f"{name}, which was measured beside these: {error} of that recipe")
            continue
        if model is None or model["files"] != measured["files"]:
            gaps.append(f"{name}, which was measured beside these and is another or gone by now: {_MEND}")
            continue
        bench = {**about, **{field: measured[field] for field in _MEASURED}}
        found[name] = {"model": model, "gate": gate, "bench": bench}
    return found, gaps


def size(
    files: Dict[str, Dict[str, Any]], mode: str, precision: str, with_las: bool = False
) -> Optional[int]:
    """Bytes of all that runs; None where a part is not in the folder. files: as model.json has them."""
    parts = [f"encoder-{mode}", "decoder", "joiner", *(["las"] if with_las else [])]
    names = [f"{part}{'' if precision == 'float' else f'.{precision}'}.onnx" for part in parts]
    return None if set(names) - set(files) else sum(files[name]["bytes"] for name in names)


def _read(path: Path, wanted: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    if not path.exists():
        return None
    found = read_json(path, _MEND)
    check(found, wanted, str(path), _MEND)
    return found


def _why_stale(
    phase_folder: Path, checkpoint: str, ended: Optional[float], decoded: Sequence[Dict[str, Any]]
) -> Optional[str]:
    written = (phase_folder / "export" / "model.json").stat().st_mtime
    log = phase_folder / "train_log.jsonl"
    if ended is None and log.exists():  # trained by hand, or being trained
        ended = log.stat().st_mtime
    if ended is not None and ended > written:
        return f"{phase_folder.name} was trained again after it"
    known = sorted({r["checkpoint"] for r in decoded if "checkpoint" in r})
    if known and checkpoint not in known:
        return f"it holds {checkpoint}, and decoded was {', '.join(known)}"
    return None


def _is_of(bench: Dict[str, Any], model: Dict[str, Any]) -> bool:
    """Whether these are the files that were measured."""
    return bench["checkpoint"] == model["checkpoint"] and all(
        row["bytes"] == size(model["files"], row["mode"], row["precision"]) for row in bench["rows"]
    )
