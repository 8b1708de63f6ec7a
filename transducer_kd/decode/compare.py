"""Which pairs of decodings of an experiment say something, and their paired bootstrap.

Compared are, on the same test set,

    "teacher"      a distilled phase or a control with the first teacher of those that led to it
    "control"      a distilled phase with each of its controls
    "named"        a phase with each of those that its configuration says to compare it with
    "first pass"   the rescored n-best lists with the first pass that made them

in the same mode, two phases of both modes in both; or where the two have none in common, as a streaming
student of an offline teacher, each in its own. B is compared with A: a negative difference means that B, the
phase or pass in question, makes fewer errors.
"""

import ast
from pathlib import Path
from typing import Any, Dict, Iterator, List, Sequence, Tuple, Union

from transducer_kd.decode import wer
from transducer_kd.log import UserError

Record = Dict[str, Any]
Pair = Tuple[str, Record, Record]  # kind, A, B
Decoded = Dict[Tuple[str, str, str], Dict[str, Record]]  # (phase, mode, test set) -> {method: record}

KINDS = ("teacher", "control", "named", "first pass")

_RESCORED = "_las_rescore"
_FIRST = ("fast_beam_search_nbest", "modified_beam_search")  # what a second pass can rescore
# Of each group one method is compared: the first that both have.
_GROUPS = (tuple(method + _RESCORED for method in _FIRST), _FIRST, ("greedy_search",))


def comparisons(
    exp_dir: Path, phases: Sequence[Dict[str, Any]], records: Sequence[Record]
) -> Tuple[List[Dict[str, Any]], List[str]]:
    """What could be compared, and sentences on what could not and why.

    exp_dir: holds the phases' folders. phases: dicts with name, role, teacher, control_of, compare_with,
    params_deployed, is_stale and is_unlike, as report/phases.py and report/checks.py explain them: stale ones
    are compared with nothing, a control that is unlike its phase not with that. records: the phases'
    decodings, `phase` being the folder's name.

    A comparison has kind, test_set; phase_a, mode_a, method_a, wer_a and phase_b, mode_b, method_b, wer_b;
    difference (WER of B minus WER of A) with its 95 % interval low and high; relative (per cent of A's WER,
    None where that is 0) and p_value. Rates are in per cent.
    """
    found, missing = [], []
    known: Dict[Tuple[str, str], Union[List[wer.Utterance], UserError]] = {}
    for kind, a, b in pairs(phases, records):
        try:
            found.append(_compared(kind, a, b, *(_utterances(Path(exp_dir), r, known) for r in (a, b))))
        except UserError as e:
            missing.append("paired comparisons: " + str(e).replace(f"{exp_dir}/", ""))
    return found, list(dict.fromkeys(missing))


def pairs(phases: Sequence[Dict[str, Any]], records: Sequence[Record]) -> List[Pair]:
    """(kind, A, B), of one kind after the other, each in the order of `phases` and `records`."""
    decoded: Decoded = {}
    for r in records:
        decoded.setdefault((r["phase"], r["mode"], r["test_set"]), {})[r["method"]] = r
    found = []
    phases = [p for p in phases if not p["is_stale"]]
    for phase in phases:
        known = {p["name"] for p in phases} - {phase["name"]}
        controls = [p for p in phases if p["control_of"] == phase["name"] and not p["is_unlike"]]
        others = [("teacher", _teachers(phase, phases)), *(("control", [p["name"]]) for p in controls)]
        others += [("named", [name]) for name in phase["compare_with"] if name in known]
        for (name, mode, test_set), own in decoded.items():
            if name != phase["name"]:
                continue
            compared: List[Tuple[Record, Record]] = []
            for kind, names in others:
                theirs = [_partner(decoded, phase["name"], other, mode, test_set) for other in names]
                # A teacher or control that is named as well is compared once.
                new = [pair for pair in _shared(theirs, own) if pair not in compared]
                compared += new
                found += [(kind, a, b) for a, b in new]
            for method in _FIRST:
                if method in own and method + _RESCORED in own:
                    found.append(("first pass", own[method], own[method + _RESCORED]))
    return sorted(found, key=lambda pair: KINDS.index(pair[0]))


