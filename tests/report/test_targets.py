"""Soft against hard targets: what learns from pseudo-labels, the table of the arms, the crossover."""

import json
import sys
from pathlib import Path

import pytest

from transducer_kd.decode.compare import pairs
from transducer_kd.log import UserError
from transducer_kd.report import collect, html, systems, targets, text

sys.path.insert(0, str(Path(__file__).parent))
from made_up import (  # noqa: E402
    ROOT,
    origins,
    record,
    write_delay,
    write_done,
    write_lines,
    write_meta,
    write_phase,
)

LARGE, SMALL = {"num_layers": 4, "dropout": 0.0}, {"num_layers": 2, "chunk_size": 8}
# phase: (encoder, WER, labelled by, what it learns from, compare_with)
PHASES = {
    "teacher": (LARGE, 5.0, "", "", []),
    "plain_small": (SMALL, 20.0, "", "", []),
    "plain_large": ({**LARGE, "dropout": 0.1}, 7.0, "", "", []),
    "p1": (SMALL, 10.0, "teacher", "hard", ["plain_small"]),
    "p2": (SMALL, 12.0, "teacher", "soft", ["plain_small", "p1"]),
    "p3": (SMALL, 9.0, "teacher", "both", ["p1", "p2"]),
    "p4": (SMALL, 13.0, "teacher", "soft", ["p2"]),
    "q1": (LARGE, 4.5, "teacher", "hard", ["plain_large"]),
    "q2": ({**LARGE, "dropout": 0.1}, 4.0, "teacher", "soft", ["plain_large", "q1"]),
    "r1": (LARGE, 3.5, "q1", "hard", ["q1"]),
    "r2": (LARGE, 3.0, "q2", "soft", ["q2", "r1"]),
}
SUMMARY = {
    "part": "unlabelled", "kept": {"cuts": 1150, "hours": 1.046},
    "dropped": {"empty": {"cuts": 0, "hours": 0.0}, "confidence": {"cuts": 1040, "hours": 0.9}},
    "confidence_percentiles": {"5": 0.7, "25": 0.8, "50": 0.9, "75": 0.95, "95": 0.99},
    "label_wer": {"all": 5.25, "kept": 4.5},
    "soft": {"dtype": "float16", "dim": 128, "bytes": 100, "mb_per_hour": 23.04},
}  # fmt: skip


def write_labels(exp, name, **changes):
    folder = exp / "labels" / name
    folder.mkdir(parents=True, exist_ok=True)
    made = {**SUMMARY, "teacher": origins(exp / name), "sha256": f"of {name}", **changes}
    (folder / "summary.json").write_text(json.dumps(made))


def configure(exp, name, **changes):
    encoder, _, labelled_by, kind, compare_with = PHASES[name]
    config = {"objective": "transducer", "model": {"encoder": encoder}, "compare_with": compare_with}
    came_from = {}
    if labelled_by:
        config["data"] = {"pseudo_labels": str(exp / "labels" / labelled_by)}
        came_from["labels"] = origins(exp / "labels" / labelled_by)
    if kind in ("soft", "both"):
        config.update(objective="distill", teacher={"kind": "exp_dir", "exp_dir": str(exp / labelled_by)})
        config["distill"] = {"weight": 3.0, "frame_shift": 2 if encoder is SMALL else 0}
        config["loss"] = {"pseudo_weight": 0.0 if kind == "soft" else 1.0}
        came_from["teacher"] = origins(exp / labelled_by)
    config.update(changes)
    (exp / name / "config.json").write_text(json.dumps({"corpus": "synthetic", "scale": "mini", **config}))
    write_meta(exp / name, came_from, size_of(name))


def size_of(name):
    return 1_000_000 if PHASES[name][0] is SMALL else 4_000_000


@pytest.fixture
def root(tmp_path):
    exp = tmp_path / "soft_hard" / "exp" / "synthetic-mini"
    for name, (encoder, rate, *_) in PHASES.items():
        mode = "streaming" if encoder is SMALL else "offline"
        decoded = [
            record(name, s, method, rate + more, mode=mode, params_deployed=size_of(name))
            for s in ("clean", "other")
            for method, more in (("modified_beam_search", 0.0), ("greedy_search", 0.5))
        ]
        write_phase(exp, name, decoded)
        configure(exp, name)
    for name in ("teacher", "q1", "q2"):
        write_labels(exp, name)
    return exp


