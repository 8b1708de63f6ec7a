"""How the phases of an experiment hang together, read from their configurations.

Nothing else says which phase is a teacher and which a student. A phase is distilled when its configuration
has a teacher, or when it began with the weights of one that had; a teacher is one that another phase names,
and whatever shares its weights. Two kinds of control are known by their names: `<phase>_control` repeats all
that led to `<phase>` without a teacher, `<phase>_nokd` begins with what `<phase>` began with and leaves out
the distillation terms of this one phase.
"""

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

Phase = Dict[str, Any]

CONTROL, NO_KD = "_control", "_nokd"
# Ending of a control's name -> what its training was.
ARMS = {CONTROL: "without distillation", NO_KD: "without its distillation terms"}

_ROOT = Path(__file__).resolve().parents[2]  # where run.sh runs, so what relative paths are relative to
_LEARNS = {
    "transducer": "transducer",
    "distill": "transducer",
    "las": "LAS",
    "two_pass": "both passes",
}


def arrange(phases: List[Phase], exp_dir: Path) -> List[Phase]:
    """The phases in the order of training, controls after what they control; of a kind, large ones first.

    phases: dicts with name, params_deployed, and config and meta (None where unknown); exp_dir holds their
    folders. Each gets

        role        "teacher" | "distilled" | "control" | "" where nothing tells
        begins_with, learns_from
                    the phase of which its first weights are, and its own teacher; None without one in exp_dir
        teacher     the phase that taught it, or what it began with; None without one in this experiment
        control_of  for a control the phase (which may be missing) that it is to be compared with, else None
        has_las     whether there is a second pass
        what        a few words on what was trained from what
    """
    by_name = {p["name"]: p for p in phases}
    folders = {(exp_dir / name).resolve(): name for name in by_name}
    for p in phases:
        p["begins_with"] = _origin(p, "init", folders)
        p["learns_from"] = _origin(p, "teacher", folders) if teacher_kind(p) == "exp_dir" else None
        p["control_of"] = next((p["name"][: -len(end)] for end in ARMS if p["name"].endswith(end)), None)
        p["has_las"] = bool(_section(_section(p["config"], "model"), "las").get("enabled"))
        p["what"] = _what(p)
    init = {p["name"]: p["begins_with"] for p in phases}
    own_teacher = {p["name"]: p["learns_from"] for p in phases}
    taught = {p["name"] for p in phases if teacher_kind(p) != "none"}
    for p in phases:
        lineage = list(walk_back(p["control_of"] or p["name"], init))
        is_distilled = not p["control_of"] and not taught.isdisjoint(lineage)
        p["teacher"] = next((own_teacher[n] for n in lineage if own_teacher.get(n)), None)
        p["role"] = "control" if p["control_of"] else "distilled" if is_distilled else ""
    for name in _family({t for t in own_teacher.values() if t}, init):
        by_name[name]["role"] = by_name[name]["role"] or "teacher"

    def place(p: Phase) -> Any:
        like = by_name.get(p["control_of"], p)
        depth = _depth(like["name"], init, own_teacher)
        return depth, -(like["params_deployed"] or 0), like["name"], p is not like, p["name"]

    return sorted(phases, key=place)


def teachers(phases: List[Phase]) -> List[Phase]:
    """Largest first, without those whose weights are no longer what was taught from (checks.mark_stale)."""
    found = [p for p in phases if p["role"] == "teacher" and not p.get("is_stale")]
    return sorted(found, key=lambda p: -(p["params_deployed"] or 0))


def teacher_kind(phase: Phase) -> str:
    """none | exp_dir | torchscript, as the phase's configuration says."""
    return _section(phase["config"], "teacher").get("kind", "none")


def walk_back(name: Optional[str], init: Dict[str, Optional[str]]) -> Iterator[str]:
    """The phase, what it began with, what that began with."""
    seen = set()
    while name and name not in seen:
        yield name
        seen.add(name)
        name = init.get(name)


def _section(tree: Optional[Dict[str, Any]], name: str) -> Dict[str, Any]:
    value = (tree or {}).get(name)
    return value if isinstance(value, dict) else {}


def _path(phase: Phase, key: str) -> str:
    """Of init or teacher: as training recorded it, or else as its configuration says; empty without."""
    recorded = _section(_section(phase.get("meta"), "origins"), key).get("path")
    return str(recorded or _section(phase["config"], key).get("exp_dir") or "")


def _origin(phase: Phase, key: str, folders: Dict[Path, str]) -> Optional[str]:
    """The phase that init or teacher is; None where that is not of this experiment, whatever it is called."""
    path = _path(phase, key)
    name = folders.get((_ROOT / path).resolve()) if path else None
    return name if name != phase["name"] else None


def _what(phase: Phase) -> str:
    learns = _LEARNS.get((phase["config"] or {}).get("objective"), "")
    if phase["control_of"]:
        return next(f"{phase['control_of']} {what}" for e, what in ARMS.items() if phase["name"].endswith(e))
    if not learns:
        return "-"
    if _path(phase, "init"):
        init = phase["begins_with"] or "another model"
        learns = f"LAS on {init}" if learns == "LAS" else f"{init}, {learns} finetuned"
    if teacher_kind(phase) == "none":
        return learns
    return f"{learns}, distilled from {phase['learns_from'] or 'another model'}"


def _family(named: set, init: Dict[str, Optional[str]]) -> set:
    """All that share weights with `named`: what they began with, and what began with them."""
    family = {ancestor for name in named for ancestor in walk_back(name, init)}
    return family | {name for name in init if not family.isdisjoint(walk_back(name, init))}


def _depth(name: str, *parents: Dict[str, Optional[str]], above: frozenset = frozenset()) -> int:
    """How many phases had to be trained before, one after the other."""
    found = [p[name] for p in parents if p.get(name) and p[name] not in above]
    return max((1 + _depth(n, *parents, above=above | {name}) for n in found), default=0)
