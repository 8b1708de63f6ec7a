"""Tables of a report, of which text.py and html.py make what is read.

A row is a list of strings; the first row is the header. Error rates are per cent, the interval beside them is
the 95 % bootstrap interval over utterances that decoding computed.
"""

from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

from transducer_kd.report.phases import ARMS, has_two_modes, is_pretraining

Row = List[str]

SIGNIFICANT = 0.05
SYNTHETIC_WARNING = "Synthetic speech: not comparable with any paper's figure."
ORACLE_NOTE = (
    "An oracle picks the best path of the whole n-best list with the reference in hand: a bound, not a "
    "result."
)
TRAINING_NOTE = (
    "Losses and WER of the last validation; losses per encoder frame (40 ms). Total losses are not shown: "
    "each objective adds up other terms. A student that prunes by its teacher's bounds and one that prunes "
    "by its own see other lattices, so their pruned_loss is not strictly comparable either."
)
PRETRAINING_NOTE = (
    "wav2vec 2.0, of the last validation. Accuracy: how often the hidden frame is told from the distractors. "
    "Chance: what guessing finds in these utterances; it is more than 1 / (1 + distractors), because "
    "distractors of short utterances repeat and share codes. Perplexity: how many entries of a codebook are "
    "in use, the mean of the batches; near 1 it has collapsed."
)

_EXPORTED = {"model": "exported", "gate": "parity gate", "bench": "benchmark on the device"}


def test_sets(report: Dict[str, Any]) -> List[str]:
    """Test sets in the order in which they were decoded."""
    return list(dict.fromkeys(r["test_set"] for r in report["records"]))


def decodings(report: Dict[str, Any]) -> List[Tuple[Tuple[str, str, str], Dict[str, Dict[str, Any]]]]:
    """((phase, mode, method), {test set: record}) in the order of the records."""
    grouped: Dict[Tuple[str, str, str], Dict[str, Dict[str, Any]]] = {}
    for r in report["records"]:
        grouped.setdefault((r["phase"], r["mode"], r["method"]), {})[r["test_set"]] = r
    return list(grouped.items())


def results_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per phase, mode and method; a column per test set."""
    sets, names = test_sets(report), labels(report)
    rows = [["phase", "mode", "method", "parameters", *(f"{s} WER %" for s in sets), "x real time"]]
    for (phase, *how), by_set in decodings(report):
        cells = [wer_cell(by_set[s]) if s in by_set else "-" for s in sets]
        size = next(iter(by_set.values()))["params_deployed"]
        rows.append([names[phase], *how, millions(size), *cells, speed(by_set.values())])
    return rows


def detail_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per record, with the counts behind the rates and the settings of the method."""
    header = "phase,mode,test set,method,WER %,low,high,errors,ins,del,sub,words,audio min,decoded in s"
    rows = [[*header.split(","), "2nd pass s", "x real time", "settings"]]
    names = labels(report)
    for r in report["records"]:
        row = [names[r["phase"]], r["mode"], r["test_set"], r["method"]]
        row += [f"{r[name]:.2f}" for name in ("wer", "wer_low", "wer_high")]
        row += [str(r.get(name, "-")) for name in ("errors", "insertions", "deletions", "substitutions")]
        row += [number(r["ref_words"], 0), number(minutes(r["audio_s"]), 1), number(r["decode_s"], 1)]
        settings = r.get("parameters") or {}
        row += [number(r.get("second_pass_s"), 1), speed([r])]
        rows.append([*row, ", ".join(f"{name} {value}" for name, value in settings.items())])
    return rows