def compared(report, p_value=0.01):
    """The comparisons that would be made, with invented intervals; the rates are those of the records."""
    for kind, a, b in pairs(report["phases"], report["records"]):
        made = {"kind": kind, "test_set": a["test_set"], "p_value": p_value, "relative": 1.0}
        made.update({f"{key}_{side}": r[key] for side, r in (("a", a), ("b", b)) for key in r})
        difference = b["wer"] - a["wer"]
        made.update(difference=difference, low=difference - 0.25, high=difference + 1.0)
        report["comparisons"].append(made)
    return report


def student(report, words):
    (found,) = [arm for arm in targets.arms(report) if arm["student"] == words]
    return found


# Who learns from whose labels


def test_roles_and_words_of_what_learns_from_labels(root):
    found = {p["name"]: p for p in collect.collect(root)["phases"]}
    assert {n: (p["role"], p["labelled_by"], p["teacher"]) for n, p in found.items()} == {
        "teacher": ("teacher", None, None),
        "plain_large": ("control", None, None),
        "plain_small": ("control", None, None),
        **{n: ("distilled", "teacher", "teacher") for n in ("q1", "q2", "p1", "p2", "p3", "p4")},
        "r1": ("distilled", "q1", "teacher"),
        "r2": ("distilled", "q2", "teacher"),
    }
    # Teachers first, then large ones; what was labelled by a student comes last.
    assert list(found) == "teacher plain_large plain_small q1 q2 p1 p2 p3 p4 r1 r2".split()
    assert [found[n]["what"] for n in ("p1", "p2", "p3", "r2")] == [
        "transducer, hard targets of teacher",
        "transducer, soft targets of teacher, frame shift 2",
        "transducer, soft and hard targets of teacher, frame shift 2",
        "transducer, soft targets of q2",
    ]


def test_sizes_updates_and_the_teacher_across_modes(root):
    report = collect.collect(root)
    rows = {row[0]: row for row in systems.side_by_side_rows(report)}
    saved, updates = (rows["phase"].index(name) for name in ("smaller than teacher by", "updates"))
    assert rows["plain_small (streaming)"][saved] == rows["p1 (streaming)"][saved] == "75.0 %"
    assert [rows[f"{n} (offline)"][updates] for n in ("teacher", "q2", "r2")] == ["100", "100", "100 (200)"]
    compared(report)
    tables = {made["title"]: made["rows"] for made in systems.comparison_tables(report, True)}
    against_teacher = {row[0]: row[2] for row in tables["Systems against the teacher"][1:]}
    assert against_teacher["p1"] == "first pass, streaming against offline"
    assert against_teacher["q1"] == "first pass"
    named = [row[:3] for row in tables["Planned comparisons"][1:] if row[0] == "p2"]
    assert named == [["p2", other, "first pass, streaming"] for other in ("plain_small", "p1")]
    assert systems.MODES_NOTE in systems.comparison_notes(report)


def test_who_labelled_is_known_by_the_summary_and_then_by_the_folder(root):
    (root / "labels" / "teacher").rename(root / "labels" / "first")
    for name in ("p1", "p2", "p3", "p4"):
        configure(root, name, data={"pseudo_labels": str(root / "labels" / "first")})
        (root / name / "meta.json").unlink()
    (root / "labels" / "q1" / "summary.json").unlink()  # being made again
    foreign = {"teacher": {"path": "/somebody/elses"}}
    write_labels(root, "q2", **foreign)
    report = collect.collect(root)
    found = {p["name"]: (p["labelled_by"], p["what"]) for p in report["phases"]}
    assert found["p1"] == ("teacher", "transducer, hard targets of teacher")
    assert found["r1"] == ("q1", "transducer, hard targets of q1")
    assert found["r2"] == (None, "transducer, soft targets of another model")
    assert any(m.startswith("pseudo-labels of q1, which are not finished") for m in report["missing"])
    assert [row[0] for row in targets.label_rows(report)[1:]] == ["teacher (first)", "another model (q2)"]


def test_phases_whose_labels_are_others_now_are_stale(root):
    write_labels(root, "teacher", sha256="other filters")
    write_lines(root / "stages.jsonl", [{"stage": 4, "name": "q1", "seconds": 1.0}])
    report = collect.collect(root)
    assert {p["name"] for p in report["phases"] if p["is_stale"]} == set(PHASES) - {
        "teacher", "plain_small", "plain_large",
    }  # fmt: skip
    why = "its pseudo-labels were made again and are others now; run stage 4 again, then decode"
    assert f"phase q1 is stale and left out of all comparisons: {why}" in report["missing"]
    assert targets.arms(compared(report)) == [] and systems.key_systems(report)


