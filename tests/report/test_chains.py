"""Progressive compression: chains of teachers, first weights that were selected, updates, delays, README."""

import json
import re
import sys
from pathlib import Path

import pytest

from transducer_kd.log import UserError
from transducer_kd.report import collect, html, phases, plots, systems, tables, text

sys.path.insert(0, str(Path(__file__).parent))
from made_up import (  # noqa: E402
    origins,
    record,
    write_delay,
    write_done,
    write_lines,
    write_meta,
    write_phase,
)

# phase: (million parameters, WER, updates, teacher)
PHASES = {
    "teacher": (4, 5.0, 600, ""), "step1": (3, 6.0, 200, "teacher"), "step2": (2, 7.0, 210, "step1"),
    "step3": (1, 8.0, 220, "step2"), "scratch": (1, 20.0, 630, ""), "oneshot": (1, 11.0, 630, "teacher"),
    "noinit_step1": (3, 9.0, 201, "teacher"), "noinit_step2": (2, 10.0, 211, "noinit_step1"),
    "noinit": (1, 12.0, 221, "noinit_step2"),
}  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """The recipe as it is run: all phases stream, steps and oneshot begin with what was selected."""
    exp = tmp_path / "progressive" / "exp" / "synthetic-mini"
    for name, (millions, rate, updates, teacher) in PHASES.items():
        config = {"recipe": "progressive", "objective": "distill" if teacher else "transducer"}
        config["compare_with"] = ["scratch", "oneshot", "noinit"] if name == "step3" else []
        config["model"] = {"encoder": {"num_layers": millions + 1, "chunk_size": 16}}
        came_from = {}
        if teacher:
            config["teacher"] = {"kind": "exp_dir", "exp_dir": str(exp / teacher)}
            came_from["teacher"] = origins(exp / teacher)
        if teacher and not name.startswith("noinit"):
            config["init"] = {"exp_dir": str(exp / "init" / name)}
            came_from["init"] = origins(exp / "init" / name, selected_from=origins(exp / teacher))
            (exp / "init" / name).mkdir(parents=True)
            (exp / "init" / name / "config.json").write_text("{}")  # what is no phase however it looks
        size = millions * 1_000_000
        decoded = [record(name, s, wer=rate, params_deployed=size, mode="streaming") for s in ("a", "b")]
        folder = write_phase(exp, name, decoded, size, **config)
        write_meta(folder, came_from, size)
        write_lines(folder / "train_log.jsonl", [{"kind": "train", "step": updates, "loss": 1.0}])
    return exp


def test_roles_parents_and_the_first_teacher_of_every_chain(root):
    report = collect.collect(root)
    found = {
        p["name"]: (p["role"], p["teacher"], p["begins_with"], p["learns_from"]) for p in report["phases"]
    }
    assert found == {
        "teacher": ("teacher", None, None, None),
        "step1": ("distilled", "teacher", "teacher", "teacher"),
        "step2": ("distilled", "teacher", "step1", "step1"),
        "step3": ("distilled", "teacher", "step2", "step2"),
        "scratch": ("control", None, None, None),
        "noinit_step1": ("distilled", "teacher", None, "teacher"),
        "oneshot": ("distilled", "teacher", "teacher", "teacher"),
        "noinit_step2": ("distilled", "teacher", None, "noinit_step1"),
        "noinit": ("distilled", "teacher", None, "noinit_step2"),
    }
    # The chain, then what is beside it.
    assert list(found) == list(PHASES)[:5] + ["noinit_step1", "oneshot", "noinit_step2", "noinit"]
    what = {p["name"]: p["what"] for p in report["phases"]}
    assert what["step2"] == "3 layers selected of step1, distilled from step1"
    assert what["noinit"] == "transducer, distilled from noinit_step2" and what["scratch"] == "transducer"
    assert phases.steps(report["phases"]) == [
        ["teacher", "step1", "step2", "step3"],
        ["teacher", "noinit_step1", "noinit_step2", "noinit"],
    ]
    assert phases.sidelines(report["phases"]) == {
        "scratch", "oneshot", "noinit_step1", "noinit_step2", "noinit",
    }  # fmt: skip
    assert [p["name"] for p in phases.teachers(report["phases"])] == ["teacher"]
    assert not any("not been trained" in m or "stale" in m for m in report["missing"])


def test_a_selection_without_a_teacher_is_a_control_and_no_teacher(root):
    """It has weights of the teacher, but is not what taught the others."""
    path = root / "oneshot" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "objective": "transducer", "teacher": {"kind": "none"}}))
    (phase,) = [p for p in collect.collect(root)["phases"] if p["name"] == "oneshot"]
    assert (phase["role"], phase["what"]) == ("control", "2 layers selected of teacher")