def read_recogs(path: Path) -> List[wer.Utterance]:
    """The utterances that wer.write_results wrote. UserError where it is missing or not such a file."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        for ref_line, hyp_line in zip(lines[::2], lines[1::2]):
            cut, ref = ref_line.split(":\tref=")
            same_cut, hyp = hyp_line.split(":\thyp=")
            words = ast.literal_eval(ref), ast.literal_eval(hyp)
            if cut != same_cut or not all(isinstance(w, list) for w in words):
                raise ValueError
            found.append((cut, *words))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; decode again") from None
    except (ValueError, SyntaxError):
        raise UserError(f"{path}: after {len(found)} utterances comes another format; decode again") from None
    return found


def _teachers(phase: Dict[str, Any], phases: Sequence[Dict[str, Any]]) -> List[str]:
    """Whom to compare with, best choice first: the phase's own teacher, then the largest.

    The own one may not have the method: a student's teacher is one without a LAS, or was named by none.
    """
    if phase["role"] not in ("distilled", "control"):
        return []
    taught = sorted((p for p in phases if p["role"] == "teacher"), key=lambda p: -(p["params_deployed"] or 0))
    known = {p["name"] for p in phases}
    return [name for name in (phase["teacher"], *(p["name"] for p in taught)) if name in known]


def _partner(decoded: Decoded, own: str, other: str, mode: str, test_set: str) -> Dict[str, Record]:
    """{method: record} of `other` in `mode`, or where `own` and `other` have no mode in common in its own."""
    modes, theirs = ([m for n, m, _ in decoded if n == name] for name in (own, other))
    if theirs and not set(modes) & set(theirs):
        mode = theirs[0]  # all are
    return decoded.get((other, mode, test_set), {})


def _shared(theirs: Sequence[Dict[str, Record]], own: Dict[str, Record]) -> Iterator[Tuple[Record, Record]]:
    """Of each group of methods the first that `own` and one of `theirs`, the earlier the better, have."""
    for group in _GROUPS:
        for method in group:
            other = next((t[method] for t in theirs if method in t), None)
            if other and method in own:
                yield other, own[method]
                break


def _utterances(exp_dir: Path, record: Record, known: Dict) -> List[wer.Utterance]:
    """Of the record's recogs file, read once; UserError where they are not what was scored."""
    phase, name = record["phase"], record.get("recogs")
    if not name:
        raise UserError(f"the records of phase {phase} name no recogs file; decode it again")
    if (phase, name) not in known:
        path = exp_dir / phase / name
        try:
            utterances = read_recogs(path)
            if abs(wer.word_error_rate(utterances) - record["wer"]) > 0.005:
                raise UserError(f"{path} is not what its record was made from; decode again")
            known[phase, name] = utterances
        except UserError as e:
            known[phase, name] = e
    if isinstance(known[phase, name], UserError):
        raise known[phase, name]
    return known[phase, name]


def _compared(
    kind: str, a: Record, b: Record, of_a: List[wer.Utterance], of_b: List[wer.Utterance]
) -> Dict[str, Any]:
    try:
        result = wer.compare(of_a, of_b)
        if {cut: ref for cut, ref, _ in of_a} != {cut: ref for cut, ref, _ in of_b}:
            raise ValueError("a paired comparison needs the same references, and some differ")
    except ValueError as e:
        names = (f"{r['phase']} {r['method']}" for r in (a, b))
        raise UserError(f"{' and '.join(names)} on {b['test_set']}: {e}; decode both again") from None
    return {
        "kind": kind,
        "test_set": b["test_set"],
        **{f"{key}_a": a[key] for key in ("phase", "mode", "method", "wer")},
        **{f"{key}_b": b[key] for key in ("phase", "mode", "method", "wer")},
        "difference": result.difference,
        "low": result.low,
        "high": result.high,
        "relative": 100 * result.difference / a["wer"] if a["wer"] else None,
        "p_value": result.p_value,
    }