def test_phases_are_stale_whose_labels_are_of_a_model_that_was_trained_again(root):
    write_done(root, **{name: 10 * (i + 1) for i, name in enumerate(PHASES)})
    assert not any(p["is_stale"] for p in collect.collect(root)["phases"])
    write_done(root, q1=999)
    assert [p["name"] for p in collect.collect(root)["phases"] if p["is_stale"]] == ["r1"]


# Pseudo-labels


def test_label_sets_by_hand(root, no_figures):
    by = {"commit": "c0ffee", "command": f"{ROOT}/local/pseudo_label.py --x"}
    write_labels(root, "q1", soft=None, label_wer=None, dropped={}, created_by=by)
    (root / "labels" / "old.old-20260101-000000").mkdir()
    report = collect.collect(root)
    rows = targets.label_rows(report)
    assert rows[0] == [
        "labelled by", "part", "kept cuts", "kept hours", "dropped cuts",
        "confidence, percentiles 5/25/50/75/95", "label WER all %", "label WER kept %", "soft targets",
        "MB per hour",
    ]  # fmt: skip
    confidence = "0.70/0.80/0.90/0.95/0.99"
    assert rows[1][:2] == ["q1", "unlabelled"]
    assert rows[1][2:] == ["1,150", "1.05", "none", confidence, "-", "-", "none", "-"]
    wide = ["confidence 1,040", confidence, "5.25", "4.50", "float16, 128 wide", "23"]
    assert rows[3] == ["teacher", "unlabelled", "1,150", "1.05", *wide]
    for made in (html.render(report, ""), text.markdown_section(report)):
        assert "confidence 1,040" in made and "P(hypothesis)^(1/U)" in made and "for information" in made
        assert "labels of q1: made by" in made and "commit c0ffee, local/pseudo_label.py --x" in made
    for name in ("teacher", "q1", "q2"):
        (root / "labels" / name / "summary.json").unlink()
    assert "Pseudo-labels" not in html.render(collect.collect(root), "")


@pytest.mark.parametrize("changes", [{"kept": {"cuts": 3}}, {"dropped": []}, {"kept": None}])
def test_a_damaged_summary_is_named(root, changes):
    write_labels(root, "teacher", **changes)
    with pytest.raises(UserError, match=r"labels/teacher/summary\.json: not what local/pseudo_label\.py"):
        collect.collect(root)


# The crossover


def test_arms_are_found_by_configuration_and_signs_are_soft_minus_hard(root):
    configure(root, "q1", compare_with=["q2"])  # the hard arm names the soft one
    configure(root, "q2", compare_with=[])
    report = compared(collect.collect(root))
    assert [(arm["student"], arm["names"]) for arm in targets.arms(report)] == [
        ("offline, 4.00 M, self-training", {"hard": "q1", "soft": "q2"}),
        ("streaming, 1.00 M", {"supervised": "plain_small", "hard": "p1", "soft": "p2", "both": "p3"}),
        ("offline, 4.00 M, self-training, generation 2", {"hard": "r1", "soft": "r2"}),
    ]
    small, large = student(report, "streaming, 1.00 M"), student(report, "offline, 4.00 M, self-training")
    assert small["by_set"]["clean"] == {"difference": 2.0, "low": 1.75, "high": 3.0, "p_value": 0.01}
    # q1 minus q2 was 0.5 [0.25, 1.5]
    assert large["by_set"]["other"] == {"difference": -0.5, "low": -1.5, "high": -0.25, "p_value": 0.01}
    rows = targets.crossover_rows(report)
    assert rows[0] == ["student", "", "supervised", "hard", "soft", "soft and hard", "soft - hard", "verdict"]
    assert rows[1][2:] == ["-", "q1", "q2", "-", "-", "-"]
    assert rows[2] == [
        "", "clean WER %", "-", "4.50 [3.25, 6.00]", "4.00 [2.75, 5.50]", "-", "-0.50 [-1.50, -0.25]",
        "soft better, p 0.010",
    ]  # fmt: skip
    assert rows[4] == ["streaming, 1.00 M", "phase", "plain_small", "p1", "p2", "p3", "-", "-"]
    assert rows[5][2:] == [
        "20.00 [18.75, 21.50]", "10.00 [8.75, 11.50]", "12.00 [10.75, 13.50]", "9.00 [7.75, 10.50]",
        "+2.00 [+1.75, +3.00]", "hard better, p 0.010",
    ]  # fmt: skip
    assert len(rows) == 10  # nobody measured delays


