"""Soft against hard targets: the sets of pseudo-labels, and what students of the two kinds say.

What is looked for is the crossover of Hwang et al. (ICASSP 2023): hard targets are better for a small
streaming student of a large model, soft targets where a model labels for one of its own architecture. Which
phases are arms is read from their configurations and from what these say to compare, never from names.
"""

import json
from typing import Any, Dict, List

from transducer_kd import config as cfg
from transducer_kd.log import UserError
from transducer_kd.report import checks, phases, tables
from transducer_kd.report.tables import Row, number

TITLE = "Soft targets against hard ones, of the same pseudo-labels; with 95 % intervals"
LABELS_NOTE = (
    "Confidence: P(hypothesis)^(1/U), U its tokens, of all labels with words; P also counts the blanks of "
    "all frames. Label WER: against the references that this speech happens to have; for information, "
    "nothing is chosen by it."
)
GENERATION_NOTE = (
    "From generation 2 on, chains are compared: each arm was labelled by the earlier arm of its kind."
)
_CROSSOVER = (
    "Crossover (hard targets better for a streaming student of another model, soft targets better in "
    f"self-training, both with p < {tables.SIGNIFICANT})"
)
_COLUMNS = {"supervised": "supervised", "hard": "hard", "soft": "soft", "both": "soft and hard"}
_PERCENTILES = ("5", "25", "50", "75", "95")
_ARMS_DIFFER_IN = {"loss.pseudo_weight", "data.pseudo_labels"}


def label_rows(report: Dict[str, Any]) -> List[Row]:
    """One row per finished set of pseudo-labels; only a header without."""
    rows = [["labelled by", "part", "kept cuts", "kept hours", "dropped cuts"]]
    rows[0] += [f"confidence, percentiles {'/'.join(_PERCENTILES)}", "label WER all %", "label WER kept %"]
    rows[0] += ["soft targets", "MB per hour"]
    for made in report["labels"]:
        summary = made["summary"]
        if summary is None:
            continue
        who = made["labelled_by"] or "another model"
        row = [who if who == made["name"] else f"{who} ({made['name']})", str(summary.get("part", "-"))]
        row += [number(summary["kept"]["cuts"], 0), number(summary["kept"]["hours"], 2)]
        dropped = {reason: count["cuts"] for reason, count in summary["dropped"].items() if count["cuts"]}
        row += [", ".join(f"{reason} {number(cuts, 0)}" for reason, cuts in dropped.items()) or "none"]
        confidence = summary.get("confidence_percentiles") or {}
        row += ["/".join(number(confidence.get(p), 2) for p in _PERCENTILES)]
        row += [number((summary.get("label_wer") or {}).get(which), 2) for which in ("all", "kept")]
        soft = summary.get("soft") or {}
        row += [f"{soft.get('dtype')}, {soft.get('dim')} wide" if soft else "none"]
        rows.append([*row, number(soft.get("mb_per_hour"), 0)])
    return rows