def training_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per phase: its size, how long and how fast it trained, where it ended."""
    header = "phase,parameters,float32 MB,updates,epochs,minutes,audio-s/s"
    rows = [[*header.split(","), "dev pruned_loss", "dev las_loss", "dev WER %"]]
    names = labels(report)
    of_offline_mode = ("pruned_loss_offline", 3), ("wer_offline", 1)
    has_both = any(has_two_modes(p) for p in report["phases"])
    rows[0] += ["offline mode: dev pruned_loss", "offline mode: dev WER %"] if has_both else []
    for phase in report["phases"]:
        if phase["is_extracted"]:
            continue
        training = phase["training"] or {}
        last = training.get("last_valid") or {}
        size = phase["params_deployed"]
        row = [names[phase["name"]], millions(size), number(size and 4e-6 * size, 1)]
        row += [number(training.get("updates"), 0), number(training.get("epochs"), 0)]
        row += [number(minutes(training.get("elapsed_s")), 1), number(training.get("audio_s_per_s"), 0)]
        pruned_loss = last.get("pruned_loss", last.get("pruned_loss_streaming"))
        row += [number(pruned_loss, 3), number(last.get("las_loss"), 3)]
        row += [number(None if is_frozen(phase) else last.get("wer"), 1)]
        rows.append(row + [number(last.get(name), digits) for name, digits in of_offline_mode if has_both])
    return rows


def pretraining_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per pretraining that was validated: whether it finds hidden frames and uses all codes."""
    header = ["phase", "updates", "accuracy offline %", "accuracy streaming %", "chance %"]
    rows = [[*header, "1 / (1 + distractors) %", "codebook perplexity"]]
    names = labels(report)
    for phase in report["phases"]:
        last = (phase["training"] or {}).get("last_valid")
        if not (is_pretraining(phase) and last):
            continue
        options = phase["config"].get("wav2vec2") or {}
        row = [names[phase["name"]], number(phase["training"]["updates"], 0)]
        shares = [last.get(name) for name in ("accuracy_offline", "accuracy_streaming", "chance")]
        shares.append(1 / (1 + options["num_distractors"]) if "num_distractors" in options else None)
        row += [number(None if share is None else 100 * share, 1) for share in shares]
        use = [number(last[name], 1) for name in sorted(last) if name.startswith("perplexity_")]
        rows.append([*row, f"{', '.join(use) or '-'} of {options.get('num_entries', '?')}"])
    return rows


def stage_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per stage that ran."""
    rows = [["stage", "what", "seconds"]]
    rows += [[str(s["stage"]), str(s["name"]), f"{s['seconds']:.1f}"] for s in report["stages"]]
    return rows


def stage_total(report: Dict[str, Any]) -> str:
    """`12.3 minutes together`, and where there are control arms their time apart from it."""
    is_arm = [str(s["name"]).endswith(tuple(ARMS)) for s in report["stages"]]
    times = {arm: sum(s["seconds"] for s, a in zip(report["stages"], is_arm) if a == arm) for arm in (0, 1)}
    own, of_arms = (number(minutes(times[arm]), 1) for arm in (0, 1))
    if not any(is_arm):
        return f"{own} minutes together"
    return f"without the control arms: {own} minutes; the control arms: {of_arms} minutes"


def corpus_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per part of the synthetic corpus; only a header where there is none."""
    rows = [["part", "speakers", "utterances", "minutes", "SNR dB", "accents"]]
    for name, part in ((report["corpus_summary"] or {}).get("parts") or {}).items():
        snr = " to ".join(f"{x:g}" for x in part.get("snr_db", []))
        row = [name, number(part.get("speakers"), 0), number(part.get("utterances"), 0)]
        rows.append([*row, number(part.get("hours", 0.0) * 60, 1), snr, ", ".join(part.get("accents", []))])
    return rows


def provenance_rows(report: Dict[str, Any]) -> List[Row]:
    """What, where and with which code: one row per fact."""
    machine = report["machine"]
    rows = [["what", "value"], ["corpus, scale", f"{report['corpus']}, {report['scale']}"]]
    rows.append(["machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB"])
    for phase in report["phases"]:
        name, meta = phase["name"], phase["meta"] or {}
        if meta:
            known = {**meta, **meta.get("versions", {})}
            keys = ("python", "torch", "k2", "loss_backend", "cuda")
            found = [f"{key} {known[key]}" for key in keys if known.get(key)]
            by = "made by" if phase["is_extracted"] else "trained by"
            rows.append([f"{name}: {by}", ", ".join([f"commit {meta.get('commit', 'unknown')}", *found])])
            rows.append([f"{name}: command", relative(str(meta.get("command", "unknown")))])
        own = [r for r in report["records"] if r["phase"] == name]
        facts = [(r["commit"], r.get("checkpoint", "unknown weights"), relative(r["command"])) for r in own]
        for commit, weights, command in dict.fromkeys(facts):
            rows.append([f"{name}: decoded by", f"commit {commit}, {weights}, {command}"])
        devices = {f"{r['device']}, {r.get('num_threads')} threads" for r in own if "device" in r}
        if devices:
            rows.append([f"{name}: decoded on", "; ".join(sorted(devices))])
        if phase["delay"]:
            rows.append([f"{name}: emission delay by", _made_by(phase["delay"])])
        if phase["speed"]:
            rows.append([f"{name}: speed by", _made_by(phase["speed"])])
        rows += _export_rows(name, phase["export"] or {})
    for name, export in report["beside"].items():
        rows += _export_rows(name, export)
    for made in report["labels"]:
        if made["summary"]:
            by = made["summary"].get("created_by") or {}
            rows.append([f"labels of {made['name']}: made by", _made_by(by)])
    return rows


def _export_rows(name: str, export: Dict[str, Any]) -> List[Row]:
    origins = [(what, origin) for what, origin in export.items() if what in _EXPORTED and origin]
    return [[f"{name}: {_EXPORTED[what]} by", _made_by(origin)] for what, origin in origins]


