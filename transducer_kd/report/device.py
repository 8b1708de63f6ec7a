"""Tables of the models on the device: what exports.py has read of stage 7, phase by phase.

One row per phase and precision, of the mode that the device runs: streaming where the phase has chunks.
Exports and phases that are stale are left out. Sizes, speeds and the figure also show the models of other
recipes that were measured in the same run.
"""

from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional

from transducer_kd.report import exports, tables
from transducer_kd.report.summaries import Summary
from transducer_kd.report.tables import Row, number

TITLE = "On the device: size, accuracy, speed"
WORDS_TITLE = "Word error rates through sherpa-onnx beside PyTorch's; with 95 % intervals"
SPEED_TITLE = "Time and memory on the device"
ODD_TITLE = "Odd inputs of which the implementations make different words"

# Precision -> what the gate calls the implementation that has it.
_IMPLEMENTATIONS = {"float": "onnx", "int8": "int8"}
_NAMES = {
    "pytorch": "PyTorch",
    "chunks": "PyTorch chunk by chunk",
    "onnx": "sherpa-onnx float",
    "int8": "sherpa-onnx int8",
}
_SHORT = {"chunks": "by chunks", "onnx": "float", "int8": "int8"}
_LEVELS = {"weights": "weights stored in int8", "float": "nothing in int8"}  # how products are relaxed
_TEXT = ("phase", "precision", "pass", "mode", "test set", "gate", "input", *_NAMES.values())  # columns
_PASSES = {False: "first pass", True: "with LAS"}


class Deployed(NamedTuple):
    """What a device would hold and run."""

    phase: str
    precision: str
    mode: str
    has_las: bool  # whether the second pass is used
    bytes: int
    words: Dict[str, Dict[str, Any]]  # {test set: row of the gate}
    timing: Optional[Dict[str, Any]]  # row of the benchmark


def deployed(report: Dict[str, Any]) -> List[Deployed]:
    """All, in the order of the phases, then those of other recipes; of each first without, then with the LAS
    where the gate had it.
    """
    found = []
    for name, export in _measured(report).items():
        mode = "streaming" if "encoder-streaming.onnx" in export["model"]["files"] else "offline"
        for precision, implementation in _IMPLEMENTATIONS.items():
            rows = _words(export, mode=mode, implementation=implementation)
            for has_las in _PASSES:
                size = exports.size(export["model"]["files"], mode, precision, has_las)
                words = {row["test_set"]: row for row in rows if row["two_pass"] is has_las}
                if size is None or (has_las and not words):
                    continue
                timings = [] if has_las else (export["bench"] or {}).get("rows", [])
                timing = next((t for t in timings if (t["precision"], t["mode"]) == (precision, mode)), None)
                found.append(Deployed(name, precision, mode, has_las, size, words, timing))
    return found


def device_tables(report: Dict[str, Any]) -> List[Summary]:
    """Those that this report has; none where nothing was exported."""
    of_all = [
        _summary(TITLE, device_rows(report), device_notes(report)),
        _summary(WORDS_TITLE, words_rows(report), words_notes(report)),
        _summary(SPEED_TITLE, speed_rows(report), speed_notes(report)),
        _summary(ODD_TITLE, odd_rows(report), []),
    ]
    return [made for made in of_all if made.rows[1:]]


def test_sets(report: Dict[str, Any]) -> List[str]:
    """Those that the gates decoded, in their order."""
    rows = [row for export in _measured(report).values() for row in _words(export)]
    return list(dict.fromkeys(row["test_set"] for row in rows))


def device_rows(report: Dict[str, Any], is_short: bool = False) -> List[Row]:
    """What a reader wants first. is_short: for a README, without PyTorch's rates and the real-time factor."""
    of_all, sets, known = deployed(report), test_sets(report), _measured(report)
    has_las = any(d.has_las for d in of_all)
    beside = "" if is_short else " (PyTorch)"
    header = ["phase", "precision", *(["pass"] if has_las else []), "MB"]
    header += [f"{s} WER %{beside}" for s in sets] + ["times smaller", "times faster"]
    rows = [header + ([] if is_short else ["RTF", "mode", "gate"])]
    for d in of_all:
        row = [d.phase, d.precision, *([_PASSES[d.has_las]] if has_las else []), number(1e-6 * d.bytes, 2)]
        for s in sets:
            pytorch = _words(known[d.phase], "pytorch", mode=d.mode, test_set=s, two_pass=d.has_las)
            own, other = (number(r and r["wer"], 2) for r in (d.words.get(s), next(iter(pytorch), None)))
            row.append(own if is_short else f"{own} ({other})")
        row += [number(_times_smaller(d, of_all, _references(report)), 1), _timed(d, "times_faster", 1)]
        rows.append(row if is_short else [*row, _timed(d, "rtf", 4), d.mode, _gate_cell(known[d.phase])])
    return rows


