"""Teacher, distilled and control side by side: values by hand, verdicts, tables, page, figures."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from transducer_kd.decode import wer
from transducer_kd.decode.compare import comparisons
from transducer_kd.report import collect, html, plots, systems, text

sys.path.insert(0, str(Path(__file__).parent))
from made_up import record, write_phase  # noqa: E402

NBEST, RESCORED, ORACLE = (f"fast_beam_search_nbest{end}" for end in ("", "_las_rescore", "_oracle"))
LAS = {"las": {"enabled": True}}


def taught_by(name):
    return {"teacher": {"kind": "exp_dir", "exp_dir": str(name)}}


@pytest.fixture
def root(tmp_path):
    """Four phases: a teacher and its LAS, a distilled two-pass student and its control."""
    exp = tmp_path / "two_pass" / "exp" / "synthetic-mini"

    def decodings(name, first, second=None, size=1_000_000):
        made = [record(name, method="greedy_search", wer=first + 1.0, params_deployed=size, decode_s=2.0)]
        made += [record(name, method=NBEST, wer=first, params_deployed=size)]
        made += [record(name, method=ORACLE, wer=first / 4, params_deployed=size)]
        if second:
            changes = {"params_deployed": size + 500_000, "decode_s": 12.5, "second_pass_s": 2.5}
            made += [record(name, s, RESCORED, second, **changes) for s in ("test-clean", "test-other")]
        return made

    big, small = 4_000_000, 1_000_000
    write_phase(exp, "teacher", decodings("teacher", 8.0, size=big), big, objective="transducer")
    config = {"objective": "las", "init": {"exp_dir": str(exp / "teacher")}, "model": LAS}
    write_phase(exp, "teacher_las", decodings("teacher_las", 8.0, 6.0, big), 4_500_000, **config)
    config = {"objective": "two_pass", "model": LAS, **taught_by(exp / "teacher_las")}
    write_phase(exp, "student", decodings("student", 9.0, 7.0, small), 1_500_000, **config)
    config = {"objective": "two_pass", "model": LAS}
    write_phase(exp, "student_control", decodings("student_control", 12.0, 10.0, small), 1_500_000, **config)
    return exp


def compared(kind="control", difference=-1.0, p_value=0.01, **changes):
    made = {
        "kind": kind, "mode_a": "offline", "mode_b": "offline", "test_set": "test-clean",
        "phase_a": "student_control", "method_a": RESCORED, "wer_a": 10.0,
        "phase_b": "student", "method_b": RESCORED, "wer_b": 9.0,
        "difference": difference, "low": -1.5, "high": -0.5, "relative": 10 * difference, "p_value": p_value,
    }  # fmt: skip
    return {**made, **changes}


# Side by side


def test_systems_side_by_side_by_hand(root):
    report = collect.collect(root)
    rows = systems.side_by_side_rows(report)
    assert rows[0] == [
        "phase", "what", "test-clean first pass %", "test-clean rescored %",
        "test-clean oracle of the whole list %", "test-other rescored %", "parameters", "float32 MB",
        "smaller than teacher by", "x real time", "2nd / 1st pass time",
    ]  # fmt: skip
    # 1,200 s of audio in 10 s; with the second pass 12.5 s, of which 2.5 s are the LAS: 25 % of the first.
    # A student with a LAS is 1 - 1.5 / 4.5 smaller than the teacher with one.
    assert [row[:2] for row in rows[1:]] == [
        ["teacher", "transducer"],
        ["teacher_las", "LAS on teacher"],
        ["student", "both passes, distilled from teacher_las"],
        ["student_control", "student without distillation"],
    ]
    assert [row[2:] for row in rows[1:]] == [
        ["8.00", "-", "2.00", "-", "4.00 M", "16.0", "-", "120", "-"],
        ["8.00", "6.00", "2.00", "6.00", "4.50 M", "18.0", "-", "96", "25.0 %"],
        ["9.00", "7.00", "2.25", "7.00", "1.50 M", "6.0", "66.7 %", "96", "25.0 %"],
        ["12.00", "10.00", "3.00", "10.00", "1.50 M", "6.0", "66.7 %", "96", "25.0 %"],
    ]
    assert [row[:2] for row in systems.side_by_side_rows(report, has_what=False)[1:3]] == [
        ["teacher", "8.00"],
        ["teacher_las", "8.00"],
    ]
    notes = " ".join(systems.side_by_side_notes(report))
    assert f"First pass: {NBEST}." in notes and "teacher_las (4.50 M)" in notes


def test_a_student_without_las_is_compared_with_the_teacher_without_one(root):
    write_phase(
        root, "small", [record("small", params_deployed=1_000_000)], 1_000_000, **taught_by(root / "teacher")
    )
    report = collect.collect(root)
    row = next(r for r in systems.side_by_side_rows(report) if r[0] == "small")
    assert row[2] == "5.00" and row[8] == "75.0 %" and row[10] == "-"  # greedy search is all it has
    assert "greedy_search for small." in systems.side_by_side_notes(report)[0]


def test_smoke_runs_without_decodings_rescoring_or_sizes(tmp_path):
    root = tmp_path / "r" / "exp" / "synthetic-smoke"
    write_phase(root, "teacher", [record(), record(method="greedy_search", test_set="test-other")])
    write_phase(root, "student", [], None)
    report = collect.collect(root)
    rows = systems.side_by_side_rows(report)
    assert rows[0][2:4] == ["test-clean first pass %", "test-other first pass %"]
    assert "2nd / 1st pass time" not in rows[0]
    assert rows[2] == ["student", "-", "-", "-", "-", "-", "-", "-"]
    page = html.render(report, "")
    assert "Systems side by side" in page and "rescored" not in page.split("<svg")[0]
    (root / "teacher" / "metrics.json").unlink()
    report = collect.collect(root)
    assert systems.side_by_side_notes(report) == [] and systems.key_systems(report) == []
    assert "Nothing has been decoded yet" in html.render(report, "") + text.markdown_section(report)


def test_rescoring_without_a_record_of_the_first_pass(tmp_path):
    root = tmp_path / "r" / "exp" / "synthetic-smoke"
    write_phase(root, "teacher", [record(method="modified_beam_search_las_rescore", second_pass_s=2.0)])
    report = collect.collect(root)
    (system,) = systems.systems(report)
    assert system["first"] == {} and system["headline"]["test-clean"]["wer"] == 5.0
    # 2 s of 10 s: a quarter of the other 8 s.
    assert systems.side_by_side_rows(report)[1][2:] == ["5.00", "0.00 M", "0.0", "-", "120", "25.0 %"]
    assert systems.side_by_side_notes(report)[0].startswith("Rescored")
    assert "5.00" in html.render(report, "")


def test_size_is_that_of_all_methods_where_training_left_none(root):
    (root / "student" / "meta.json").write_text("{}")
    records = json.loads((root / "student" / "metrics.json").read_text())
    (root / "student" / "metrics.json").write_text(json.dumps(records[::-1]))  # the first pass is last
    sizes = {p["name"]: p["params_deployed"] for p in collect.collect(root)["phases"]}
    assert sizes["student"] == 1_500_000


def test_modes_are_systems_of_their_own(root):
    path = root / "student" / "metrics.json"
    streaming = record("student", method="streaming_greedy_search", wer=11.0, mode="streaming")
    path.write_text(json.dumps([*json.loads(path.read_text()), streaming]))
    report = collect.collect(root)
    labels = {s["label"]: s["headline"]["test-clean"]["wer"] for s in systems.systems(report)}
    assert (labels["student (offline)"], labels["student (streaming)"]) == (7.0, 11.0)
    assert plots._point(report, "student", "streaming")["marker"] == "^"


def test_cards_are_the_teacher_the_last_student_and_its_control(root):
    report = collect.collect(root)
    assert [s["label"] for s in systems.key_systems(report)] == ["teacher_las", "student", "student_control"]
    assert "distilled, 1.50 M (66.7 % smaller than the teacher)" in html.render(report, "")
    report["phases"] = [p for p in report["phases"] if not p["name"].startswith("student")]
    assert [s["label"] for s in systems.key_systems(report)] == ["teacher", "teacher_las"]


# Comparisons


@pytest.mark.parametrize(
    ("difference", "p_value", "words"),
    [
        (-1.0, 0.012, "better, p 0.012"),
        (1.0, 0.0002, "worse, p < 0.001"),
        (-1.0, 0.05, "no difference shown, p 0.050"),
        (0.0, 0.01, "no difference shown, p 0.010"),
    ],
)
def test_verdicts(difference, p_value, words):
    assert systems.verdict(compared(difference=difference, p_value=p_value)) == words


def test_comparisons_by_kind_and_the_best_method_alone(root):
    report = collect.collect(root)
    report["comparisons"] = [
        compared(),
        compared(test_set="test-other", difference=0.5, p_value=0.6, low=-0.25, high=1.25),
        compared(method_a=NBEST, method_b=NBEST, relative=None),
        compared("first pass", phase_a="student", method_a=NBEST),
        compared("teacher", phase_a="teacher_las", mode_a="streaming", mode_b="streaming"),
    ]
    teacher, control, passes = systems.comparison_tables(report)
    assert control["rows"][0][3:6] == [
        f"test-clean {name}" for name in ("difference [95 %]", "relative", "verdict")
    ]
    rescored = [
        "student",
        "student_control",
        "rescored",
        "-1.00 [-1.50, -0.50]",
        "-10.0 %",
        "better, p 0.010",
    ]
    rescored += ["+0.50 [-0.25, +1.25]", "+5.0 %", "no difference shown, p 0.600"]
    assert control["rows"][1] == rescored
    assert control["rows"][2][2:5] == ["first pass", "-1.00 [-1.50, -0.50]", "-"]
    assert control["rows"][2][6:] == ["-", "-", "-"]
    assert passes["rows"][1][:3] == ["student", "its first pass", "rescored"]
    assert teacher["rows"][1][:3] == ["student", "teacher_las", "rescored, streaming"]
    assert systems.comparison_notes(report) == [systems.COMPARISON_NOTE, systems.CONTROL_NOTE]
    report["comparisons"][-1]["mode_a"] = "offline"
    assert systems.comparison_tables(report)[0]["rows"][1][2] == "rescored, streaming against offline"
    assert systems.MODES_NOTE in systems.comparison_notes(report)
    report["comparisons"][-1]["mode_a"] = "streaming"
    report["comparisons"] += [compared(phase_a="student_nokd")]
    assert systems.comparison_notes(report)[2:] == [systems.NOKD_NOTE]
    del report["comparisons"][-1]
    short = systems.comparison_tables(report, is_short=True)
    assert [made["rows"][1:] for made in short] == [teacher["rows"][1:], [rescored], passes["rows"][1:]]
    # In a terminal test sets are one below the other; the teacher was compared on one alone.
    lines = [re.split(r" {2,}", line) for line in text.terminal_report(report).splitlines()]
    assert (
        lines.count(["system", "against", "pass", "test set", "difference [95 %]", "relative", "verdict"])
        == 3
    )
    assert ["student", "student_control", "rescored", "test-clean", *rescored[3:6]] in lines
    assert ["", "test-other", *rescored[6:]] in lines
    assert sum(line[:2] == ["", "test-other"] for line in lines) == 1


def test_from_recogs_to_the_page_and_the_texts(root):
    """Ten words in each of 30 utterances; the student errs in every third of them, its control in each."""
    for name, every in (("student", 3), ("student_control", 1)):
        path = root / name / "metrics.json"
        kept = [r for r in json.loads(path.read_text()) if r["method"] == NBEST]
        ref = [f"w{j}" for j in range(10)]
        utts = [(f"c{i}", ref, ["x", *ref[1:]] if i % every == 0 else ref) for i in range(30)]
        kept[0]["wer"] = wer.write_results(root / name / NBEST, "test-clean", "e", utts, NBEST).wer
        kept[0]["recogs"] = f"{NBEST}/recogs-test-clean-e.txt"
        path.write_text(json.dumps(kept))
    report = collect.collect(root)
    report["comparisons"], missing = comparisons(root, report["phases"], report["records"])
    assert [(c["kind"], c["phase_b"], c["method_b"]) for c in report["comparisons"]] == [
        ("control", "student", NBEST)
    ]
    assert report["comparisons"][0]["difference"] == pytest.approx(100 * (10 - 30) / 300)
    assert missing == [
        "paired comparisons: the records of phase teacher_las name no recogs file; decode it again"
    ]
    for made in (html.render(report, ""), text.markdown_section(report), text.terminal_report(report)):
        assert "-6.67 [" in made and "better, p" in made and "Paired bootstrap" in " ".join(made.split())


# Page and figures


def test_page_escapes_what_comparisons_and_configurations_say(root):
    config = {
        "objective": "las",
        "init": {"exp_dir": str(root / "teacher")},
        "model": LAS,
        "corpus": "<b>synthetic",
    }
    (root / "teacher_las" / "config.json").write_text(json.dumps(config))
    report = collect.collect(root)
    report["comparisons"] = [compared(phase_b="<script>alert(1)</script>", p_value=0.0001)]
    page = html.render(report, "")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "better, p &lt; 0.001" in page


def test_figures_of_many_phases_fold_and_tell_roles_apart(root):
    report = collect.collect(root)
    found = {figure.title: figure for figure in plots.figures(report)}
    assert [title for title, figure in found.items() if not figure.is_folded] == [
        "Word error rate against size",
        "Word error rate of the first and the second pass",
    ]
    assert sum(title.startswith("Learning curves") for title in found) == 4
    page = html.render(report, "")
    assert "5 more: every method, learning curves" in page
    assert page.count("<details>") == page.count("</details>")
    for figure in found.values():
        ElementTree.fromstring(figure.svg)
    styles = {p["name"]: plots._point(report, p["name"], "offline") for p in report["phases"]}
    assert [styles[name]["marker"] for name in ("teacher", "student", "student_control")] == ["s", "o", "X"]
    assert styles["student"]["color"] == styles["student_control"]["color"] != styles["teacher"]["color"]


def test_points_of_one_size_stand_beside_each_other_at_the_rescored_rate(root):
    panel = plots.wer_against_size(collect.collect(root)).axes[0]
    points = [tuple(line.get_xydata()[0]) for line in panel.lines if line.get_marker() in ("s", "o", "X")]
    # teacher (8 %, one pass), teacher_las, student, and its control a fortieth of the largest to the right
    assert points == [pytest.approx(p) for p in [(4.0, 8.0), (4.5, 6.0), (1.5, 7.0), (1.6125, 10.0)]]


def test_first_pass_rescored_and_oracle_are_drawn_in_one_line(root):
    figure = plots.wer_by_pass(collect.collect(root))
    panel = figure.axes[0]
    assert re.findall(r"\w+", " ".join(t.get_text() for t in panel.get_yticklabels())) == [
        "teacher", "teacher_las", "student", "student_control",
    ]  # fmt: skip
    drawn = [
        (*line.get_xydata()[0], line.get_alpha(), line.get_markerfacecolor() == "none")
        for line in panel.lines
        if line.get_marker() in ("s", "o", "X")
    ]
    assert drawn[:2] == [(8.0, -0.15, 1.0, False), (2.0, 0.0, None, True)]
    assert drawn[2:5] == [(8.0, 0.85, 0.45, False), (6.0, 1.15, 1.0, False), (2.0, 1.0, None, True)]
    assert len(figure.axes[1].lines) == 6  # of test-other the three rescored rates and their intervals


def test_columns_and_captions_say_what_the_second_pass_and_the_oracle_saw(root):
    for name in ("student", "student_control", "teacher_las"):
        path = root / name / "metrics.json"
        made = [{**r, "parameters": {"rescore_nbest": 16}} for r in json.loads(path.read_text())]
        path.write_text(json.dumps(made))
    report = collect.collect(root)
    assert systems.side_by_side_rows(report)[0][3:6] == [
        "test-clean rescored (best 16) %",
        "test-clean oracle of the whole list %",
        "test-other rescored (best 16) %",
    ]
    seen = "the best 16 hypotheses of the first pass's n-best list"
    assert f"Rescored: {seen}, reordered by the LAS." in systems.side_by_side_notes(report)
    by_pass = next(figure for figure in plots.figures(report) if "second pass" in figure.title)
    assert seen in by_pass.text and "oracle of the whole list" in by_pass.text
