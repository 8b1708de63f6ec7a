"""The systems of a report side by side, and what the paired comparisons between them say.

A system is a phase in one mode: its first pass, the second pass that rescores it where there is a LAS, and
all their parameters.
"""

from typing import Any, Dict, List, Optional, Tuple

from transducer_kd.report import phases, tables, targets
from transducer_kd.report.tables import Row, number

_RESCORED = "_las_rescore"
_ORACLE = "fast_beam_search_nbest_oracle"
_FEEDS = ("fast_beam_search_nbest", "modified_beam_search")  # first passes that a LAS can rescore
_FIRST = (*_FEEDS, "greedy_search")  # the first there is

COMPARISON_NOTE = (
    "A difference is the WER of the system minus that of what it is compared with, in percentage points: "
    "below zero is better; relative is per cent of the other's WER. Paired bootstrap: the utterances of the "
    "test set are resampled, though those of one speaker are not independent, so that the intervals are "
    "somewhat too narrow. Better and worse mean p < 0.05, not corrected for the number of comparisons. There "
    "is one training run (one seed) of each system: this says how sure the test set makes a difference "
    "between these models, not how another training would end."
)
CONTROL_NOTE = (
    "A control (_control) repeats the whole chain of trainings up to its stage without a teacher, so what "
    "one stage gave alone cannot be read from it."
)
NOKD_NOTE = (
    "A system with _nokd begins with the same distilled weights as the one it is compared with and leaves "
    "out the distillation terms of this stage alone."
)
MODES_NOTE = (
    "Where two modes are named, one system hears chunk by chunk and the other the whole utterance: a "
    "difference is that of mode and model together."
)
_UPDATES = (
    "Updates: of the phase; in brackets with those of all that it came from (whose weights it began with, "
    "who taught it, who labelled for it)"
)
UPDATES_NOTE = f"{_UPDATES}, without phases that came from none, as the first teacher."
SIZE_NOTE = (
    "Of a mode that leaves weights out, parameters are those that are stored for it, and the MB are these in "
    "float32 with the index that says where the values of sparse matrices stand."
)
_HEADINGS = {
    "teacher": "Distilled systems and controls against the teacher",
    "control": "Distilled systems against their controls, trained without distillation",
    "named": "Planned comparisons",
    "first pass": "Second pass against the first pass that it rescores",
}
# Where configurations name comparisons, what they name is compared with the teacher as well.
_NAMED_HEADINGS = {"teacher": "Systems against the teacher"}


def systems(report: Dict[str, Any]) -> List[Dict[str, Any]]:
    """One dict per phase and mode, in the order of the phases, without stale ones and what is never decoded,
    with undecoded ones:

    phase           the phase's dict
    mode, label     None where it was not decoded; the phase's name, with the mode where there are several
    parameters, bytes
                    all that it runs; of a mode that leaves weights out what is stored for it
    first, rescored, oracle, headline
                    {test set: record}; headline is the rescored one, and without a second pass the first
    """
    decodings = tables.decodings(report)
    modes = {mode for (_, mode, _), _ in decodings}
    found = []
    for phase in report["phases"]:
        if phase["is_stale"] or phases.is_pretraining(phase):
            continue
        own = {who[1:]: by_set for who, by_set in decodings if who[0] == phase["name"]}
        for mode in dict.fromkeys(mode for mode, _ in own) or [None]:
            methods = {method: by_set for (m, method), by_set in own.items() if m == mode}
            first, rescored = _passes(list(methods))
            parts = {"first": methods.get(first, {}), "rescored": methods.get(rescored, {})}
            found.append({
                "phase": phase, "mode": mode, "oracle": methods.get(_ORACLE, {}), **parts,
                "label": phase["name"] + (f" ({mode})" if mode and len(modes) > 1 else ""),
                "headline": parts["rescored"] or parts["first"], **_size(phase, methods),
            })  # fmt: skip
    return found


def _size(phase: Dict[str, Any], methods: Dict[str, Dict[str, Dict[str, Any]]]) -> Dict[str, Optional[int]]:
    records = [r for by_set in methods.values() for r in by_set.values()]
    left_out = [r for r in records if r["params_deployed"] < (r.get("params_dense") or 0)]
    if left_out:
        return {"parameters": left_out[0]["params_deployed"], "bytes": left_out[0]["bytes"]}
    size = phase["params_deployed"]
    return {"parameters": size, "bytes": size and 4 * size}