def words_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per phase, mode, pass and test set; only a header where no gate was run."""
    known = exports.current(report["phases"])
    has_las = any(row["two_pass"] for export in known.values() for row in _words(export))
    rows = [["phase", "mode", *(["pass"] if has_las else []), "test set"]]
    rows[0] += ["PyTorch WER %", "by chunks identical %", "float WER %", "float identical %"]
    rows[0] += ["int8 WER %", "int8 identical %", "int8 - PyTorch"]
    for name, export in known.items():
        of_phase = _words(export, "pytorch")
        modes = [row["mode"] for row in of_phase]
        for pytorch in sorted(of_phase, key=lambda row: (modes.index(row["mode"]), row["two_pass"])):
            key = {field: pytorch[field] for field in ("mode", "two_pass", "test_set")}
            own = {row["implementation"]: row for row in _words(export, **key)}
            row = [name, key["mode"], *([_PASSES[key["two_pass"]]] if has_las else []), key["test_set"]]
            row += [tables.wer_cell(pytorch), _identical(own.get("chunks"))]
            for implementation in ("onnx", "int8"):
                of_it = own.get(implementation)
                row += [tables.wer_cell(of_it) if of_it else "-", _identical(of_it)]
            rows.append([*row, _difference(own.get("int8"))])
    return rows


def speed_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per phase and precision that was measured; only a header where none was."""
    rows = [["phase", "precision", "mode", "RTF", "RTF without features", "times faster"]]
    rows[0] += ["times faster without features", "ms a chunk", "peak MB"]
    for minute in ("first", "last"):
        rows[0] += [f"{minute} minute: MB", f"{minute} minute: ms a chunk"]
    for d in deployed(report):
        if d.timing is None:
            continue
        row = [d.phase, d.precision, d.mode, _timed(d, "rtf", 4), _timed(d, "rtf_model", 4)]
        row += [_timed(d, "times_faster", 1), _timed(d, "times_faster_model", 1), _chunk_cell(d.timing)]
        row += [_timed(d, "peak_mb", 0)]
        for minute in (d.timing.get("first_minute"), d.timing.get("last_minute")):
            row += [number(minute and minute["resident_mb"], 1), _chunk_cell(minute)]
        rows.append(row)
    return rows


def odd_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per odd input whose words differ; only a header where all are the same."""
    rows = [["phase", "mode", "input", *_NAMES.values()]]
    for name, export in exports.current(report["phases"]).items():
        for odd in (export["gate"] or {}).get("odd", []):
            if not odd["same"]:
                words = [odd["words"].get(implementation) for implementation in _NAMES]
                shown = ["-" if heard is None else heard or "(nothing)" for heard in words]
                rows.append([name, odd["mode"], odd["input"], *shown])
    return rows


def device_notes(report: Dict[str, Any]) -> List[str]:
    """What the columns of device_rows mean in this report, and why a gate was not passed."""
    known = _measured(report)
    runtimes = sorted({e["gate"]["runtime"] for e in known.values() if e["gate"]}) or ["sherpa-onnx"]
    has_las = any(d.has_las for d in deployed(report))
    out = [
        "MB: encoder, decoder and joiner of the mode on disk, with the LAS where it is used. WER: greedy "
        f"search through {', '.join(runtimes)}; with a LAS, beam search and rescoring over the same files. "
        f"Times smaller and faster: than {_references(report)}"
        f"{', with as many passes; only the first pass is timed' if has_las else ''}."
    ]
    if report["beside"]:
        out.append(
            "RECIPE/PHASE: a model of another recipe of this corpus and scale, measured in the same run."
        )
    for name, export in known.items():
        if export["gate"] and not export["gate"]["passed"]:
            out.append(f"The gate of {name} was not passed: {'; '.join(_failures(export['gate']))}.")
    return out


def words_notes(report: Dict[str, Any]) -> List[str]:
    """How the columns of words_rows are to be read, and what int8 leaves in float."""
    known = exports.current(report["phases"])
    gates = [export["gate"] for export in known.values() if export["gate"]]
    limits = dict.fromkeys((100 * gate["least_identical"], gate["most_worse"]) for gate in gates)
    wanted = [
        f"{share:g} % of all but int8, and of int8 a WER at most {worse:g} worse" for share, worse in limits
    ]
    out = [
        "Identical: share of the utterances with the very words of PyTorch on the whole utterance. The gate "
        f"wants {' or '.join(wanted)} than PyTorch's."
    ]
    odd = [row for gate in gates for row in gate["odd"]]
    if odd:
        unseen = min(gate["least_same_unseen"] for gate in gates)
        out.append(
            "Inputs of odd lengths, silence, clipping and the like, on which PyTorch itself is steady: the "
            f"same words everywhere for {sum(row['same'] for row in odd)} of {len(odd)}. The gate wants all "
            f"of them, of int8 {100 * unseen:g} % of those that it was not chosen on."
        )
    for name, export in known.items():
        relaxed = [f"{m['module']} ({_LEVELS.get(m['how'], m['how'])})" for m in _relaxed(export)]
        out += [f"int8 of {name} computes in float: {', '.join(relaxed)}."] if relaxed else []
    return out


def speed_notes(report: Dict[str, Any]) -> List[str]:
    """How the figures of speed_rows were measured; a warning where they come from several runs."""
    runs = {}
    for export in _measured(report).values():
        bench = export["bench"]
        if bench:
            runs.setdefault(tuple(bench[name] for name in exports.RUN), bench)
    if not runs:
        return []
    bench = next(iter(runs.values()))
    threads = "one thread" if bench["num_threads"] == 1 else f"{bench['num_threads']} threads"
    out = [
        f"{bench['runtime']}, {threads}; medians of {bench['turns']} turns, which the models take one after "
        f"the other, on utterances of {bench['audio_s']:g} s in all, each a stream of its own. RTF: "
        "processor seconds for a second of audio, from samples to words; without features: the model and "
        "its search alone. ms a chunk: processor "
        f"time from its last sample to its words, median (95th percentile). Peak: of a process that hears "
        f"{bench['stream_s'] / 60:g} minutes of utterances and begins anew at the pauses between them"
        f"{_baseline(runs.values())}; the first and the last of these tell whether memory or latency grow."
    ]
    if len(runs) > 1:
        out.append(
            f"These figures come from {len(runs)} runs of the benchmark, so do not compare them across "
            "phases: run stage 7 again."
        )
    return out


# Parts of an export


def _summary(title: str, rows: List[Row], notes: List[str]) -> Summary:
    return Summary(title, rows, notes, [i for i, name in enumerate(rows[0]) if name in _TEXT], "")


def _measured(report: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """The own exports and, as recipe/phase, those of other recipes that were measured with them."""
    return {**exports.current(report["phases"]), **report["beside"]}


def _words(export: Dict[str, Any], implementation: Optional[str] = None, **wanted: Any) -> List[Dict]:
    """Rows of the gate's word part that have the wanted values."""
    if implementation:
        wanted["implementation"] = implementation
    rows = (export["gate"] or {}).get("words", [])
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _relaxed(export: Dict[str, Any]) -> List[Dict[str, str]]:
    return (export["model"].get("int8") or {}).get("relaxed", [])


