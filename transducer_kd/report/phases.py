"""How the phases of an experiment hang together, read from their configurations.

Nothing else says which phase is a teacher and which a student. A phase is distilled when its configuration
has a teacher, or when it began with the weights of one that had (a finetuning without distillation terms is
of a distilled student all the same); `<phase>_control` is `<phase>` without distillation; a teacher is one
that another phase names, and whatever shares its weights.
"""

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

Phase = Dict[str, Any]

CONTROL = "_control"
_LEARNS = {
    "transducer": "transducer",
    "distill": "transducer",
    "las": "LAS",
    "two_pass": "both passes",
}


def arrange(phases: List[Phase]) -> List[Phase]:
    """The phases in the order of training, controls after what they control; of a kind, large ones first.

    phases: dicts with name, params_deployed and config (None where unknown). Each gets

        role        "teacher" | "distilled" | "control" | "" where nothing tells
        teacher     the phase that taught it, or what it began with; None without one in this experiment
        control_of  for a control the phase (which may be missing) that it is to be compared with, else None
        has_las     whether there is a second pass
        what        a few words on what was trained from what
    """
    by_name = {p["name"]: p for p in phases}
    taught, own_teacher, init = set(), {}, {}
    for p in phases:
        config, name = p["config"] or {}, p["name"]
        teacher = _section(config, "teacher")
        init[name] = _phase_in(_section(config, "init"), name, by_name)
        own_teacher[name] = _phase_in(teacher, name, by_name) if teacher.get("kind") == "exp_dir" else None
        if teacher.get("kind", "none") != "none":
            taught.add(name)
        p["control_of"] = name[: -len(CONTROL)] if name.endswith(CONTROL) else None
        p["has_las"] = bool(_section(_section(config, "model"), "las").get("enabled"))
        p["what"] = _what(p, init[name], own_teacher[name])
    for p in phases:
        lineage = list(_lineage(p["control_of"] or p["name"], init))
        is_distilled = not p["control_of"] and not taught.isdisjoint(lineage)
        p["teacher"] = next((own_teacher[n] for n in lineage if own_teacher.get(n)), None)
        p["role"] = "control" if p["control_of"] else "distilled" if is_distilled else ""
    for name in _family({t for t in own_teacher.values() if t}, init):
        by_name[name]["role"] = by_name[name]["role"] or "teacher"

    def place(p: Phase) -> Any:
        like = by_name.get(p["control_of"], p)
        depth = _depth(like["name"], init, own_teacher)
        return depth, -(like["params_deployed"] or 0), like["name"], p is not like

    return sorted(phases, key=place)


def teachers(phases: List[Phase]) -> List[Phase]:
    """Largest first."""
    found = [p for p in phases if p["role"] == "teacher"]
    return sorted(found, key=lambda p: -(p["params_deployed"] or 0))


def _section(tree: Dict[str, Any], name: str) -> Dict[str, Any]:
    value = tree.get(name)
    return value if isinstance(value, dict) else {}


def _phase_in(section: Dict[str, Any], own_name: str, known: Dict[str, Phase]) -> Optional[str]:
    """The phase that section's exp_dir names; None where that is not of this experiment."""
    name = Path(str(section.get("exp_dir") or "")).name
    return name if name in known and name != own_name else None


def _what(phase: Phase, init: Optional[str], teacher: Optional[str]) -> str:
    config = phase["config"] or {}
    learns = _LEARNS.get(config.get("objective"), "")
    if phase["control_of"]:
        return f"{phase['control_of']} without distillation"
    if not learns:
        return "-"
    if init:
        learns = f"LAS on {init}" if learns == "LAS" else f"{init}, {learns} finetuned"
    kind = _section(config, "teacher").get("kind", "none")
    return learns if kind == "none" else f"{learns}, distilled from {teacher or 'another model'}"


def _lineage(name: Optional[str], init: Dict[str, Optional[str]]) -> Iterator[str]:
    """The phase, what it began with, what that began with."""
    seen = set()
    while name and name not in seen:
        yield name
        seen.add(name)
        name = init.get(name)


def _family(named: set, init: Dict[str, Optional[str]]) -> set:
    """All that share weights with `named`: what they began with, and what began with them."""
    family = {ancestor for name in named for ancestor in _lineage(name, init)}
    return family | {name for name in init if not family.isdisjoint(_lineage(name, init))}


def _depth(name: str, *parents: Dict[str, Optional[str]], above: frozenset = frozenset()) -> int:
    """How many phases had to be trained before, one after the other."""
    found = [p[name] for p in parents if p.get(name) and p[name] not in above]
    return max((1 + _depth(n, *parents, above=above | {name}) for n in found), default=0)
