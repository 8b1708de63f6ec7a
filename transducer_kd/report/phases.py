"""How the phases of an experiment hang together, read from their configurations.

Nothing else says which phase is a teacher and which a student. A phase is distilled when its configuration
has a teacher or pseudo-labels, or when it began with the weights of one that had; a teacher is one that
taught or labelled for another phase, and whatever shares its weights. Two kinds of control are known by their
names: `<phase>_control` repeats all that led to `<phase>` without a teacher, `<phase>_nokd` begins with what
`<phase>` began with and leaves out the distillation terms of this one phase. What is neither taught nor a
teacher itself is a control as well if another phase is to be compared with it (`compare_with`), unless it is
what is compared with most phases, or if a distilled one began with it.
"""

from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Set

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
    "dual_mode": "transducer in both modes",
    "wav2vec2": "wav2vec 2.0",
}
_GROUPS = {"unit": "units", "block8x1": "8x1 blocks"}


def arrange(phases: List[Phase], exp_dir: Path, label_sets: Sequence[Dict[str, Any]] = ()) -> List[Phase]:
    """The phases in the order of training, controls after the one they control and before the ones that are
    compared with them, what is beside a chain of steps last; of a kind, large ones first.

    phases: dicts with name, params_deployed, and config and meta (None where unknown); exp_dir holds their
    folders. label_sets: dicts with the `name` of a folder of exp_dir/labels and its `summary` (None: not
    finished); they get `labelled_by`, the phase or None. Each phase gets

        label_set   the one of these that it learns from, else None

        role        "teacher" | "distilled" | "control" | "" where nothing tells
        begins_with, learns_from, labelled_by
                    the phase of which its first weights are, its own teacher, and who made its pseudo-labels;
                    None without one in exp_dir
        is_selected whether its first weights are a part of those of begins_with
        is_extracted
                    see is_extracted
        teacher     the first teacher of the chain that taught it, or what it began with; None without one in
                    this experiment
        control_of  for a control the phase (which may be missing) that it is to be compared with, else None
        compare_with
                    the phases (which may be missing) that its configuration says to compare it with
        has_las     whether there is a second pass
        what        a few words on what was trained from what
    """
    by_name = {p["name"]: p for p in phases}
    folders = {(exp_dir / name).resolve(): name for name in by_name}
    for made in label_sets:
        path = _section(made["summary"], "teacher").get("path") or exp_dir / made["name"]
        made["labelled_by"] = folders.get((_ROOT / path).resolve())
    labelled_by = {made["name"]: made["labelled_by"] for made in label_sets}
    label_folders = {(exp_dir / "labels" / name).resolve(): name for name in labelled_by}
    for p in phases:
        p["begins_with"] = _origin(p, "init", folders)
        p["learns_from"] = _origin(p, "teacher", folders) if teacher_kind(p) == "exp_dir" else None
        p["label_set"] = _origin(p, "labels", label_folders) if targets(p) else None
        p["labelled_by"] = labelled_by.get(p["label_set"])
        p["is_selected"] = bool(recorded(p, "init").get("selected_from"))
        p["is_extracted"] = is_extracted(p, exp_dir / p["name"])
        p["control_of"] = next((p["name"][: -len(end)] for end in ARMS if p["name"].endswith(end)), None)
        p["compare_with"] = list((p["config"] or {}).get("compare_with") or [])
        p["has_las"] = bool(_section(_section(p["config"], "model"), "las").get("enabled"))
        p["what"] = _what(p, by_name.get(p["begins_with"]))
    init = {p["name"]: p["begins_with"] for p in phases}
    own_teacher = {p["name"]: p["learns_from"] or p["labelled_by"] for p in phases}
    for p in phases:
        p["teacher"] = _first_teacher(p["control_of"] or p["name"], init, own_teacher)
    _give_roles(phases, init, {t for t in own_teacher.values() if t})

    beside = sidelines(phases)

    def place(p: Phase) -> Any:
        like = by_name.get(p["control_of"], p)  # a control stands behind its phase
        kind = like["name"] in beside, _depth(like["name"], by_name), like["role"] != "teacher"
        of_kind = -(like["params_deployed"] or 0), like["role"] != "control", like["name"]
        return *kind, *of_kind, p is not like, p["name"]

    return sorted(phases, key=place)