def _references(report: Dict[str, Any]) -> str:
    benches = [export["bench"] for export in _measured(report).values() if export["bench"]]
    return " or ".join(dict.fromkeys(bench["reference"] for bench in benches)) or "the reference"


def _failures(gate: Dict[str, Any]) -> Iterator[str]:
    for tensor in gate["tensors"]:
        if not tensor["passed"]:
            where = f", from {tensor['starts_at']} on" if tensor.get("starts_at") else ""
            by = tensor.get("max_difference")
            how = "has another shape or infinite values" if by is None else f"differs by {by:.2g}"
            yield f"{tensor['part']}: {tensor['output']} {how}{where}"
    for row in gate["words"]:
        if row.get("passed") is False:
            who = [_SHORT.get(row["implementation"], row["implementation"]), row["mode"], row["test_set"]]
            who += [_PASSES[True]] if row["two_pass"] else []
            yield f"{', '.join(who)}: WER {_difference(row)}, identical {_identical(row)} %"
    differing = sum(not odd["passed"] for odd in gate["odd"])
    if differing:
        yield f"odd inputs with different words: {differing}"


def _baseline(benches: Iterable[Dict[str, Any]]) -> str:
    found = [row["baseline_mb"] for bench in benches for row in bench["rows"] if row.get("baseline_mb")]
    return f", {max(found):.0f} MB of it Python with its libraries" if found else ""


# Cells


def _gate_cell(export: Dict[str, Any]) -> str:
    if not export["gate"]:
        return "-"
    return "passed" if export["gate"]["passed"] else "not passed"


def _timed(d: Deployed, name: str, digits: int) -> str:
    return number(d.timing and d.timing.get(name), digits)


def _times_smaller(d: Deployed, of_all: List[Deployed], reference: str) -> Optional[float]:
    """Than the reference with as many passes; None where that is not there."""
    if not d.has_las:
        return d.timing and d.timing.get("times_smaller")
    others = (o.bytes for o in of_all if (f"{o.phase} {o.precision}", o.has_las) == (reference, d.has_las))
    size = next(others, None)
    return size and size / d.bytes


def _chunk_cell(timing: Optional[Dict[str, Any]]) -> str:
    """`8.40 (9.10)`"""
    if not timing or timing.get("chunk_ms_median") is None:
        return "-"
    return f"{timing['chunk_ms_median']:.2f} ({number(timing.get('chunk_ms_p95'), 2)})"


def _identical(row: Optional[Dict[str, Any]]) -> str:
    share = row and row.get("identical_share")
    return "-" if share is None else f"{100 * share:.1f}"


def _difference(row: Optional[Dict[str, Any]]) -> str:
    difference = row and row.get("wer_difference")
    return "-" if difference is None else f"{difference:+.2f}"
