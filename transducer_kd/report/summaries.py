"""What a recipe set out to show: tables of their own, each there where a report has something for it.

Soft against hard targets are in targets.py. Here are the modes of models that stream with a part of their
weights: what is left out, what is stored, and what it costs in errors beside a dense model of the same mode.
Which phase is what is read from configurations, never from names.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from transducer_kd.report import phases, systems, tables, targets
from transducer_kd.report.tables import Row, number

MODES_TITLE = "Modes; with 95 % intervals"
MODES_NOTE = (
    "Left out: share of the parameters of the encoder's layers that a mode does without. Parameters: what is "
    "stored for the mode; MB: these in float32, and the index that says where the values of sparse matrices "
    "stand. Relative: WER relative to that of the dense control in the same mode, by the same method; the "
    "comparisons tell whether it is a difference."
)

_CHUNK_NOTE = "ms a chunk: time of the encoder, median (95th percentile)."
_CONTROL, _CHUNK = "dense control", "ms a chunk"


class Summary(NamedTuple):
    """A table with its title, below it `notes`."""

    title: str
    rows: List[Row]
    notes: List[str]
    text_columns: Sequence[int]  # the others hold numbers
    css: str


def summaries(report: Dict[str, Any]) -> List[Summary]:
    """Those that this report has."""
    found = []
    if targets.arms(report):
        rows, notes = targets.crossover_rows(report), targets.crossover_notes(report)
        found.append(Summary(targets.TITLE, rows, notes, (0, 1, len(rows[0]) - 1), "brief arms"))
    rows = mode_rows(report)
    if rows[1:]:
        notes = [MODES_NOTE + (f" {_CHUNK_NOTE}" if _CHUNK in rows[0] else "")]
        found.append(Summary(MODES_TITLE, rows, notes, (0, 1, rows[0].index(_CONTROL)), ""))
    return found


def mode_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per phase and mode that was decoded; only a header where no phase has masks or two modes."""
    sets = tables.test_sets(report)
    rows = [["phase", "mode", "left out", "parameters", "MB", *(f"{s} WER %" for s in sets)]]
    rows[0] += [_CONTROL, *(f"{s} relative" for s in sets)]
    has_speed = any(p["speed"] for p in report["phases"])
    rows[0] += [_CHUNK] if has_speed else []
    if not any(phases.has_masks(p) or phases.has_two_modes(p) for p in report["phases"]):
        return rows
    records = {(r["phase"], r["mode"], r["method"], r["test_set"]): r for r in report["records"]}
    for system in systems.systems(report):
        by_set, mode = system["headline"], system["mode"]
        if not by_set:
            continue
        control = _dense_control(system, report)
        row = [system["phase"]["name"], mode, systems.percent(_left_out(system, report))]
        row += [tables.millions(system["parameters"]), number(system["bytes"] and 1e-6 * system["bytes"], 2)]
        row += [tables.wer_cell(by_set[s]) if s in by_set else "-" for s in sets]
        row += [control or "-"]
        for s in sets:
            own = by_set.get(s)
            row.append(_relative(own, own and records.get((control, mode, own["method"], s))))
        rows.append(row + ([_chunk_cell(system)] if has_speed else []))
    return rows


def _dense_control(system: Dict[str, Any], report: Dict[str, Any]) -> Optional[str]:
    """The first phase without masks that was decoded in this mode, of those that the phase is to be compared
    with; what was extracted is compared as the phase that it was extracted from."""
    by_name = {p["name"]: p for p in report["phases"] if not p["is_stale"]}
    decoded = {(r["phase"], r["mode"]) for r in report["records"]}
    phase = system["phase"]
    named = by_name.get(phase["begins_with"], phase) if phase["is_extracted"] else phase
    for name in named["compare_with"]:
        is_dense = (
            name in by_name and not phases.has_masks(by_name[name]) and not by_name[name]["is_extracted"]
        )
        if is_dense and (name, system["mode"]) in decoded:
            return name
    return None


def _left_out(system: Dict[str, Any], report: Dict[str, Any]) -> Optional[float]:
    """Share of the layers' parameters; None where the records do not tell."""
    own, phase = next(iter(system["headline"].values())), system["phase"]
    whole = own
    if phase["is_extracted"]:
        of_supernet = (phase["begins_with"], own["method"])
        whole = next((r for r in report["records"] if (r["phase"], r["method"]) == of_supernet), {})
    if not (whole.get("params_dense") and whole.get("params_layers")):
        return None
    return (whole["params_dense"] - own["params_deployed"]) / whole["params_layers"]


def _relative(own: Optional[Dict[str, Any]], control: Optional[Dict[str, Any]]) -> str:
    if not (own and control and control["wer"]):
        return "-"
    return f"{100 * (own['wer'] / control['wer'] - 1):+.1f} %"


def _chunk_cell(system: Dict[str, Any]) -> str:
    """`8.40 (9.10)`"""
    speed = system["phase"]["speed"]
    timing = speed["modes"].get(system["mode"], {}) if speed else {}
    if timing.get("chunk_ms_median") is None:
        return "-"
    return f"{timing['chunk_ms_median']:.2f} ({number(timing['chunk_ms_p95'], 2)})"