def teachers(phases: List[Phase]) -> List[Phase]:
    """Largest first, without those whose weights are no longer what was taught from (checks.mark_stale)."""
    found = [p for p in phases if p["role"] == "teacher" and not p.get("is_stale")]
    return sorted(found, key=lambda p: -(p["params_deployed"] or 0))


def teacher_kind(phase: Phase) -> str:
    """none | exp_dir | torchscript, as the phase's configuration says."""
    return _section(phase["config"], "teacher").get("kind", "none")


def is_pretraining(phase: Phase) -> bool:
    """Whether the phase knows no text, so that it is never decoded."""
    return _objective(phase) == "wav2vec2"


def is_extracted(phase: Phase, folder: Path) -> bool:
    """Whether the phase in `folder` is what local/compress.py --extract made of another: nothing was trained,
    and the weights that it begins with are its own."""
    init = recorded(phase, "init")
    path = (_ROOT / str(init.get("path") or "")).resolve()
    return bool(init.get("selected_from")) and path == folder.resolve()


def has_two_modes(phase: Phase) -> bool:
    """Whether the phase was trained offline and streaming, to recognise speech."""
    return _objective(phase) == "dual_mode"


def has_masks(phase: Phase) -> bool:
    """Whether it leaves weights out when it streams. Not what was extracted of such a phase."""
    return _section(phase["config"], "model").get("pruned_groups", "none") != "none"


def targets(phase: Phase) -> str:
    """hard | soft | soft and hard: what the phase learns from on pseudo-labelled speech; empty without."""
    config = phase["config"]
    if not _section(config, "data").get("pseudo_labels"):
        return ""
    if _section(config, "distill").get("weight", 0) == 0:
        return "hard"
    return "soft" if _section(config, "loss").get("pseudo_weight", 1) == 0 else "soft and hard"


def parents(phase: Phase) -> List[str]:
    """The phases that it came from: began with, learnt from, was labelled for by."""
    found = (phase["begins_with"], phase["learns_from"], phase["labelled_by"])
    return list(dict.fromkeys(filter(None, found)))


def ancestors(name: str, by_name: Dict[str, Phase]) -> Set[str]:
    """The phases that it came from, those that they came from, and so on."""
    found: Set[str] = set()
    waiting = parents(by_name[name])
    while waiting:
        parent = waiting.pop()
        if parent not in found:
            found.add(parent)
            waiting += parents(by_name[parent])
    return found - {name}


def steps(phases: List[Phase]) -> List[List[str]]:
    """Chains of a teacher and two trainings or more, each taught by the one before it and smaller."""
    by_name = {p["name"]: p for p in phases}

    def chain_to(phase: Phase) -> List[str]:
        teacher = by_name.get(phase["learns_from"] or phase["labelled_by"])
        size, larger = (p and p["params_deployed"] or 0 for p in (phase, teacher))
        return [*(chain_to(teacher) if 0 < size < larger else []), phase["name"]]

    chains = [chain_to(p) for p in phases]
    going_on = [chain[:-1] for chain in chains]
    return [chain for chain in chains if len(chain) > 2 and chain not in going_on]


def sidelines(phases: List[Phase]) -> Set[str]:
    """Beside chains of steps: what somebody is compared with, and the steps that led to that alone."""
    chains, named = steps(phases), _named(phases)
    if not chains:
        return set()
    main = {name for chain in chains if chain[-1] not in named for name in chain}
    return named.union(*chains) - main


def recorded(phase: Phase, key: str) -> Dict[str, Any]:
    """What training recorded of the origin init, teacher or labels."""
    return _section(_section(phase.get("meta"), "origins"), key)


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
    """Of init, teacher or labels: as training recorded it, or else as its configuration says; empty without.

    Of first weights that were selected from another phase's: that phase's.
    """
    origin = recorded(phase, key)
    origin = _section(origin, "selected_from") or origin
    section, name = ("data", "pseudo_labels") if key == "labels" else (key, "exp_dir")
    return str(origin.get("path") or _section(phase["config"], section).get(name) or "")


def _origin(phase: Phase, key: str, folders: Dict[Path, str]) -> Optional[str]:
    """The one of these phases or label sets that init, teacher or labels is; None where that is not of this
    experiment, whatever it is called."""
    path = _path(phase, key)
    name = folders.get((_ROOT / path).resolve()) if path else None
    return name if name != phase["name"] else None


def _objective(phase: Phase) -> Optional[str]:
    return (phase["config"] or {}).get("objective")