def notes(report: Dict[str, Any]) -> List[str]:
    """Sentences that a reader of the tables needs."""
    out = []
    if any("oracle" in r["method"] for r in report["records"]):
        rescored = rescored_text(report)
        out.append(ORACLE_NOTE + (f" The LAS rescored {rescored}." if rescored else ""))
    sets = test_sets(report)
    used = [((p["config"] or {}).get("data") or {}).get("valid_part") for p in report["phases"]]
    used += [(r.get("parameters") or {}).get("tuned_on") for r in report["records"]]
    for part in dict.fromkeys(part for part in used if part in sets):
        out.append(
            f"{part} is a test set here and was also what training was validated on or rescoring tuned on: "
            "its rates are no independent test."
        )
    commits = sorted({r["commit"] for r in report["records"]})
    if len(commits) > 1:
        out.append(
            f"The results come from several commits ({', '.join(commits)}): decode again to compare them."
        )
    elif any(c.endswith("-dirty") for c in commits):
        out.append("The code that decoded had changes that are not in its commit (-dirty).")
    return out


def labels(report: Dict[str, Any]) -> Dict[str, str]:
    """{phase: its name, with a mark where it is stale}"""
    return {p["name"]: p["name"] + (" (stale)" if p["is_stale"] else "") for p in report["phases"]}


def is_frozen(phase: Dict[str, Any]) -> bool:
    """Whether the phase trained a LAS alone: its first pass then has the WER of what it began with."""
    return (phase["config"] or {}).get("objective") == "las"


def num_rescored(report: Dict[str, Any]) -> Optional[int]:
    """How many hypotheses of each list were rescored; 0: all; None: not known, or not always as many."""
    rescored = [r for r in report["records"] if r["method"].endswith("_las_rescore")]
    found = {(r.get("parameters") or {}).get("rescore_nbest") for r in rescored}
    return found.pop() if len(found) == 1 else None


def rescored_text(report: Dict[str, Any]) -> str:
    """What the second pass saw, in words; empty without one."""
    if not any(r["method"].endswith("_las_rescore") for r in report["records"]):
        return ""
    best = num_rescored(report)
    if best == 0:
        return "all hypotheses of the first pass's n-best list"
    number_of = best or "first few (rescore_nbest in the settings)"
    return f"the best {number_of} hypotheses of the first pass's n-best list"


# Cells


def _made_by(origin: Dict[str, Any]) -> str:
    commit, command = (str(origin.get(name, "unknown")) for name in ("commit", "command"))
    return f"commit {commit}, {relative(command)}"


def wer_cell(record: Dict[str, Any]) -> str:
    """`3.21 [2.80, 3.65]`"""
    return f"{record['wer']:.2f} [{record['wer_low']:.2f}, {record['wer_high']:.2f}]"


def difference_cell(comparison: Dict[str, Any]) -> str:
    """`-1.20 [-1.90, -0.50]`"""
    return f"{comparison['difference']:+.2f} [{comparison['low']:+.2f}, {comparison['high']:+.2f}]"


def delay_cell(phase: Dict[str, Any], mode: Optional[str], test_set: str) -> str:
    """`2.35 [2.10, 2.60] (94)`: frames, the interval, milliseconds; `-` unless measured in this mode"""
    delay = phase["delay"]
    if not delay or delay["mode"] != mode or test_set not in delay["parts"]:
        return "-"
    mean, low, high = (delay["parts"][test_set][name] for name in ("mean_frames", "low", "high"))
    return f"{mean:.2f} [{low:.2f}, {high:.2f}] ({mean * delay['frame_ms']:.0f})"


def p_text(p_value: float) -> str:
    """`p 0.012`"""
    return "p < 0.001" if p_value < 0.001 else f"p {p_value:.3f}"


def speed(records: Iterable[Dict[str, Any]]) -> str:
    """Seconds of audio decoded in a second, over all `records`."""
    records = list(records)
    audio_s, decode_s = (sum(r[name] for r in records) for name in ("audio_s", "decode_s"))
    return number(audio_s / decode_s if decode_s else None, 0)


def millions(count: Optional[int]) -> str:
    """`1.73 M`"""
    return "-" if count is None else f"{count / 1e6:.2f} M"


def minutes(seconds: Optional[float]) -> Optional[float]:
    """None stays None."""
    return None if seconds is None else seconds / 60


def number(value: Optional[float], digits: int) -> str:
    """A number with thousands separated, `-` for None."""
    return "-" if value is None else f"{value:,.{digits}f}"


def relative(text: str) -> str:
    """A command without the folder of this checkout: it is the same command in another one."""
    root = str(Path(__file__).resolve().parents[2])
    return text.replace(root + "/", "")
