"""Figures of a report as inline SVG.

Text stays text (searchable, in the page's font) and takes the page's colours: lines and letters are drawn in
marker colours that are replaced by CSS ones in the end, so that one picture serves a light and a dark page.
"""

import io
import math
import re
from itertools import cycle
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from transducer_kd.report import device, tables
from transducer_kd.report.phases import NO_KD, has_two_modes, is_pretraining, sidelines, steps
from transducer_kd.report.systems import has_named, systems
from transducer_kd.report.tables import rescored_text

# Marker colours -> what the page draws.
_INK, _FAINT = "#010203", "#040506"
_CSS = {_INK: "currentColor", _FAINT: "var(--line)"}

# Distinguishable with red-green blindness, and legible on white and on near-black.
_COLOURS = (
    "#2f7ed8", "#e07b1f", "#1fa187", "#c2559d", "#8f8f2f", "#7a6fd0", "#b5523b", "#4f97a3", "#5aad3c",
    "#b08b5e",
)  # fmt: skip

_WIDTH = 9.2  # inches, of every figure

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "transducer_kd",  # the same figure gives the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}

_SIZE_TEXT = (
    "Each system's best method, rescored where there is a LAS, with 95 % intervals; all parameters that this "
    "runs. Squares are teachers, small crosses controls (upright: finetuned without distillation terms) in "
    "the colour of what they control; triangles stream. Models of one size are drawn side by side."
)
_NAMED_TEXT = (
    "Each system's best method, 95 % intervals. Squares are teachers, small crosses controls; where both "
    "modes are shown, triangles stream (small, pointing down: controls). Half-filled: the second use of a "
    "colour. Models of one size are drawn side by side."
)
_STEPS_TEXT = (
    " Lines join the steps of a chain, each taught by the one before it; dotted lines and diamonds are what "
    "another system is compared with."
)
_PASS_TEXT = (
    "Of each system above the first pass, below what the LAS makes of {rescored} (strong colour), with 95 % "
    "intervals. Hollow: the oracle of the whole list, a bound. Squares are teachers, small crosses controls."
)
_METHOD_TEXT = "Points are word error rates, bars their 95 % intervals. Hollow: an oracle, which is a bound."
_DEVICE_TEXT = (
    "What the device runs, first pass, through sherpa-onnx: filled float, hollow int8, a shape per test set. "
    "Lines lead from float to int8: to the left is smaller or faster, up is more errors."
)
_CURVE_TEXT = (
    "Losses per encoder frame (40 ms). The WER is that of a few dev utterances, decoded greedily; none is "
    "shown where the first pass is frozen."
)
_PRETRAINING_TEXT = (
    "Losses per encoder frame (40 ms). Accuracy: how often the hidden frame is told from the distractors; "
    "chance: what guessing would find."
)


class Drawing(NamedTuple):
    """A figure on the page."""

    title: str
    svg: str
    text: str  # what to see
    is_folded: bool = False  # shown on demand: with many phases the page would not end


def figures(report: Dict[str, Any]) -> List[Drawing]:
    """Every figure that has data."""
    found = []
    has_many = len(report["phases"]) > 2
    with matplotlib.rc_context(_STYLE):
        if report["records"]:
            of_all = systems(report)
            if any(system["headline"] for system in of_all):
                by_size, seen = (
                    _svg(wer_against_size(report)),
                    _NAMED_TEXT if has_named(report) else _SIZE_TEXT,
                )
                seen += _STEPS_TEXT if steps(report["phases"]) else ""
                found.append(Drawing("Word error rate against size", by_size, seen))
            if any(system["rescored"] for system in of_all):
                by_pass, seen = _svg(wer_by_pass(report)), _PASS_TEXT.format(rescored=rescored_text(report))
                found.append(Drawing("Word error rate of the first and the second pass", by_pass, seen))
            by_method = _svg(wer_by_method(report))
            found.append(Drawing("Word error rate by decoding method", by_method, _METHOD_TEXT, has_many))
        if any(d.words for d in device.deployed(report)):
            on_device = _svg(wer_on_device(report))
            found.append(Drawing("Word error rate on the device", on_device, _DEVICE_TEXT))
        for phase in report["phases"]:
            if phase["training"]:
                title = f"Learning curves: {tables.labels(report)[phase['name']]}"
                seen = _PRETRAINING_TEXT if is_pretraining(phase) else _CURVE_TEXT
                found.append(Drawing(title, _svg(learning_curves(phase)), seen, has_many))
        if report["stages"]:
            found.append(Drawing("Time of each stage", _svg(stage_times(report)), ""))
    return found