def _what(phase: Phase, begun: Optional[Phase]) -> str:
    """begun: the phase that it begins with."""
    learns = _LEARNS.get(_objective(phase), "")
    if phase["control_of"]:
        return next(f"{phase['control_of']} {what}" for e, what in ARMS.items() if phase["name"].endswith(e))
    if not learns:
        return "-"
    if _path(phase, "init"):
        init = phase["begins_with"] or "another model"
        if phase["is_extracted"]:
            return f"streaming mode of {init} by itself"
        if begun and is_pretraining(begun):
            learns = f"{learns} on the encoder of {init}"
        elif learns == "LAS":
            learns = f"LAS on {init}"
        else:
            learns = f"{init} finetuned" if learns == "transducer" else f"{init}, {learns} finetuned"
        if phase["is_selected"]:
            count = _section(_section(phase["config"], "model"), "encoder").get("num_layers", "some")
            learns = f"{count} layers selected of {init}"
    learns += _left_out(phase) + _taught_in_place(phase)
    if targets(phase):
        shift = _section(phase["config"], "distill").get("frame_shift")
        learns += f", {targets(phase)} targets of {phase['labelled_by'] or 'another model'}"
        return learns + (f", frame shift {shift}" if shift and targets(phase) != "hard" else "")
    if teacher_kind(phase) == "none":
        return learns
    return f"{learns}, distilled from {phase['learns_from'] or 'another model'}"


def _left_out(phase: Phase) -> str:
    """What a phase does without: weights when it streams, and some of the speech."""
    sparsity = _section(phase["config"], "pruning").get("sparsity", 0)
    groups = _GROUPS.get(_section(phase["config"], "model").get("pruned_groups"), "")
    share = _section(phase["config"], "data").get("train_share", 1)
    told = f", {100 * sparsity:g} % of {groups} left out" if groups and sparsity else ""
    return told + (f", {100 * share:g} % of the speech" if share < 1 else "")


def _taught_in_place(phase: Phase) -> str:
    """Where the streaming mode learns from what the offline mode says of the same batch."""
    distill = _section(phase["config"], "distill")
    if not has_two_modes(phase) or not distill.get("weight"):
        return ""
    begin, shift = distill.get("begin_step"), distill.get("frame_shift")
    told = ", in-place distillation" + (f" from update {begin:,} on" if begin else "")
    return told + (f", frame shift {shift}" if shift else "")


def _named(phases: List[Phase]) -> Set[str]:
    """What somebody is to be compared with."""
    return {name for p in phases for name in p["compare_with"]}


def _give_roles(phases: List[Phase], init: Dict[str, Optional[str]], teach: Set[str]) -> None:
    """teach: the phases that another one learns from, or was labelled for by."""
    taught = {p["name"] for p in phases if teacher_kind(p) != "none" or targets(p)}
    named, begun = _named(phases), {init[name] for name in taught}
    most = max((len(p["compare_with"]) for p in phases), default=0)
    # What was selected of a teacher is another model.
    shared = {p["name"]: None if p["is_selected"] else p["begins_with"] for p in phases}
    first_weights = {name: list(walk_back(name, shared))[-1] for name in shared}
    of_teachers = {first_weights[name] for name in teach}
    for p in phases:
        name, p["role"] = p["name"], ""
        if p["control_of"]:
            p["role"] = "control"
        elif not taught.isdisjoint(walk_back(name, init)):
            p["role"] = "distilled"
        elif name in named - teach and len(p["compare_with"]) < most:
            p["role"] = "control"
        elif first_weights[name] in of_teachers:
            p["role"] = "teacher"
        elif name in begun:
            p["role"] = "control"


def _first_teacher(
    name: str, init: Dict[str, Optional[str]], own_teacher: Dict[str, Optional[str]]
) -> Optional[str]:
    """The teacher that was taught by nobody, at the beginning of the chain that ends with `name`."""
    found, seen = None, set()
    while name not in seen:
        seen.add(name)
        own = next((own_teacher[n] for n in walk_back(name, init) if own_teacher.get(n)), None)
        if own is None or own in seen:
            break
        found = name = own
    return found


def _depth(name: str, by_name: Dict[str, Phase], above: frozenset = frozenset()) -> int:
    """How many phases had to be trained before, one after the other."""
    found = [parent for parent in parents(by_name[name]) if parent not in above]
    return max((1 + _depth(parent, by_name, above | {name}) for parent in found), default=0)
