"""Which phases of an experiment may be compared: what was trained again, and controls that are none."""

from typing import Any, Dict, List, Optional, Sequence

from transducer_kd import config as cfg
from transducer_kd.log import UserError
from transducer_kd.report.phases import CONTROL, Phase, parents, recorded, teacher_kind, walk_back

# A control shares all of these with its phase, but for the settings of distillation and of where data are.
_SECTIONS = ("model", "loss", "two_pass", "spec_augment", "data", "optim")
_OF_TRAIN = ("max_steps", "accumulate", "seed")
_MAY_DIFFER = {
    "data.fbank_dir",
    "data.lang_dir",
    "data.num_workers",
    "two_pass.las_kd_weight",
    "two_pass.las_kd_temperature",
}


def mark_stale(
    phases: List[Phase], stages: List[Dict[str, Any]], label_sets: Sequence[Dict[str, Any]] = ()
) -> List[str]:
    """Give each phase `is_stale`: what it came from is no longer what is there. A sentence for each.

    phases: as phases.arrange returns them, with `ended`, when run.sh's training ended (None: not, or not by
    run.sh). stages: the steps that ran, to name the one that trains the phase. label_sets: dicts with name
    and summary.
    """
    labelled = {made["name"]: (made["summary"] or {}).get("sha256") for made in label_sets}
    by_name = {p["name"]: p for p in phases}
    told = []
    for p in phases:
        why = _why_stale(p["name"], by_name, labelled)
        p["is_stale"] = why is not None
        if why:
            stage = next((s["stage"] for s in stages if s["name"] == p["name"]), None)
            how = "train and decode it again" if stage is None else f"run stage {stage} again, then decode"
            told.append(f"phase {p['name']} is stale and left out of all comparisons: {why}; {how}")
    return told


def mark_unlike(phases: List[Phase]) -> List[str]:
    """Give each control `is_unlike`: it is none of what it is named after. A sentence for each.

    Compared are the control with its phase, and what the one began with with what the other did.
    """
    by_name = {p["name"]: p for p in phases}
    told = []
    for control in phases:
        phase = by_name.get(control["control_of"])
        found = _differences(phase, control, by_name) if phase else []
        control["is_unlike"] = bool(found)
        if found:
            told.append(
                f"{phase['name']} is not compared with {control['name']}, which was trained otherwise: "
                + "; ".join(found)
            )
    return told


def not_there(phases: List[Phase]) -> List[str]:
    """A sentence for each phase that another one is to be compared with and that is not there."""
    names = {p["name"] for p in phases}
    return [
        f"phase {p['name']} is to be compared with {name}, which has not been trained"
        for p in phases
        for name in p["compare_with"]
        if name not in names
    ]


def _why_stale(
    name: str, phases: Dict[str, Phase], labelled: Dict[str, Any], above: frozenset = frozenset()
) -> Optional[str]:
    own = phases[name]
    learnt = recorded(own, "labels").get("sha256")
    if None not in (learnt, labelled.get(own["label_set"])) and learnt != labelled[own["label_set"]]:
        return "its pseudo-labels were made again and are others now"
    for parent in parents(own):
        if parent in above:
            continue
        ended = phases[parent]["ended"]
        if own["ended"] is not None and ended is None:
            return f"the training of {parent} has begun again and not ended"
        if own["ended"] is not None and ended > own["ended"]:
            return f"{parent} was trained again after it"
        # What an earlier ancestor makes stale is handed down.
        if _why_stale(parent, phases, labelled, above | {name}):
            return f"{parent} is stale"
    return None


def _differences(phase: Phase, control: Phase, by_name: Dict[str, Phase]) -> List[str]:
    init = {name: p["begins_with"] for name, p in by_name.items()}
    chains = [list(walk_back(p["name"], init)) for p in (phase, control)]
    found = []
    for names in zip(*chains):
        keys = differing(*(by_name[name] for name in names)) if len(set(names)) > 1 else []
        found += [f"{', '.join(keys)} of {' and '.join(names)} differ"] if keys else []
    repeats_all = control["name"].endswith(CONTROL)
    if len(chains[0]) != len(chains[1]) or not (repeats_all or chains[0][1:] == chains[1][1:]):
        found.append("it did not begin with the like")
    if repeats_all:
        found += [f"{name} has a teacher" for name in chains[1] if teacher_kind(by_name[name]) != "none"]
    return found


def differing(a: Phase, b: Phase) -> List[str]:
    """The settings that are not the same, among those that a control shares with its phase."""
    if not (a["config"] and b["config"]):
        return ["config.json"]
    try:
        of_a, of_b = _settings(a), _settings(b)
    except UserError as e:
        return [f"config.json ({e})"]
    return [key for key in of_a if of_a[key] != of_b[key]]


def _settings(phase: Phase) -> Dict[str, Any]:
    """Of a flat configuration what a control shares. Through the dataclasses: what was not there had its
    default."""
    config = cfg.to_dict(cfg.from_dict(phase["config"], f"{phase['name']}/config.json"))
    kept = {name: config[name] for name in _SECTIONS}
    kept["train"] = {name: config["train"][name] for name in _OF_TRAIN}
    return {key: value for key, value in cfg.flat(kept).items() if key not in _MAY_DIFFER}