def teacher_of(phase: Dict[str, Any], report: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """The largest teacher with as many passes: what a system is smaller than. None for a teacher."""
    if phase["role"] not in ("distilled", "control"):
        return None
    of_all = phases.teachers(report["phases"])
    return next((t for t in of_all if t["has_las"] == phase["has_las"]), next(iter(of_all), None))


def saved(phase: Dict[str, Any], report: Dict[str, Any]) -> Optional[float]:
    """Share of the teacher's deployed parameters that `phase` does without; None where one is not known."""
    size, teacher = phase["params_deployed"], teacher_of(phase, report)
    is_known = size is not None and teacher and teacher["params_deployed"]
    return 1 - size / teacher["params_deployed"] if is_known else None


def total_updates(phase: Dict[str, Any], report: Dict[str, Any]) -> Optional[int]:
    """What the note on updates says; None where one of them is not known."""
    by_name = {p["name"]: p for p in report["phases"]}
    above = [by_name[name] for name in phases.ancestors(phase["name"], by_name)]
    counted = [phase, *(p for p in above if phases.parents(p) or not _has_teacher(report))]
    found = [_own_updates(p) for p in counted]
    return None if None in found else sum(found)


def _own_updates(phase: Dict[str, Any]) -> Optional[int]:
    return 0 if phase["is_extracted"] else (phase["training"] or {}).get("updates")


def _has_teacher(report: Dict[str, Any]) -> bool:
    return any(p["role"] == "teacher" for p in report["phases"])


def has_named(report: Dict[str, Any]) -> bool:
    """Whether a configuration says what its phase is to be compared with."""
    return any(p["compare_with"] for p in report["phases"])


def key_systems(report: Dict[str, Any]) -> List[Dict[str, Any]]:
    """What a reader wants first.

    Where configurations name comparisons: the arms of soft against hard targets, or else the phase that names
    most; with what these name and came from, and what was extracted of them. Otherwise the whole teacher, the
    last distilled system and its controls, or all.
    """
    decoded = [s for s in systems(report) if s["headline"]]
    if has_named(report):
        by_name = {p["name"]: p for p in report["phases"]}
        first = [arm for arm in targets.arms(report) if arm["generation"] == 1]
        arms = [name for arm in first for name in arm["names"].values()]
        leads = arms or [max(reversed(report["phases"]), key=lambda p: len(p["compare_with"]))["name"]]
        names = {n for lead in leads for n in [lead, *by_name[lead]["compare_with"]]}
        names |= {n for lead in leads for n in phases.ancestors(lead, by_name)}
        names |= {n for n, p in by_name.items() if p["is_extracted"] and p["begins_with"] in leads}
        return [s for s in decoded if s["phase"]["name"] in names] or decoded
    distilled = [s["phase"] for s in decoded if s["phase"]["role"] == "distilled"]
    if not distilled:
        return decoded
    last, teacher = distilled[-1], teacher_of(distilled[-1], report)
    names = {last["name"], teacher["name"] if teacher else None}

    def is_key(phase: Dict[str, Any]) -> bool:
        return phase["name"] in names or (phase["control_of"] == last["name"] and not phase["is_unlike"])

    return [s for s in decoded if is_key(s["phase"])]


def side_by_side_rows(report: Dict[str, Any], has_what: bool = True, only_key: bool = False) -> List[Row]:
    """One row per system; columns that would be empty for all are left out."""
    of_all, sets = key_systems(report) if only_key else systems(report), tables.test_sets(report)
    passes = {"first": "first pass", "rescored": "rescored", "oracle": "oracle of the whole list"}
    best = tables.num_rescored(report)
    passes["rescored"] += f" (best {best})" if best else ""
    shown = [(s, name) for s in sets for name in passes if any(s in system[name] for system in of_all)]
    has_second = any(system["rescored"] for system in of_all)
    header = ["phase", *(["what"] if has_what else []), *(f"{s} {passes[name]} %" for s, name in shown)]
    shares = [saved(system["phase"], report) for system in of_all]
    has_saved = not has_named(report) or set(shares) != {None}
    header += ["parameters", "float32 MB", *(["smaller than teacher by"] if has_saved else [])]
    header += ["updates"] if has_named(report) else []
    delayed = _delayed_sets(report)
    header += [f"{s} emission delay, frames [95 %] (ms)" for s in delayed]
    timed = _timed(report)
    header += [f"x faster than {name}, {_threads(number_of)} (RTF)" for name, number_of in timed]
    header += ["x real time"]
    rows = [header + (["2nd / 1st pass time"] if has_second else [])]
    for system, share in zip(of_all, shares):
        phase, size = system["phase"], system["bytes"]
        row = [system["label"], *([phase["what"]] if has_what else [])]
        row += [number(system[name].get(s, {}).get("wer"), 2) for s, name in shown]
        row += [tables.millions(system["parameters"]), number(size and 1e-6 * size, 1)]
        row += [percent(share)] if has_saved else []
        row += [_updates_cell(phase, report)] if has_named(report) else []
        row += [tables.delay_cell(phase, system["mode"], s) for s in delayed]
        row += [_faster_cell(phase, system["mode"], reference) for reference in timed]
        row += [tables.speed(system["headline"].values()), percent(_second_pass_share(system))]
        rows.append(row[: len(rows[0])])
    return rows


def side_by_side_notes(report: Dict[str, Any], only_key: bool = False) -> List[str]:
    """What the columns of side_by_side_rows mean in this report."""
    methods: Dict[str, List[str]] = {}
    of_all = key_systems(report) if only_key else systems(report)
    for system in of_all:
        for r in list(system["first"].values())[:1]:
            methods.setdefault(r["method"], []).append(system["label"])
    names = [m if len(methods) == 1 else f"{m} for {', '.join(labels)}" for m, labels in methods.items()]
    out = [f"First pass: {'; '.join(names)}."] if names else []
    if any(system["rescored"] for system in of_all):
        out.append(f"Rescored: {tables.rescored_text(report)}, reordered by the LAS.")
        out.append(
            "Time: encoder, search and second pass together, as seconds of audio in a second. 2nd / 1st pass "
            "time: what rescoring adds."
        )
    pairs = {
        t["name"]: f"{t['name']} ({tables.millions(t['params_deployed'])})"
        for t in (teacher_of(p, report) for p in report["phases"] if not p["is_stale"])
        if t
    }
    if pairs:
        known = ", ".join(pairs.values())
        if any(p["has_las"] for p in report["phases"]):
            out.append(
                "Parameters are all that run on a device, with the LAS where there is one; they are compared "
                f"with a teacher of as many passes: {known}."
            )
        else:
            out.append(f"Parameters are all that run on a device; they are compared with those of {known}.")
    chained = {p["teacher"] for p in report["phases"] if _own_teacher(p) not in (None, p["teacher"])}
    if chained:
        out.append(
            f"Where a teacher has been taught itself, sizes and comparisons are with the first one, "
            f"{', '.join(sorted(chained))}."
        )
    if any(system["parameters"] != system["phase"]["params_deployed"] for system in of_all):
        out.append(SIZE_NOTE)
    if has_named(report):
        out.append(UPDATES_NOTE if _has_teacher(report) else f"{_UPDATES}.")
    return out + _delay_notes(report) + _speed_notes(report)


def comparison_tables(report: Dict[str, Any], is_short: bool = False) -> List[Dict[str, Any]]:
    """{"title", "rows"} of every kind of comparison that was made.

    is_short: of two phases only their best method, the rescored lists where both have them.
    """
    grouped: Dict[Any, Dict[str, Dict[str, Any]]] = {}
    for c in report["comparisons"]:
        who = tuple(c[k] for k in ("kind", "phase_b", "phase_a", "mode_b", "mode_a", "method_b", "method_a"))
        grouped.setdefault(who, {})[c["test_set"]] = c
    if is_short:
        best: Dict[Any, Any] = {}
        for who in grouped:  # the best method comes first
            best.setdefault(who[:5], who)
        grouped = {who: grouped[who] for who in best.values()}
    sets, modes_of = tables.test_sets(report), {}
    for r in report["records"]:
        modes_of.setdefault(r["phase"], set()).add(r["mode"])
    has_both = any(len(modes) > 1 for modes in modes_of.values())
    made = []
    headings = {**_HEADINGS, **(_NAMED_HEADINGS if has_named(report) else {})}
    for kind, title in headings.items():
        columns = ("difference [95 %]", "relative", "verdict")
        rows = [["system", "against", "pass", *(f"{s} {column}" for s in sets for column in columns)]]
        for (own_kind, phase_b, phase_a, mode, mode_a, method, _), by_set in grouped.items():
            if own_kind != kind:
                continue
            against = "its first pass" if kind == "first pass" else phase_a
            scored = (
                "rescored" if method.endswith(_RESCORED) else "first pass" if method in _FEEDS else method
            )
            modes = mode if mode == mode_a else f"{mode} against {mode_a}"
            scored += "" if modes == "offline" and not has_both else f", {modes}"
            cells = [cell for s in sets for cell in (_comparison(by_set[s]) if s in by_set else ("-",) * 3)]
            rows.append([phase_b, against, scored, *cells])
        if len(rows) > 1:
            made.append({"title": title, "rows": rows})
    return made


def comparison_notes(report: Dict[str, Any]) -> List[str]:
    """What a reader of the comparisons has to know; nothing where none was made."""
    compared = report["comparisons"]
    controls = {c["phase_a"] for c in compared if c["kind"] == "control"}
    out = [COMPARISON_NOTE] if compared else []
    out += [MODES_NOTE] if any(c["mode_a"] != c["mode_b"] for c in compared) else []
    out += [CONTROL_NOTE] if any(name.endswith(phases.CONTROL) for name in controls) else []
    return out + ([NOKD_NOTE] if any(name.endswith(phases.NO_KD) for name in controls) else [])


def verdict(comparison: Dict[str, Any]) -> str:
    """In words, with the p-value: `better, p 0.012`"""
    words = "better" if comparison["difference"] < 0 else "worse"
    if comparison["p_value"] >= tables.SIGNIFICANT or not comparison["difference"]:
        words = "no difference shown"
    return f"{words}, {tables.p_text(comparison['p_value'])}"


def percent(share: Optional[float]) -> str:
    """`64.2 %`"""
    return "-" if share is None else f"{100 * share:.1f} %"


def _comparison(c: Dict[str, Any]) -> List[str]:
    relative = "-" if c["relative"] is None else f"{c['relative']:+.1f} %"
    return [tables.difference_cell(c), relative, verdict(c)]


def _own_teacher(phase: Dict[str, Any]) -> Optional[str]:
    return phase["learns_from"] or phase["labelled_by"]


def _updates_cell(phase: Dict[str, Any], report: Dict[str, Any]) -> str:
    """`2,000`, or `2,000 (4,000)` where what it came from was trained as well"""
    own, total = _own_updates(phase), total_updates(phase, report)
    return number(own, 0) + (f" ({number(total, 0)})" if own != total else "")


def _delays(report: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """{phase: its delay}, of phases that are compared"""
    return {p["name"]: p["delay"] for p in report["phases"] if p["delay"] and not p["is_stale"]}


def _delayed_sets(report: Dict[str, Any]) -> List[str]:
    measured = {part for delay in _delays(report).values() for part in delay["parts"]}
    return [s for s in tables.test_sets(report) if s in measured]


def _delay_notes(report: Dict[str, Any]) -> List[str]:
    references: Dict[str, List[str]] = {}
    for name, delay in _delays(report).items():
        references.setdefault(delay["reference"]["phase"], []).append(name)
    if not references:
        return []
    names = [
        name if len(references) == 1 else f"{name} for {', '.join(of)}" for name, of in references.items()
    ]
    return [
        "Emission delay: how much later than the reference model (below zero: earlier) a token of the "
        "transcript is emitted, both models forced on it; mean over the tokens. The time that a streaming "
        f"model waits for its chunk to be complete is not included. Reference model: {'; '.join(names)}."
    ]


def _timed(report: Dict[str, Any]) -> List[Tuple[str, int]]:
    """(reference, threads) of what was measured, each once."""
    measured = [p["speed"] for p in report["phases"] if p["speed"] and not p["is_stale"]]
    return list(dict.fromkeys((speed["reference"], speed["num_threads"]) for speed in measured))


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _faster_cell(phase: Dict[str, Any], mode: Optional[str], reference: Tuple[str, int]) -> str:
    """`1.62 (0.0041)`: times faster, and the real-time factor; `-` unless measured in this mode"""
    speed = phase["speed"]
    if not speed or (speed["reference"], speed["num_threads"]) != reference or mode not in speed["modes"]:
        return "-"
    timing = speed["modes"][mode]
    return f"{number(timing['times_faster'], 2)} ({timing['rtf']:.4f})"


def _speed_notes(report: Dict[str, Any]) -> List[str]:
    if not _timed(report):
        return []
    lengths = {p["speed"]["audio_s"] for p in report["phases"] if p["speed"]}
    runtimes = {p["speed"].get("runtime", "PyTorch") for p in report["phases"] if p["speed"]}
    return [
        f"x faster: the encoder alone ({' or '.join(sorted(runtimes))}), float32, on one utterance of "
        f"{' or '.join(f'{seconds:g}' for seconds in sorted(lengths))} s at a time, chunk by chunk where it "
        "streams, compared in the same mode. RTF: seconds for a second of audio. What a supernet leaves out "
        "is zero and is computed all the same; only what was extracted of it is smaller."
    ]


def _passes(methods: List[str]) -> List[Optional[str]]:
    """Of these the first pass, and what rescores it; None where there is none."""
    for first in _FEEDS:
        if first + _RESCORED in methods:
            return [first, first + _RESCORED]
    others = [m for m in methods if m != _ORACLE and not m.endswith(_RESCORED)]
    return [next((m for m in (*_FIRST, *others) if m in others), None), None]


def _second_pass_share(system: Dict[str, Any]) -> Optional[float]:
    """Time of the second pass over that of the first, all test sets together."""
    records = list(system["rescored"].values())
    if not records or any(r.get("second_pass_s") is None for r in records):
        return None
    second_s = sum(r["second_pass_s"] for r in records)
    first_s = sum(r["decode_s"] for r in records) - second_s
    return second_s / first_s if first_s > 0 else None
