"""Roles, teachers and the order of training, from configurations alone."""

import random
from pathlib import Path

import pytest

from transducer_kd.report import phases
from transducer_kd.report.phases import teachers

ROOT = Path(phases.__file__).resolve().parents[2]
EXP = ROOT / "egs/exp"


def arrange(of_all):
    return phases.arrange(of_all, EXP)


def phase(name, size=1000, objective="transducer", init="", teacher="", kind="exp_dir"):
    """init, teacher: names of phases, as paths in the configuration: absolute, and relative to the root."""
    config = {
        "objective": objective,
        "init": {"exp_dir": f"{EXP}/{init}" if init else ""},
        "teacher": {"kind": kind, "exp_dir": f"egs/exp/{teacher}/"} if teacher else {"kind": "none"},
        "model": {"las": {"enabled": "las" in name or "finetune" in name}},
    }
    return {"name": name, "params_deployed": size, "config": config}


def recipe():
    return [
        phase("teacher", 4000),
        phase("teacher_las", 5000, "las", init="teacher"),
        phase("student", 1000, "distill", teacher="teacher"),
        phase("student_control", 1000),
        phase("student_las", 1300, "las", init="student", teacher="teacher_las"),
        phase("student_las_control", 1300, "las", init="student_control"),
        phase("finetune", 1300, "two_pass", init="student_las"),  # without distillation terms
        phase("finetune_control", 1300, "two_pass", init="student_las_control"),
        phase("finetune_nokd", 1300, "two_pass", init="student_las"),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_recipe_in_any_order(seed):
    shuffled = recipe()
    random.Random(seed).shuffle(shuffled)
    found = arrange(shuffled)
    assert [(p["name"], p["role"], p["teacher"], p["has_las"]) for p in found] == [
        ("teacher", "teacher", None, False),
        ("teacher_las", "teacher", None, True),
        ("student", "distilled", "teacher", False),
        ("student_control", "control", "teacher", False),
        ("student_las", "distilled", "teacher_las", True),
        ("student_las_control", "control", "teacher_las", True),
        ("finetune", "distilled", "teacher_las", True),
        ("finetune_control", "control", "teacher_las", True),
        ("finetune_nokd", "control", "teacher_las", True),
    ]
    assert [p["control_of"] for p in found[2:4]] == [None, "student"]
    assert [p["what"] for p in found[:6]] == [
        "transducer",
        "LAS on teacher",
        "transducer, distilled from teacher",
        "student without distillation",
        "LAS on student, distilled from teacher_las",
        "student_las without distillation",
    ]
    assert [p["what"] for p in found[6:]] == [
        "student_las, both passes finetuned",
        "finetune without distillation",
        "finetune without its distillation terms",
    ]
    assert [(p["begins_with"], p["learns_from"]) for p in found[4:7]] == [
        ("student", "teacher_las"),
        ("student_control", None),
        ("student_las", None),
    ]
    assert [p["name"] for p in teachers(found)] == ["teacher_las", "teacher"]


def test_a_teacher_las_that_teaches_nobody_is_still_a_teacher():
    found = {p["name"]: p["role"] for p in arrange([p for p in recipe() if p["name"][:11] != "student_las"])}
    assert found["teacher"] == found["teacher_las"] == "teacher"


def test_without_distillation_nothing_has_a_role():
    found = arrange([phase("small", 100), phase("large", 200)])
    assert [(p["name"], p["role"], p["teacher"]) for p in found] == [("large", "", None), ("small", "", None)]


def test_a_foreign_teacher_makes_a_distilled_phase_without_a_teacher_to_compare_with():
    (found,) = arrange([phase("student", objective="distill", teacher="x", kind="torchscript")])
    assert (found["role"], found["teacher"]) == ("distilled", None)
    assert found["what"] == "transducer, distilled from another model"


def test_missing_configurations_and_circles_do_no_harm():
    lost = {"name": "lost", "params_deployed": None, "config": None}
    circle = [
        phase("a", 20, init="b"),
        phase("b", 10, init="a"),
        phase("self", 5, init="self", teacher="self"),
    ]
    old = {"name": "old", "params_deployed": 7, "config": {"corpus": "synthetic"}}
    alone = phase("only_control", 3)
    found = {p["name"]: p for p in arrange([lost, *circle, old, alone])}
    assert len(found) == 6
    assert (found["lost"]["role"], found["lost"]["what"], found["lost"]["has_las"]) == ("", "-", False)
    assert (found["old"]["role"], found["old"]["what"]) == ("", "-")
    assert (found["only_control"]["role"], found["only_control"]["teacher"]) == ("control", None)


def test_anothers_folder_of_the_same_name_is_not_of_this_experiment(tmp_path):
    """Found by path, also through a link; what training recorded counts before the configuration."""
    (tmp_path / "link").symlink_to(EXP)
    teacher = phase("teacher", 4000)
    foreign = phase("student", 1000, "distill")
    foreign["config"]["teacher"] = {"kind": "exp_dir", "exp_dir": str(tmp_path / "teacher")}
    linked = phase("linked", 1000, "las", teacher="elsewhere")
    linked["config"]["init"] = {"exp_dir": str(tmp_path / "somebodys" / "teacher")}
    linked["meta"] = {"origins": {"teacher": {"path": str(tmp_path / "link" / "teacher"), "sha256": "0"}}}
    found = {p["name"]: p for p in arrange([teacher, foreign, linked])}
    assert (found["student"]["role"], found["student"]["teacher"]) == ("distilled", None)
    assert found["student"]["what"] == "transducer, distilled from another model"
    assert (found["linked"]["begins_with"], found["linked"]["learns_from"]) == (None, "teacher")
    assert found["linked"]["what"] == "LAS on another model, distilled from teacher"