def test_delays_stand_below_the_rates_of_the_arms_that_have_them(root):
    for name in ("plain_small", "p2", "q2"):
        write_delay(root / name)
    write_delay(root / "p1", parts={})
    part = json.loads((root / "p2" / "delay.json").read_text())["parts"]["b"]
    write_delay(root / "p2", parts={"clean": {**part, "mean_frames": -1.5}})
    write_delay(root / "plain_small", parts={"clean": part})
    rows = targets.crossover_rows(compared(collect.collect(root)))
    told = [row[1:] for row in rows if "delay" in row[1]]
    cells = ["2.25 [-0.50, 3.00] (90)", "-", "-1.50 [-0.50, 3.00] (-60)"]
    assert told == [["clean delay, frames (ms)", *cells, "-", "-", "-"]]


@pytest.mark.parametrize(
    ("changes", "is_found"),
    [
        ({}, True),
        ({"train": {"max_steps": 8}}, False),
        ({"train": {"max_steps": 9}}, True),
        ({"model": {"encoder": {**SMALL, "num_layers": 3}}}, False),
        ({"init": {"exp_dir": "teacher"}}, False),
        ({"data": {"pseudo_labels": "elsewhere"}}, False),
    ],
)
def test_supervised_is_the_same_student_with_as_many_updates_and_no_labels(root, changes, is_found):
    train = {"train": {"max_steps": 9}} if "train" in changes else {}
    for name in ("p1", "p2"):
        configure(root, name, **train)
    if "init" in changes:
        changes = {"init": {"exp_dir": str(root / changes["init"]["exp_dir"])}}
    configure(root, "plain_small", **changes)
    report = compared(collect.collect(root))
    (found,) = [arm["names"] for arm in targets.arms(report) if arm["names"]["hard"] == "p1"]
    assert found.get("supervised") == ("plain_small" if is_found else None)


def test_self_training_that_begins_with_the_teacher(root):
    """The arms and their control have the teacher's weights, but only the teacher is one."""
    selves = ("plain_large", "q1", "q2", "r1", "r2")
    size = 1_000_000
    write_phase(root, "base", [record("base", "clean", mode="streaming", params_deployed=size)], size)
    for name in ("plain_small", "p1", "p2", *selves):
        init = "teacher" if name in selves else "base"
        configure(root, name, init={"exp_dir": str(root / init)})
    report = compared(collect.collect(root))
    found = {p["name"]: p for p in report["phases"]}
    roles = {role: [n for n, p in found.items() if p["role"] == role] for role in ("teacher", "control", "")}
    assert roles == {"teacher": ["teacher"], "control": ["base", "plain_large", "plain_small"], "": []}
    assert [found[n]["what"] for n in ("plain_large", "q1", "q2", "r1", "p1")] == [
        "teacher finetuned",
        "teacher finetuned, hard targets of teacher",
        "teacher finetuned, soft targets of teacher",
        "teacher finetuned, hard targets of q1",
        "base finetuned, hard targets of teacher",
    ]
    # The control before what is compared with it; the second generation last.
    assert [n for n in found if n in selves] == list(selves)
    rows = {row[0].split()[0]: row for row in systems.side_by_side_rows(report)}
    saved, updates = (rows["phase"].index(name) for name in ("smaller than teacher by", "updates"))
    assert [rows[n][updates] for n in ("plain_large", "q1", "r1")] == ["100", "100", "100 (200)"]
    assert [rows[n][saved] for n in ("plain_large", "base")] == ["0.0 %", "75.0 %"]
    arms = [(arm["generation"], arm["names"]) for arm in targets.arms(report) if arm["is_self"]]
    assert arms == [
        (1, {"supervised": "plain_large", "hard": "q1", "soft": "q2"}),
        (2, {"supervised": "plain_large", "hard": "r1", "soft": "r2"}),
    ]
    against = {c["phase_b"] for c in report["comparisons"] if c["kind"] == "teacher"}
    assert {"base", "plain_large", "plain_small"} <= against
    configure(root, "q2")
    told = "q1 and q2 differ not only in their targets: model.encoder.dropout, what they began with."
    assert told in targets.crossover_notes(compared(collect.collect(root)))


