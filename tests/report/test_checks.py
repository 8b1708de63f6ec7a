"""Stale phases and controls that are none: found, named, and kept out of tables, figures and comparisons."""

import json
import sys
from pathlib import Path

import pytest

from transducer_kd.decode.compare import pairs
from transducer_kd.report import collect, html, plots, systems, tables, text

sys.path.insert(0, str(Path(__file__).parent))
from made_up import record, write_done, write_lines, write_phase  # noqa: E402

PHASES = ("teacher", "student", "student_control", "student_las", "student_las_control", "finetune")
CONTROLS = ("finetune_control", "finetune_nokd")
OBJECTIVES = {"teacher": "transducer", "student": "distill", "student_control": "transducer"}
INIT = {
    "student_las": "student", "student_las_control": "student_control", "finetune": "student_las",
    "finetune_control": "student_las_control", "finetune_nokd": "student_las",
}  # fmt: skip


def configure(root, name, **config):
    """config.json of one phase as the recipe would leave it, with other sections on top."""
    objective = OBJECTIVES.get(name, "las" if "las" in name else "two_pass")
    made = {"corpus": "synthetic", "scale": "mini", "objective": objective}
    made["init"] = {"exp_dir": str(root / INIT[name]) if name in INIT else ""}
    made["model"] = {"las": {"enabled": name in INIT}}
    if name in ("student", "student_las", "finetune"):
        made["teacher"] = {"kind": "exp_dir", "exp_dir": str(root / "teacher")}
        made["two_pass"] = {"las_kd_weight": 0.5, "las_kd_temperature": 2.0}
        made["distill"] = {"weight": 3.0}
    made["data"] = {"fbank_dir": f"data/{name}", "num_workers": len(name)}
    (root / name / "config.json").write_text(json.dumps({**made, **config}))


@pytest.fixture
def root(tmp_path):
    """The whole recipe, each phase decoded; run.sh ended them at 10, 20, 30, ... in this order."""
    exp = tmp_path / "two_pass" / "exp" / "synthetic-mini"
    for i, name in enumerate(PHASES + CONTROLS):
        write_phase(exp, name, [record(name, wer=40.0 + i)])
        configure(exp, name)
        write_done(exp, **{name: 10 * (i + 1)})
    steps = {"teacher": 2, "student": 3, "student_control": 3, "student_las": 4, "finetune": 5}
    write_lines(exp / "stages.jsonl", [{"stage": s, "name": n, "seconds": 1.0} for n, s in steps.items()])
    return exp


def of_checks(report):
    return [m for m in report["missing"] if "stale" in m or "compared" in m]


def compared(report):
    return {(a["phase"], b["phase"]) for kind, a, b in pairs(report["phases"], report["records"])}


def test_the_recipe_as_it_was_run_is_neither_stale_nor_unlike(root):
    report = collect.collect(root)
    assert of_checks(report) == []
    assert {p["ended"] for p in report["phases"]} == {10.25 * i - 0.25 * (i - 1) for i in range(1, 9)}
    controls = {(a, b) for a, b in compared(report) if a != "teacher"}
    assert controls == {
        ("student_control", "student"),
        ("student_las_control", "student_las"),
        ("finetune_control", "finetune"),
        ("finetune_nokd", "finetune"),
    }


# Stale


def stale(report):
    return {p["name"] for p in report["phases"] if p["is_stale"]}


def test_descendants_of_a_student_that_was_trained_again(root):
    write_done(root, student=99)
    report = collect.collect(root)
    assert stale(report) == {"student_las", "finetune", "finetune_nokd"}
    begin = "is stale and left out of all comparisons:"
    assert of_checks(report) == [
        f"phase student_las {begin} student was trained again after it; run stage 4 again, then decode",
        f"phase finetune {begin} student_las is stale; run stage 5 again, then decode",
        f"phase finetune_nokd {begin} student_las is stale; train and decode it again",
    ]
    # Trained again on the same stale student_las it is stale still; a new student_las makes only this so.
    write_done(root, finetune=100)
    assert stale(collect.collect(root)) == {"student_las", "finetune", "finetune_nokd"}
    write_done(root, student_las=101)
    assert stale(collect.collect(root)) == {"finetune", "finetune_nokd"}
    write_done(root, finetune=102, finetune_nokd=103)
    assert stale(collect.collect(root)) == set()


def test_a_teacher_that_was_trained_again_and_one_that_has_not_ended(root):
    write_done(root, teacher=99)
    assert stale(collect.collect(root)) == {"student", "student_las", "finetune", "finetune_nokd"}
    (root / "teacher" / ".done").unlink()
    report = collect.collect(root)
    assert stale(report) == {"student", "student_las", "finetune", "finetune_nokd"}
    assert "the training of teacher has begun again and not ended; run stage 3 again" in of_checks(report)[0]
    (root / "teacher" / ".done").write_text("phase=teacher\n")  # cut off
    assert "student" in stale(collect.collect(root))


def test_phases_that_were_trained_by_hand_are_not_stale(root):
    for mark in root.glob("*/.done"):
        mark.unlink()
    assert of_checks(collect.collect(root)) == []
    write_done(root, student=99)  # of a teacher without a mark
    assert stale(collect.collect(root)) == {"student", "student_las", "finetune", "finetune_nokd"}
    write_done(root, teacher=98)  # the descendants of the student have no time of their own
    assert stale(collect.collect(root)) == set()