def test_sizes_are_against_the_first_teacher_and_updates_those_of_the_chain(root):
    report = collect.collect(root)
    rows = systems.side_by_side_rows(report)
    assert rows[0][2:] == [
        "a first pass %", "b first pass %", "parameters", "float32 MB", "smaller than teacher by", "updates",
        "x real time",
    ]  # fmt: skip
    assert {row[0]: row[6:8] for row in rows[1:]} == {
        "teacher": ["-", "600"], "step1": ["25.0 %", "200"], "step2": ["50.0 %", "210 (410)"],
        "step3": ["75.0 %", "220 (630)"], "scratch": ["75.0 %", "630"], "oneshot": ["75.0 %", "630"],
        "noinit_step1": ["25.0 %", "201"], "noinit_step2": ["50.0 %", "211 (412)"],
        "noinit": ["75.0 %", "221 (633)"],
    }  # fmt: skip
    notes = " ".join(systems.side_by_side_notes(report))
    assert "they are compared with those of teacher (4.00 M)." in notes and "LAS" not in notes
    assert "sizes and comparisons are with the first one, teacher." in notes and systems.UPDATES_NOTE in notes
    (root / "noinit_step1" / "train_log.jsonl").unlink()
    rows = systems.side_by_side_rows(collect.collect(root))
    assert [row[7] for row in rows if row[0].startswith("noinit")] == ["-", "211 (-)", "221 (-)"]


def test_an_experiment_that_names_no_comparison_has_neither_updates_nor_chains(root):
    for name in ("step2", "step3", "noinit_step2", "noinit"):
        (root / name).rename(root / f"{name}.old-20260101-000000")
    report = collect.collect(root)
    assert not any(p["compare_with"] for p in report["phases"])
    assert "updates" not in systems.side_by_side_rows(report)[0]
    assert systems.UPDATES_NOTE not in systems.side_by_side_notes(report)
    assert {p["name"]: p["role"] for p in report["phases"]}["scratch"] == ""
    report["stages"], report["phases"] = [], [{**p, "training": None} for p in report["phases"]]
    drawn = plots.figures(report)[0]
    assert "size" in drawn.title and "chain" not in drawn.text and "triangles stream" in drawn.text


def test_what_is_to_be_compared_and_is_not_there_is_named(root):
    (root / "noinit").rename(root / "noinit.old-20260101-000000")
    told = "phase step3 is to be compared with noinit, which has not been trained"
    assert told in collect.collect(root)["missing"]


def test_a_step_is_stale_when_what_it_was_selected_from_was_trained_again(root):
    write_done(root, **{name: 10 * (i + 1) for i, name in enumerate(PHASES)})
    report = collect.collect(root)
    assert not any(p["is_stale"] for p in report["phases"])
    write_done(root, step1=99)
    assert {p["name"] for p in collect.collect(root)["phases"] if p["is_stale"]} == {"step2", "step3"}


def test_circles_of_teachers_end():
    exp = Path("/exp")
    made = [
        {"name": n, "params_deployed": 5, "config": {"teacher": {"kind": "exp_dir", "exp_dir": f"/exp/{t}"}}}
        for n, t in (("a", "b"), ("b", "a"))
    ]
    found = phases.arrange(made, exp)
    assert [(p["teacher"], p["role"]) for p in found] == [("b", "distilled"), ("a", "distilled")]
    assert phases.steps(found) == [] and phases.ancestors("a", {p["name"]: p for p in found}) == {"b"}


# Figures


def test_steps_are_joined_and_what_is_beside_them_has_other_marks(root):
    report = collect.collect(root)
    styles = {name: plots._point(report, name, "streaming") for name in PHASES}
    assert {name: style["marker"] for name, style in styles.items()} == {
        "teacher": "s", "step1": "o", "step2": "o", "step3": "o", "scratch": "X",
        "oneshot": "D", "noinit_step1": "D", "noinit_step2": "D", "noinit": "D",
    }  # fmt: skip
    assert len({(style["color"], style["fillstyle"]) for style in styles.values()}) == len(PHASES)
    for panel in plots.wer_against_size(report).axes:
        lines = {line.get_linestyle(): line for line in panel.lines if len(line.get_xydata()) == 4}
        # Of one size step2 is left of noinit_step2: a fortieth of the largest.
        assert lines["-"].get_xydata().tolist() == [[4, 5], [3, 6], [2, 7], [1, 8]]
        assert lines[":"].get_xydata().tolist() == [[4, 5], [3.1, 9], [2.1, 10], [1.3, 12]]
        assert lines[":"].get_color() == styles["noinit"]["color"]
    report["stages"], report["phases"] = [], [{**p, "training": None} for p in report["phases"]]
    drawn = plots.figures(report)[0]
    assert "size" in drawn.title and "Lines join the steps of a chain" in drawn.text