def wer_against_size(report: Dict[str, Any]) -> Figure:
    """One panel per test set, one point per system that was decoded; the steps of a chain are joined."""
    sets, shown = tables.test_sets(report), [s for s in systems(report) if s["headline"]]
    largest = max(r["params_deployed"] for r in report["records"]) / 1e6
    longest = max(len(system["label"]) for system in shown)
    lines = math.ceil(len(shown) / max(130 // (longest + 8), 1))  # of the legend
    figure, panels = _panels(len(sets), height=3.4 + 0.18 * max(lines - 3, 0))
    legend = {}
    for panel, name in zip(panels, sets):
        points: Dict[str, Tuple[float, float]] = {}
        sizes: List[float] = []
        highest = 0.0
        for system in shown:
            if name not in system["headline"]:
                continue
            r = system["headline"][name]
            size = r["params_deployed"] / 1e6
            # Models of one size stand beside each other: their intervals would hide one another.
            x = size + 0.025 * largest * sizes.count(size)
            sizes.append(size)
            points.setdefault(r["phase"], (x, r["wer"]))
            highest = max(highest, r["wer_high"])
            below_above = [[max(r["wer"] - r["wer_low"], 0.0)], [max(r["wer_high"] - r["wer"], 0.0)]]
            style = {**_point(report, r["phase"], r["mode"]), "capsize": 2, "elinewidth": 1.0}
            legend[system["label"]] = panel.errorbar([x], [r["wer"]], yerr=below_above, **style)
        for chain in steps(report["phases"]):
            style = {"color": _point(report, chain[-1], "")["color"], "linewidth": 1.0, "zorder": 1.5}
            style["linestyle"] = ":" if chain[-1] in sidelines(report["phases"]) else "-"
            panel.plot(*zip(*(points[p] for p in chain if p in points)), **style)
        # Both axes from zero: half the size, or half the errors, then looks like half.
        panel.set(
            xlim=(0, largest * 1.25), ylim=(0, highest * 1.1 or 1), title=name, xlabel="million parameters"
        )
    panels[0].set_ylabel("WER %")
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=math.ceil(len(shown) / lines))
    return figure


def wer_by_pass(report: Dict[str, Any]) -> Figure:
    """One panel per test set, one line per system: first pass, rescored, oracle."""
    sets = tables.test_sets(report)
    shown = [system for system in systems(report) if system["headline"]]
    figure, panels = _panels(len(sets), height=0.9 + 0.42 * len(shown), share_y=True)
    for panel, name in zip(panels, sets):
        highest = 0.0
        for y, system in enumerate(shown):
            is_strong = {"first": not system["rescored"], "rescored": True}
            for part, offset in (("first", -0.15), ("rescored", 0.15), ("oracle", 0.0)):
                r = system[part].get(name)
                if r is None:
                    continue
                highest = max(highest, r["wer_high"])
                style = _point(report, r["phase"], r["mode"])
                if part == "oracle":
                    panel.plot([r["wer"]], [y], **{**style, "markerfacecolor": "none"})
                    continue
                alpha = 1.0 if is_strong[part] else 0.45
                span = {"color": style["color"], "linewidth": 2.2, "alpha": 0.5 * alpha}
                panel.plot([r["wer_low"], r["wer_high"]], [y + offset] * 2, **span)
                panel.plot([r["wer"]], [y + offset], alpha=alpha, **style)
        panel.set_yticks(range(len(shown)), [system["label"] for system in shown])
        panel.set(xlim=(0, highest * 1.08 or 1), ylim=(len(shown) - 0.5, -0.5), title=name, xlabel="WER %")
    return figure


def wer_by_method(report: Dict[str, Any]) -> Figure:
    """One panel per test set, one line per phase, mode and method."""
    decodings, sets, names = tables.decodings(report), tables.test_sets(report), tables.labels(report)
    figure, panels = _panels(len(sets), height=0.9 + 0.26 * len(decodings), share_y=True)
    for panel, name in zip(panels, sets):
        highest = 0.0
        for y, ((phase, mode, method), by_set) in enumerate(decodings):
            if name not in by_set:
                continue
            r = by_set[name]
            highest = max(highest, r["wer_high"])
            style = _point(report, phase, mode)
            panel.plot([r["wer_low"], r["wer_high"]], [y, y], color=style["color"], linewidth=2.2, alpha=0.45)
            face = "none" if "oracle" in method else style["color"]
            panel.plot([r["wer"]], [y], markerfacecolor=face, **style)
        panel.set_yticks(range(len(decodings)), _labels([(names[who[0]], *who[1:]) for who, _ in decodings]))
        panel.set(
            xlim=(0, highest * 1.08 or 1), ylim=(len(decodings) - 0.5, -0.5), title=name, xlabel="WER %"
        )
    return figure


def wer_on_device(report: Dict[str, Any]) -> Figure:
    """WER against bytes on disk and against RTF: a point per phase, precision and test set."""
    shown = [d for d in device.deployed(report) if d.words and not d.has_las]
    shapes = dict(zip(device.test_sets(report), cycle("osD^vX")))
    colours = _device_colours(report, shown)
    who = {f"{d.phase} {d.precision}": {**_of_precision(colours, d), "marker": "o"} for d in shown}
    who.update(
        {name: {"color": _INK, "marker": shape, "linestyle": "none"} for name, shape in shapes.items()}
    )
    # About what a letter and a mark take; constrained layout lets a legend that is too wide run off the page.
    columns = max(1, min(len(who), 5, int(_WIDTH / (0.075 * max(map(len, who)) + 0.6))))
    figure, panels = _panels(2, height=3.4 + 0.2 * math.ceil(len(who) / columns))
    sizes = [(1e-6 * d.bytes, d) for d in shown]
    times = [(d.timing["rtf"], d) for d in shown if d.timing]
    for panel, places, label in zip(panels, (sizes, times), ("MB on disk", "real-time factor")):
        for (x, d), (next_x, other) in zip(places, [*places[1:], (0.0, None)]):
            style = _of_precision(colours, d)
            for name, row in d.words.items():
                panel.plot([x], [row["wer"]], marker=shapes[name], **style)
                if other and other.phase == d.phase and name in other.words:
                    rates = [row["wer"], other.words[name]["wer"]]
                    panel.plot([x, next_x], rates, color=style["color"], linewidth=0.8, zorder=1.5)
        found = [x for x, _ in places] or [1.0]
        panel.set(xlim=(0, 1.1 * max(found)), xlabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(5))
        if min(found) > 0 and max(found) > 8 * min(found):  # otherwise the small ones are one heap
            panel.set(xscale="log", xlim=(0.8 * min(found), 1.25 * max(found)))
            _mark_1_2_5(panel.xaxis)
    highest = max(row["wer"] for d in shown for row in d.words.values())
    for panel in panels:
        panel.set_ylim(0, 1.1 * highest or 1)
    panels[0].set_ylabel("WER %")
    handles = [panels[0].plot([], [], label=name, **style)[0] for name, style in who.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    return figure


def learning_curves(phase: Dict[str, Any]) -> Figure:
    """Loss of training and validation, validation WER and speed, against updates.

    Without the WER where the first pass is frozen; of a pretraining its accuracy in place of the WER.
    """
    training, shown = phase["training"], _shown_of_validation(phase)
    figure, panels = _panels(3 if shown else 2, height=2.6)
    losses, speed = panels[0], panels[-1]
    for i, (label, curve) in enumerate((("train", "train_curve"), ("dev", "valid_curve"))):
        steps, values = _series(training[curve], "loss")
        losses.plot(steps, values, color=_COLOURS[i], marker="o" if i else "", markersize=3, label=label)
    _, values = _series(training["train_curve"], "loss")
    if values and min(values) > 0 and max(values) > 8 * min(values):
        losses.set_yscale("log")  # otherwise the start hides the end
        _mark_1_2_5(losses.yaxis)
    losses.legend(loc="upper right")
    losses.set(title="loss", xlabel="updates")
    if shown:
        title, curves, scale = shown
        highest = 1.0
        for i, (name, label) in enumerate(curves.items(), 1):
            steps, values = _series(training["valid_curve"], name)
            values = [scale * value for value in values]
            highest = max([highest, *values])
            panels[1].plot(steps, values, color=_COLOURS[i], marker="o", markersize=3, label=label)
        panels[1].set(title=title, xlabel="updates", ylim=(0, highest * 1.05))
        if len(curves) > 1:
            panels[1].legend()
    steps, values = _series(training["train_curve"], "audio_s_per_s")
    speed.plot(steps, values, color=_COLOURS[2])
    speed.set(title="audio seconds per second", xlabel="updates", ylim=(0, max([*values, 1.0]) * 1.1))
    for panel in panels:
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
        panel.set_xlim(0, training["updates"] * 1.03)
    return figure


def _shown_of_validation(phase: Dict[str, Any]) -> Optional[Tuple[str, Dict[str, str], float]]:
    """Title, {metric: label} and a factor of what validation found beside the loss; None for nothing."""
    if is_pretraining(phase):
        names = {f"accuracy_{mode}": mode for mode in ("streaming", "offline")}
        return "dev accuracy %", {**names, "chance": "chance"}, 100.0
    if tables.is_frozen(phase):
        return None
    names = {"wer": "streaming", "wer_offline": "offline"} if has_two_modes(phase) else {"wer": "dev"}
    return "dev WER %", names, 1.0


def stage_times(report: Dict[str, Any]) -> Figure:
    """A bar per stage, with its time written beside it."""
    stages = report["stages"]
    figure, (panel,) = _panels(1, height=0.6 + 0.3 * len(stages))
    seconds = [s["seconds"] for s in stages]
    panel.barh(range(len(stages)), seconds, color=_COLOURS[0], height=0.6)
    for y, s in enumerate(seconds):
        text = f"{s:.1f} s" if s < 100 else f"{s / 60:.1f} min"
        panel.annotate(text, (s, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
    panel.set_yticks(range(len(stages)), [f"{s['stage']}  {s['name']}" for s in stages])
    panel.grid(False, axis="y")
    panel.set(xlim=(0, max([*seconds, 1e-9]) * 1.12), ylim=(len(stages) - 0.4, -0.6), xlabel="seconds")
    return figure


def _point(report: Dict[str, Any], phase: str, mode: str) -> Dict[str, Any]:
    """How a system is drawn in all figures: a colour per phase and its control, a shape per role and mode."""
    role = next(p["role"] for p in report["phases"] if p["name"] == phase)
    tells_mode = not has_named(report) or len({r["mode"] for r in report["records"]}) > 1
    if mode == "streaming" and tells_mode:
        marker = "v" if role == "control" else "^"
    else:
        of_control = "P" if phase.endswith(NO_KD) else "X"
        distilled = "D" if phase in sidelines(report["phases"]) else "o"
        marker = {"teacher": "s", "control": of_control}.get(role, distilled)
    colour, use = _colour(report, phase)
    style = {"color": colour, "marker": marker, "markersize": 5 if role == "control" else 6}
    return {**style, "linestyle": "none", "fillstyle": "left" if use else "full"}


def _colour(report: Dict[str, Any], phase: str) -> Tuple[str, int]:
    """That of a phase and its control, and how many phases had it before."""
    owners = {p["name"]: p["control_of"] or p["name"] for p in report["phases"]}
    use, index = divmod(list(dict.fromkeys(owners.values())).index(owners[phase]), len(_COLOURS))
    return _COLOURS[index], use


def _device_colours(report: Dict[str, Any], shown: Sequence[device.Deployed]) -> Dict[str, str]:
    """{phase: its colour}; models of other recipes have those that no phase of this one has, if there are."""
    own = {p["name"]: _colour(report, p["name"])[0] for p in report["phases"]}
    others = dict.fromkeys(d.phase for d in shown if d.phase not in own)
    left = [colour for colour in _COLOURS if colour not in own.values()]
    return {**own, **dict(zip(others, cycle(left or _COLOURS)))}


def _of_precision(colours: Dict[str, str], d: device.Deployed) -> Dict[str, Any]:
    """The colour of its phase, hollow for int8."""
    colour = colours[d.phase]
    face = "none" if d.precision == "int8" else colour
    return {"color": colour, "markerfacecolor": face, "markersize": 6, "linestyle": "none"}


def _mark_1_2_5(axis: Axis) -> None:
    """Few plain numbers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _labels(systems: Sequence[Tuple[str, str, str]]) -> List[str]:
    """What tells the systems apart: phase, mode and method, less what is the same for all."""
    shown = [i for i in (0, 1) if len({who[i] for who in systems}) > 1] + [2]
    return [", ".join(who[i] for i in shown) for who in systems]


def _panels(count: int, height: float, share_y: bool = False) -> Tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, sharey=share_y)[0]


def _series(lines: List[Dict[str, Any]], name: str) -> Tuple[List[float], List[float]]:
    points = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [p[0] for p in points], [p[1] for p in points]


def _svg(figure: Figure) -> str:
    """The figure as an <svg> element that grows with its place and takes the page's colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for marker, css in _CSS.items():
        svg = svg.replace(marker, css)
    opening = svg[: svg.index(">")]
    return re.sub(r' (width|height)="[\d.]+pt"', "", opening) + svg[len(opening) :]