def arms(report: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Phases with soft and with hard targets that were compared and are the same student:

    student         a few words on it
    names           {"supervised", "hard", "soft", "both"}: the phases, without those that are not there;
                    supervised is the same student trained for as many updates without labels of a teacher
    is_streaming, is_self, generation
                    is_self: the labels come from the same architecture
    mode, method    how they were decoded
    by_set          {test set: {"difference" (WER of soft minus hard), "low", "high", "p_value"}}
    """
    by_name = {p["name"]: p for p in report["phases"]}
    found: Dict[Any, Dict[str, Any]] = {}
    for c in report["comparisons"]:
        if c["kind"] != "named":
            continue
        of_both = {phases.targets(by_name[c[f"phase_{side}"]]): side for side in "ab"}
        if set(of_both) != {"hard", "soft"}:
            continue
        names = [c[f"phase_{of_both[kind]}"] for kind in ("hard", "soft")]
        how = (*names, c["mode_a"], c["mode_b"])
        # Of two phases the best method comes first.
        arm = found.get(how) or _arm(names, c["mode_b"], c["method_b"], by_name)
        if arm and arm["method"] == c["method_b"]:
            found[how] = arm
            arm["by_set"][c["test_set"]] = _soft_minus_hard(c, of_both["soft"] == "b")
    return list(found.values())


def crossover_rows(report: Dict[str, Any]) -> List[Row]:
    """Of each student a row of names, and of each test set one of rates, and of delays where there are any.

    Only a header where no arms were compared.
    """
    made, sets = arms(report), tables.test_sets(report)
    by_name = {p["name"]: p for p in report["phases"]}
    records = {(r["phase"], r["mode"], r["method"], r["test_set"]): r for r in report["records"]}
    columns = {k: title for k, title in _COLUMNS.items() if any(k in arm["names"] for arm in made)}
    rows = [["student", "", *columns.values(), "soft - hard", "verdict"]]
    for arm in made:
        names = [arm["names"].get(k) for k in columns]
        rows.append([arm["student"], "phase", *(name or "-" for name in names), "-", "-"])
        for s in sets:
            of_set = arm["by_set"].get(s)
            found = [records.get((name, arm["mode"], arm["method"], s)) for name in names]
            told = [tables.difference_cell(of_set), _winner(of_set)] if of_set else ["-", "-"]
            rows.append(["", f"{s} WER %", *(r and tables.wer_cell(r) or "-" for r in found), *told])
        for s in sets:
            delays = [tables.delay_cell(by_name[n], arm["mode"], s) if n else "-" for n in names]
            if set(delays) != {"-"}:
                rows.append(["", f"{s} delay, frames (ms)", *delays, "-", "-"])
    return rows


def crossover_notes(report: Dict[str, Any]) -> List[str]:
    """Whether the crossover is there, on which test sets, and what the table's rows do not share."""
    made = arms(report)
    if not made:
        return []
    first = [arm for arm in made if arm["generation"] == 1]
    kinds = {
        "streaming student": [arm for arm in first if arm["is_streaming"] and not arm["is_self"]],
        "self-training": [arm for arm in first if arm["is_self"]],
    }
    wanted = {"streaming student": "hard", "self-training": "soft"}
    lacking = [kind for kind, of_kind in kinds.items() if not of_kind]
    if lacking:
        out = [f"{_CROSSOVER}: cannot be told, soft and hard targets of {lacking[0]} have not been compared."]
    else:
        told = []
        for s in tables.test_sets(report):
            winners = {
                kind: [_winner(a["by_set"][s]) for a in arms_ if s in a["by_set"]]
                for kind, arms_ in kinds.items()
            }
            is_shown = all(
                words and all(w.startswith(f"{wanted[kind]} better") for w in words)
                for kind, words in winners.items()
            )
            why = "; ".join(f"{kind}: {' and '.join(w) or 'not compared'}" for kind, w in winners.items())
            told.append(f"{'shown' if is_shown else 'not shown'} on {s} ({why})")
        out = [f"{_CROSSOVER}: {'; '.join(told)}."]
    by_name = {p["name"]: p for p in report["phases"]}
    out += filter(None, (_unequal(arm, by_name) for arm in made))
    return out + ([GENERATION_NOTE] if len(first) < len(made) else [])


def _arm(names: List[str], mode: str, method: str, by_name: Dict[str, Any]) -> Dict[str, Any]:
    """An arm without rates; empty where the two are not the same student."""
    hard, soft = (by_name[name] for name in names)
    generation = _generation(hard, by_name)
    if (_architecture(hard), generation) != (_architecture(soft), _generation(soft, by_name)):
        return {}
    labeller = by_name.get(hard["labelled_by"])
    is_self = labeller is not None and _architecture(labeller) == _architecture(hard)

    def is_alike(p: Dict[str, Any]) -> bool:
        """Another training of the same student from the same first weights."""
        is_same = p["begins_with"] == hard["begins_with"] and _architecture(p) == _architecture(hard)
        return is_same and not p["is_stale"]

    supervised = [
        n
        for n, p in by_name.items()
        if p["role"] == "control" and not phases.targets(p)
        if is_alike(p) and _updates(p) == _updates(hard)
    ]
    both = [
        n
        for n, p in by_name.items()
        if phases.targets(p) == "soft and hard" and soft["name"] in p["compare_with"]
        if is_alike(p) and _generation(p, by_name) == generation
    ]
    named = {"supervised": supervised[:1], "hard": names[:1], "soft": names[1:], "both": both[:1]}
    student = [mode, tables.millions(hard["params_deployed"]), *(["self-training"] if is_self else [])]
    student += [f"generation {generation}"] if generation > 1 else []
    return {
        "student": ", ".join(student), "names": {kind: found[0] for kind, found in named.items() if found},
        "is_streaming": mode == "streaming", "is_self": is_self, "generation": generation,
        "mode": mode, "method": method, "by_set": {},
    }  # fmt: skip


def _soft_minus_hard(c: Dict[str, Any], is_soft_b: bool) -> Dict[str, Any]:
    if is_soft_b:
        return {key: c[key] for key in ("difference", "low", "high", "p_value")}
    return {"difference": -c["difference"], "low": -c["high"], "high": -c["low"], "p_value": c["p_value"]}


def _winner(of_set: Dict[str, Any]) -> str:
    words = "soft better" if of_set["difference"] < 0 else "hard better"
    if of_set["p_value"] >= tables.SIGNIFICANT or not of_set["difference"]:
        words = "no difference shown"
    return f"{words}, {tables.p_text(of_set['p_value'])}"


def _architecture(phase: Dict[str, Any]) -> str:
    """The model section without what is only training's; phases that share it are the same student."""
    config = {"model": (phase["config"] or {}).get("model") or {}}
    try:
        config = cfg.to_dict(cfg.from_dict(config))
    except UserError:
        pass  # of another version; as it is, it tells as much
    flat = cfg.flat(config["model"])
    kept = {k: v for k, v in flat.items() if not k.endswith(("dropout", "label_smoothing"))}
    return json.dumps(kept, sort_keys=True)


def _generation(phase: Dict[str, Any], by_name: Dict[str, Any]) -> int:
    """1 for a student of a model that had no pseudo-labels itself."""
    labelled_by = {name: p["labelled_by"] for name, p in by_name.items()}
    return sum(bool(phases.targets(by_name[n])) for n in phases.walk_back(phase["name"], labelled_by))


def _updates(phase: Dict[str, Any]) -> Any:
    return ((phase["config"] or {}).get("train") or {}).get("max_steps")


def _unequal(arm: Dict[str, Any], by_name: Dict[str, Any]) -> str:
    """What else than the targets two arms do not share; empty where that is nothing."""
    hard, soft = (by_name[arm["names"][kind]] for kind in ("hard", "soft"))
    found = [key for key in checks.differing(hard, soft) if key not in _ARMS_DIFFER_IN]
    if arm["generation"] == 1:
        sets = {phases.recorded(p, "labels").get("sha256") for p in (hard, soft)}
        found += ["their pseudo-labels"] if len(sets) > 1 else []
        found += ["what they began with"] if hard["begins_with"] != soft["begins_with"] else []
    names = f"{hard['name']} and {soft['name']}"
    return f"{names} differ not only in their targets: {', '.join(found)}." if found else ""