def test_a_chain_is_joined_where_its_steps_were_decoded(root):
    for name in ("step2", "noinit_step1", "noinit_step2", "noinit"):
        (root / name / "metrics.json").write_text("[]")
    panel = plots.wer_against_size(collect.collect(root)).axes[0]
    assert [len(line.get_xydata()) for line in panel.lines if line.get_linestyle() == "-"] == [3]


def test_colours_that_are_used_twice_are_told_apart(root):
    for i in range(4):
        write_phase(root, f"more{i}", [record(f"more{i}", "a")], compare_with=["scratch"])
    report = collect.collect(root)
    styles = [plots._point(report, p["name"], "streaming") for p in report["phases"]]
    assert [s["fillstyle"] for s in styles].count("left") == len(styles) - len(plots._COLOURS) > 0
    assert len({(s["color"], s["fillstyle"]) for s in styles}) == len(styles)


# Emission delay


def test_emission_delay_by_hand(root, no_figures):
    write_delay(root / "step3")
    write_delay(root / "step2", mode="offline")  # it was decoded streaming: another system's delay
    report = collect.collect(root)
    rows = systems.side_by_side_rows(report)
    at = rows[0].index("b emission delay, frames [95 %] (ms)")
    assert [name for name in rows[0] if "delay" in name] == [rows[0][at]]
    assert {row[0]: row[at] for row in rows[1:] if row[at] != "-"} == {"step3": "2.25 [-0.50, 3.00] (90)"}
    note = systems.side_by_side_notes(report)[-1]
    assert note.endswith("Reference model: teacher.")
    assert "below zero: earlier" in note and "waits for its chunk to be complete is not included" in note
    write_delay(root / "scratch", reference={"phase": "step1"})
    report = collect.collect(root)
    told = "Reference model: teacher for step2, step3; step1 for scratch."
    assert systems.side_by_side_notes(report)[-1].endswith(told)
    assert "2.25 [-0.50, 3.00] (90)" in html.render(report, "") and "(90)" in text.markdown_section(report)
    assert ["step3: emission delay by", "commit unknown, unknown"] in tables.provenance_rows(report)


@pytest.mark.parametrize(
    "changes",
    [{"parts": {"b": {"low": 1.0}}}, {"parts": []}, {"reference": {}}, {"frame_ms": "40"}, {"mode": 1}],
)
def test_a_damaged_delay_is_named(root, changes):
    write_delay(root / "step3", **changes)
    with pytest.raises(UserError, match=r"step3/delay\.json: not what local/emission_delay\.py writes"):
        collect.collect(root)


# What a reader sees first


def test_key_systems_are_what_the_phase_that_names_most_names_and_came_from(root, no_figures):
    report = collect.collect(root)
    keys = ["teacher", "step1", "step2", "step3", "scratch", "oneshot", "noinit"]
    assert [s["label"] for s in systems.key_systems(report)] == keys
    page = html.render(report, "")
    assert re.findall(r'<div class="card"><h3>(\w+)', page) == keys
    assert "control, 1.00 M (75.0 % smaller than the teacher), greedy_search, streaming" in page
    for s in report["records"]:
        s["phase"] = "noinit_step1"  # none of them was decoded
    assert [s["label"] for s in systems.key_systems(report)] == ["noinit_step1"]


def test_a_readme_keeps_the_parts_of_other_recipes(root, tmp_path):
    path = tmp_path / "README.md"
    old = "two_pass: synthetic, mini.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nFirst pass: greedy_search."
    path.write_text(f"before\n<!-- results:begin -->\n{old}\n<!-- results:end -->\nafter\n")
    report = collect.collect(root)
    text.update_block(path, report)
    once = path.read_text()
    head = f"before\n<!-- results:begin -->\n{old}\n\nprogressive: synthetic, mini.\n\n**Synthetic speech"
    assert once.startswith(head) and once.endswith("the first teacher.\n<!-- results:end -->\nafter\n")
    assert "| step3 |" in once and "| noinit_step1 |" not in once
    text.update_block(path, report)
    assert path.read_text() == once
    alone = {**report, "recipe": "alone", "phases": report["phases"][:1], "records": report["records"][:1]}
    text.update_block(path, alone)
    text.update_block(path, alone)
    assert path.read_text().count("\nalone: synthetic, mini. Beside each rate") == 1
    # Another scale of a recipe replaces its part, where it stands.
    text.update_block(path, {**report, "recipe": "two_pass", "scale": "small"})
    again = path.read_text()
    assert old not in again and again.count("progressive: synthetic, mini.") == 1
    assert re.findall(r"^([\w-]+): synthetic, (\w+)\.", again, re.MULTILINE) == [
        ("two_pass", "small"),
        ("progressive", "mini"),
        ("alone", "mini"),
    ]
