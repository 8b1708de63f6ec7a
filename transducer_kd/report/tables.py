"""Tables of a report, of which text.py and html.py make what is read.

A row is a list of strings; the first row is the header. Error rates are per cent, the interval beside them is
the 95 % bootstrap interval over utterances that decoding computed.
"""

from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

Row = List[str]

SYNTHETIC_WARNING = "Synthetic speech: not comparable with any paper's figure."
ORACLE_NOTE = (
    "An oracle picks the best path of the n-best list with the reference in hand: a bound, not a result."
)


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
    sets = test_sets(report)
    rows = [["phase", "mode", "method", "parameters", *(f"{s} WER %" for s in sets), "x real time"]]
    for who, by_set in decodings(report):
        cells = [wer_cell(by_set[s]) if s in by_set else "-" for s in sets]
        size = next(iter(by_set.values()))["params_deployed"]
        rows.append([*who, millions(size), *cells, speed(by_set.values())])
    return rows


def detail_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per record, with the counts behind the rates and the settings of the method."""
    header = "phase,mode,test set,method,WER %,low,high,errors,ins,del,sub,words,audio min,decoded in s"
    rows = [[*header.split(","), "2nd pass s", "x real time", "settings"]]
    for r in report["records"]:
        row = [r["phase"], r["mode"], r["test_set"], r["method"]]
        row += [f"{r[name]:.2f}" for name in ("wer", "wer_low", "wer_high")]
        row += [str(r.get(name, "-")) for name in ("errors", "insertions", "deletions", "substitutions")]
        row += [number(r["ref_words"], 0), number(minutes(r["audio_s"]), 1), number(r["decode_s"], 1)]
        settings = r.get("parameters") or {}
        row += [number(r.get("second_pass_s"), 1), speed([r])]
        rows.append([*row, ", ".join(f"{name} {value}" for name, value in settings.items())])
    return rows


def training_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per phase: its size, how long and how fast it trained, where it ended."""
    header = "phase,parameters,float32 MB,updates,epochs,minutes,audio-s/s,final loss,best dev loss,dev WER %"
    rows = [header.split(",")]
    for phase in report["phases"]:
        training = phase["training"] or {}
        best = training.get("best_valid") or {}
        size = phase["params_deployed"]
        row = [phase["name"], millions(size), number(size and 4e-6 * size, 1)]
        row += [number(training.get("updates"), 0), number(training.get("epochs"), 0)]
        row += [number(minutes(training.get("elapsed_s")), 1), number(training.get("audio_s_per_s"), 0)]
        row += [
            number(training.get("final_loss"), 3),
            number(best.get("loss"), 3),
            number(best.get("wer"), 1),
        ]
        rows.append(row)
    return rows


def stage_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per stage that ran."""
    rows = [["stage", "what", "seconds"]]
    rows += [[str(s["stage"]), str(s["name"]), f"{s['seconds']:.1f}"] for s in report["stages"]]
    return rows


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
            rows.append(
                [f"{name}: trained by", ", ".join([f"commit {meta.get('commit', 'unknown')}", *found])]
            )
            rows.append([f"{name}: command", relative(str(meta.get("command", "unknown")))])
        own = [r for r in report["records"] if r["phase"] == name]
        facts = [(r["commit"], r.get("checkpoint", "unknown weights"), relative(r["command"])) for r in own]
        for commit, weights, command in dict.fromkeys(facts):
            rows.append([f"{name}: decoded by", f"commit {commit}, {weights}, {command}"])
        devices = {f"{r['device']}, {r.get('num_threads')} threads" for r in own if "device" in r}
        if devices:
            rows.append([f"{name}: decoded on", "; ".join(sorted(devices))])
    return rows


def notes(report: Dict[str, Any]) -> List[str]:
    """Sentences that a reader of the tables needs."""
    out = []
    if any("oracle" in r["method"] for r in report["records"]):
        out.append(ORACLE_NOTE)
    commits = sorted({r["commit"] for r in report["records"]})
    if len(commits) > 1:
        out.append(
            f"The results come from several commits ({', '.join(commits)}): decode again to compare them."
        )
    elif any(c.endswith("-dirty") for c in commits):
        out.append("The code that decoded had changes that are not in its commit (-dirty).")
    return out


# Cells


def wer_cell(record: Dict[str, Any]) -> str:
    """`3.21 [2.80, 3.65]`"""
    return f"{record['wer']:.2f} [{record['wer_low']:.2f}, {record['wer_high']:.2f}]"


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