def test_circles_do_no_harm(root):
    configure(root, "student", init={"exp_dir": str(root / "finetune")})
    assert {"student", "student_las"} <= stale(collect.collect(root))
    configure(root, "teacher", init={"exp_dir": str(root / "student_las")})
    assert "teacher" in stale(collect.collect(root))


def test_stale_phases_stay_in_the_details_alone(root):
    write_done(root, student=99)
    report = collect.collect(root)
    assert not any("finetune" in pair or "finetune_nokd" in pair for pair in compared(report))
    names = [row[0] for row in systems.side_by_side_rows(report)[1:]]
    assert names == ["teacher", "student", "student_control", "student_las_control", "finetune_control"]
    assert [s["label"] for s in systems.key_systems(report)] == ["teacher", "student", "student_control"]
    for rows in (tables.results_rows, tables.detail_rows, tables.training_rows):
        marked = {row[0] for row in rows(report)} & {"finetune", "finetune (stale)", "student"}
        assert marked == {"finetune (stale)", "student"}
    by_title = {figure.title: figure for figure in plots.figures(report)}
    assert by_title["Word error rate by decoding method"].is_folded
    assert "finetune (stale)" in by_title["Word error rate by decoding method"].svg
    assert "finetune_nokd" not in by_title["Word error rate against size"].svg
    assert "Learning curves: finetune (stale)" in by_title
    assert "45.00" not in text.terminal_report(report)  # finetune's rate
    page = html.render(report, "")
    assert "45.00" not in page.split("<details>")[0] and "45.00" in page


def test_a_report_of_stale_phases_alone_is_one_too(root):
    for name in (*PHASES[:3], *CONTROLS):
        (root / name / "metrics.json").write_text("[]")
    (root / "student_las_control" / "metrics.json").write_text("[]")
    write_done(root, student=99)
    report = collect.collect(root)
    assert systems.key_systems(report) == [] and report["records"]
    assert "finetune (stale)" in html.render(report, "") and "45.00" in text.markdown_section(report)


# Controls


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"train": {"max_steps": 5, "log_every": 7}},
            "train.max_steps of student and student_control differ",
        ),
        ({"train": {"seed": 1, "accumulate": 2}}, "train.accumulate, train.seed of student and"),
        ({"data": {"max_duration_s": 40.0}}, "data.max_duration_s of"),
        ({"optim": {"lr": 0.5}}, "optim.lr of"),
        ({"model": {"encoder": {"num_layers": 2}}}, "model.encoder.num_layers of"),
        ({"loss": {"s_range": 3}, "spec_augment": {"enabled": False}}, "loss.s_range, spec_augment.enabled"),
        ({"two_pass": {"mwer_weight": 0.5}}, "two_pass.mwer_weight of"),
        ({"teacher": {"kind": "torchscript"}}, "student_control has a teacher"),
        ({"optim": {"unheard_of": 1}}, "config.json (student_control/config.json"),
    ],
)
def test_controls_that_were_trained_otherwise_are_named_and_not_compared(root, config, told):
    configure(root, "student_control", **config)
    report = collect.collect(root)
    # What begins with it is no control either.
    begin = [f"{n} is not compared with {n}_control, which" for n in ("student", "student_las", "finetune")]
    found = of_checks(report)
    assert [m.startswith(b) for m, b in zip(found, begin)] == [True] * len(found) == [True] * 3
    assert all(told in m for m in found)
    assert {(a, b) for a, b in compared(report) if a != "teacher"} == {("finetune_nokd", "finetune")}
    assert ("teacher", "student_control") in compared(report)
    assert "finetune_control" not in [s["label"] for s in systems.key_systems(report)]


def test_a_control_has_to_begin_with_the_like(root):
    configure(root, "finetune_nokd", init={"exp_dir": str(root / "student_las_control")})
    configure(root, "finetune_control", init={"exp_dir": ""})
    (root / "student_las_control" / "config.json").unlink()
    found = of_checks(collect.collect(root))
    otherwise = "which was trained otherwise:"
    assert found == [
        f"student_las is not compared with student_las_control, {otherwise} config.json of student_las and "
        "student_las_control differ; it did not begin with the like",
        f"finetune is not compared with finetune_control, {otherwise} it did not begin with the like",
        f"finetune is not compared with finetune_nokd, {otherwise} config.json of student_las and "
        "student_las_control differ; it did not begin with the like",
    ]


def test_what_one_stage_gave_is_shown_beside_its_controls(root):
    report = collect.collect(root)
    names = [s["label"] for s in systems.key_systems(report)]
    assert names == ["teacher", "finetune", "finetune_control", "finetune_nokd"]
    rows = {row[0]: row[1] for row in systems.side_by_side_rows(report)}
    assert rows["finetune_nokd"] == "finetune without its distillation terms"
    assert "<p>finetune without its distillation terms, 1.75 M (" in html.render(report, "")
    styles = {name: plots._point(report, name, "offline") for name in names}
    assert [styles[n]["marker"] for n in names] == ["s", "o", "X", "P"]
    assert [styles[n]["markersize"] for n in names] == [6, 6, 5, 5]
    assert len({styles[n]["color"] for n in names[1:]}) == 1