def test_texts_show_of_planned_comparisons_the_best_method_and_the_page_all(root, no_figures):
    report = compared(collect.collect(root))
    markdown, page = text.markdown_section(report), html.render(report, "")
    planned = markdown.split("Planned comparisons:")[1].split("Every method")[0]
    rows = [line.split(" | ")[:3] for line in planned.splitlines() if line.startswith("| p2")]
    assert rows == [["| p2", name, "first pass, streaming"] for name in ("plain_small", "p1")]
    assert "greedy_search" not in planned and "greedy_search" in markdown
    assert page.count("<td>greedy_search, streaming</td>") >= 5


def test_the_crossover_is_told_by_test_set_with_its_conditions(root, no_figures):
    report = compared(collect.collect(root))
    for c in report["comparisons"]:
        if (c["phase_b"], c["test_set"]) == ("q2", "other"):
            c["p_value"] = 0.3
    first, dropout, generations = targets.crossover_notes(report)
    assert first == (
        "Crossover (hard targets better for a streaming student of another model, soft targets better in "
        "self-training, both with p < 0.05): shown on clean (streaming student: hard better, p 0.010; "
        "self-training: soft better, p 0.010); not shown on other (streaming student: hard better, p 0.010; "
        "self-training: no difference shown, p 0.300)."
    )
    assert dropout == "q1 and q2 differ not only in their targets: model.encoder.dropout."
    assert generations == targets.GENERATION_NOTE
    for made in (html.render(report, ""), text.markdown_section(report), text.terminal_report(report)):
        assert "shown on clean (streaming student: hard better" in " ".join(made.split())
        assert targets.TITLE in made


def test_every_soft_arm_that_is_named_with_the_hard_one_has_to_say_it(root):
    """p4 is another soft arm of the same student; the better way round it speaks against a crossover."""
    configure(root, "p4", compare_with=["p1"])
    report = compared(collect.collect(root))
    for c in report["comparisons"]:
        if c["phase_b"] == "p4":
            c["difference"] = -1.0
    told = targets.crossover_notes(report)[0]
    assert "not shown on clean (streaming student: hard better, p 0.010 and soft better, p 0.010;" in told


def test_without_one_of_the_two_students_nothing_is_told(root, no_figures):
    configure(root, "q2", compare_with=["plain_large"])
    told = targets.crossover_notes(compared(collect.collect(root)))[0]
    assert told.endswith("cannot be told, soft and hard targets of self-training have not been compared.")
    configure(root, "p2", compare_with=[])
    configure(root, "r2", compare_with=[])
    report = compared(collect.collect(root))
    assert targets.crossover_notes(report) == [] and len(targets.crossover_rows(report)) == 1
    assert targets.TITLE not in html.render(report, "") + text.markdown_section(report)


def test_another_architecture_is_another_student_and_other_settings_are_named(root):
    """Dropout is no architecture; the number of layers is."""
    configure(root, "p2", model={"encoder": {**SMALL, "num_layers": 3}})
    assert [a["names"]["hard"] for a in targets.arms(compared(collect.collect(root)))] == ["q1", "r1"]
    configure(root, "p2", optim={"lr": 0.5})
    report = compared(collect.collect(root))
    assert "p1 and p2 differ not only in their targets: optim.lr." in targets.crossover_notes(report)
    configure(root, "p2")
    meta = json.loads((root / "p2" / "meta.json").read_text())
    meta["origins"]["labels"]["sha256"] = "others"
    (root / "p2" / "meta.json").write_text(json.dumps(meta))
    (root / "labels" / "teacher" / "summary.json").unlink()  # otherwise p2 would be stale
    notes = targets.crossover_notes(compared(collect.collect(root)))
    assert "p1 and p2 differ not only in their targets: their pseudo-labels." in notes


def test_key_systems_are_the_arms_of_the_first_generation(root, tmp_path):
    report = compared(collect.collect(root))
    keys = [s["phase"]["name"] for s in systems.key_systems(report)]
    assert keys == ["teacher", "plain_large", "plain_small", "q1", "q2", "p1", "p2", "p3"]
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    text.update_block(readme, report)
    made = readme.read_text()
    assert f"{targets.TITLE}:" in made and "| p3 (streaming) |" in made and "| r2 (offline) |" not in made
