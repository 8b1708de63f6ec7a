"""What stage 7 leaves behind in a report: sizes, rates beside PyTorch's, speeds, gates, gaps and damage."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from transducer_kd.log import UserError, write_json
from transducer_kd.report import collect, device, fields, html, plots, tables, text
from transducer_kd.report.fields import Maybe

sys.path.insert(0, str(Path(__file__).parent))
from made_up import record, write_bench, write_done, write_export, write_phase  # noqa: E402

WERS = {"teacher": {"a": 2.0, "b": 8.0}, "student": {"a": 3.0, "b": 12.0}}


@pytest.fixture
def root(tmp_path):
    """A teacher of 32 MB and a student of 4, both exported and measured in one run."""
    exp = tmp_path / "two_pass" / "exp" / "synthetic-mini"
    measured = {"teacher": ((1.0, 2.0), (1.0, 4.0)), "student": ((4.0, 5.0), (8.0, 32.0))}
    for name, (times, smaller) in measured.items():
        decoded = [record(name, s, wer=wer, checkpoint="epoch-2") for s, wer in WERS[name].items()]
        taught = (
            {"teacher": {"kind": "exp_dir", "exp_dir": str(exp / "teacher")}} if name == "student" else {}
        )
        folder = write_phase(exp, name, decoded, 8_000_000 if name == "teacher" else 1_000_000, **taught)
        export = write_export(folder, WERS[name], [32 / x for x in smaller])
        write_bench(export, times, smaller)
    return exp


def change(path, **fields_of_it):
    """fields_of_it: what a function makes of the old value."""
    content = json.loads(path.read_text())
    for name, changed in fields_of_it.items():
        content[name] = changed(content.get(name))
    write_json(path, content)


def of_export(missing):
    return [m for m in missing if "export" in m]


# Tables


def test_sizes_rates_and_speeds_by_hand(root):
    report = collect.collect(root)
    assert of_export(report["missing"]) == []
    rows = device.device_rows(report)
    assert rows[0] == [
        "phase", "precision", "MB", "a WER % (PyTorch)", "b WER % (PyTorch)", "times smaller", "times faster",
        "RTF", "mode", "gate",
    ]  # fmt: skip
    assert {tuple(row[-2:]) for row in rows[1:]} == {("streaming", "passed")}
    assert [row[:-2] for row in rows[1:]] == [
        ["teacher", "float", "32.00", "2.00 (2.00)", "8.00 (8.00)", "1.0", "1.0", "0.0400"],
        ["teacher", "int8", "8.00", "2.25 (2.00)", "8.25 (8.00)", "4.0", "2.0", "0.0200"],
        ["student", "float", "4.00", "3.00 (3.00)", "12.00 (12.00)", "8.0", "4.0", "0.0100"],
        ["student", "int8", "1.00", "3.25 (3.00)", "12.25 (12.00)", "32.0", "5.0", "0.0080"],
    ]
    assert "than teacher float" in device.device_notes(report)[0]
    assert len(device.device_notes(report)) == 1


def test_words_have_a_row_per_mode_and_test_set(root):
    report = collect.collect(root)
    rows = device.words_rows(report)
    assert rows[0] == [
        "phase", "mode", "test set", "PyTorch WER %", "by chunks identical %", "float WER %",
        "float identical %", "int8 WER %", "int8 identical %", "int8 - PyTorch",
    ]  # fmt: skip
    assert [row[:3] for row in rows[1:5]] == [
        ["teacher", mode, test_set] for mode in ("streaming", "offline") for test_set in "ab"
    ]
    wer, int8 = "2.00 [1.00, 3.00]", "2.25 [1.25, 3.25]"
    assert rows[1][3:] == [wer, "100.0", wer, "99.8", int8, "98.0", "+0.25"]
    assert rows[3][3:] == [wer, "-", wer, "99.8", int8, "98.0", "+0.25"]
    note, of_odd = device.words_notes(report)
    assert "wants 99.5 % of all but int8, and of int8 a WER at most 0.3 worse" in note
    assert "the same words everywhere for 2 of 2" in of_odd and "of int8 90 % of those" in of_odd


def test_time_and_memory_of_the_first_and_the_last_minute(root):
    report = collect.collect(root)
    rows = device.speed_rows(report)
    assert rows[0][3:] == [
        "RTF", "RTF without features", "times faster", "times faster without features", "ms a chunk",
        "peak MB", "first minute: MB", "first minute: ms a chunk", "last minute: MB",
        "last minute: ms a chunk",
    ]  # fmt: skip
    chunk = "3.00 (3.75)"
    assert rows[3][:3] == ["student", "float", "streaming"]
    assert rows[3][3:] == ["0.0100", "0.0075", "4.0", "4.0", chunk, "70", "60.0", chunk, "60.5", chunk]
    (note,) = device.speed_notes(report)
    assert note.startswith("sherpa-onnx 2.0.1, one thread; medians of 15 turns") and "of 120 s in all" in note
    assert "46 MB of it Python" in note
    change(root / "student" / "export" / "bench.json", audio_s=lambda _: 60.0, num_threads=lambda _: 2)
    assert "from 2 runs" in device.speed_notes(collect.collect(root))[1]


def test_what_was_not_measured_is_left_open(root):
    def without(rows):
        return [{**row, "rtf_model": None, "peak_mb": None, "last_minute": None} for row in rows]

    change(root / "teacher" / "export" / "bench.json", rows=without)
    (root / "student" / "export" / "bench.json").unlink()
    (root / "student" / "export" / "gate.json").unlink()
    report = collect.collect(root)
    assert of_export(report["missing"]) == [
        "the parity gate of the export of phase student (no gate.json): run stage 7 again",
        "the benchmark of the export of phase student (no bench.json): run stage 7 again",
    ]
    by_phase = {tuple(row[:2]): row[2:] for row in device.device_rows(report)}
    assert by_phase["student", "int8"] == ["1.00", "- (-)", "- (-)", "-", "-", "-", "streaming", "-"]
    assert [row[4:] for row in device.speed_rows(report)[1:2]] == [
        ["-", "1.0", "1.0", "12.00 (15.00)", "-", "60.0", "12.00 (15.00)", "-", "-"]
    ]
    assert {row[0] for row in device.words_rows(report)[1:]} == {"teacher"}


def test_an_offline_model_and_one_without_int8(root):
    for name in ("student", "teacher"):
        (root / name / "export").rename(root / name / "away")
    folder = write_export(root / "student", WERS["student"], modes=("offline",))
    change(
        folder / "model.json", files=lambda files: {n: f for n, f in files.items() if n != "joiner.int8.onnx"}
    )
    rows = device.device_rows(collect.collect(root))
    assert [(row[0], row[1], row[-2]) for row in rows[1:]] == [("student", "float", "offline")]


def test_the_second_pass_has_rows_of_its_own_with_its_bytes(root):
    (root / "student" / "export").rename(root / "student" / "away")
    write_bench(write_export(root / "student", WERS["student"], (4.0, 1.0), las=0.5), (4.0, 5.0), (8.0, 32.0))
    report = collect.collect(root)
    rows = device.device_rows(report)
    assert [row[1:5] + row[6:8] for row in rows if row[0] == "student"] == [
        ["float", "first pass", "4.00", "3.00 (3.00)", "8.0", "4.0"],
        ["float", "with LAS", "4.40", "2.50 (2.50)", "-", "-"],
        ["int8", "first pass", "1.00", "3.25 (3.00)", "32.0", "5.0"],
        ["int8", "with LAS", "1.10", "2.75 (2.50)", "-", "-"],
    ]
    assert "with as many passes; only the first pass is timed." in device.device_notes(report)[0]
    of_student = [row[1:4] for row in device.words_rows(report) if row[0] == "student"]
    assert of_student[:4] == [["streaming", p, s] for p in ("first pass", "with LAS") for s in "ab"]


def test_two_passes_are_compared_with_two_passes(root):
    for name, megabytes in (("teacher", (32.0, 8.0)), ("student", (4.0, 1.0))):
        shutil.rmtree(root / name / "export")
        write_bench(write_export(root / name, WERS[name], megabytes, las=0.5), (1.0, 1.0), (1.0, 1.0))
    rows = device.device_rows(collect.collect(root))
    smaller = {tuple(row[:3]): row[-5] for row in rows[1:]}
    assert (
        smaller["student", "int8", "with LAS"] == "32.0" and smaller["teacher", "int8", "with LAS"] == "4.0"
    )
    assert smaller["teacher", "float", "with LAS"] == "1.0"


def test_a_gate_that_was_not_passed_says_why(root):
    gate = root / "student" / "export" / "gate.json"
    off = {
        "part": "encoder-streaming.onnx",
        "output": "encoder_out",
        "max_difference": 0.025,
        "passed": False,
    }
    shapeless = {"part": "las.onnx", "output": "score", "max_difference": None, "passed": False}
    odd = {"pytorch": "turn on", "chunks": "turn on", "onnx": "turn on", "int8": ""}
    change(
        gate,
        passed=lambda _: False,
        tensors=lambda rows: [*rows, {**off, "starts_at": "layer 2"}, shapeless],
        words=lambda rows: [
            {**r, "passed": r["implementation"] != "int8" or r["test_set"] != "b"} for r in rows
        ],
        odd=lambda rows: [
            *rows,
            {"mode": "streaming", "input": "clipped", "words": odd, "same": False, "passed": False},
        ],
    )
    report = collect.collect(root)
    assert [row[-1] for row in device.device_rows(report)[1:]] == ["passed"] * 2 + ["not passed"] * 2
    assert device.device_notes(report)[1:] == [
        "The gate of student was not passed: encoder-streaming.onnx: encoder_out differs by 0.025, from "
        "layer 2 on; las.onnx: score has another shape or infinite values; "
        "int8, streaming, b: WER +0.25, identical 98.0 %; "
        "int8, offline, b: WER +0.25, identical 98.0 %; odd inputs with different words: 1."
    ]
    assert device.odd_rows(report)[1:] == [
        ["student", "streaming", "clipped", "turn on", "turn on", "turn on", "(nothing)"]
    ]
    assert device.device_tables(report)[-1].title == device.ODD_TITLE


def test_what_int8_computes_in_float_is_told(root):
    relaxed = [{"module": "joiner", "how": "weights"}, {"module": "las.lstm", "how": "float"}]
    change(root / "student" / "export" / "model.json", int8=lambda _: {"relaxed": relaxed})
    change(root / "teacher" / "export" / "model.json", int8=lambda _: {"relaxed": []})
    assert device.words_notes(collect.collect(root))[2:] == [
        "int8 of student computes in float: joiner (weights stored in int8), las.lstm (nothing in int8)."
    ]


# What is left out, and what is damaged


@pytest.mark.parametrize("is_marked", [True, False])
def test_an_export_from_before_the_training_is_left_out(root, is_marked):
    made = (root / "student" / "export" / "model.json").stat().st_mtime
    if is_marked:  # by run.sh
        write_done(root, teacher=int(made) - 60, student=int(made) + 60)
    else:
        os.utime(root / "student" / "train_log.jsonl", (made + 60, made + 60))
    report = collect.collect(root)
    assert of_export(report["missing"]) == [
        "the export of phase student is stale and left out: student was trained again after it; run stage 7 "
        "again"
    ]
    assert {row[0] for row in device.device_rows(report)[1:]} == {"teacher"}
    if is_marked:  # the mark tells, not a log that was copied later
        write_done(root, student=int(made) - 30)
        os.utime(root / "student" / "train_log.jsonl", (made + 60, made + 60))
        assert of_export(collect.collect(root)["missing"]) == []


def test_an_export_of_other_weights_than_those_decoded_is_left_out(root):
    change(root / "student" / "export" / "model.json", checkpoint=lambda _: "epoch-1-avg-2")
    report = collect.collect(root)
    assert of_export(report["missing"]) == [
        "the export of phase student is stale and left out: it holds epoch-1-avg-2, and decoded was epoch-2; "
        "run stage 7 again"
    ]
    (root / "student" / "metrics.json").unlink()
    assert {row[0] for row in device.device_rows(collect.collect(root))[1:]} == {"teacher", "student"}


def test_the_export_of_a_stale_phase_is_left_out(root):
    now = int((root / "student" / "export" / "model.json").stat().st_mtime)
    write_done(root, teacher=now - 60, student=now - 120)
    assert {row[0] for row in device.device_rows(collect.collect(root))[1:]} == {"teacher"}


def test_a_half_made_export_is_named(root):
    (root / "student" / "export" / "model.json").unlink()
    report = collect.collect(root)
    assert of_export(report["missing"]) == [
        "the export of phase student, which is not finished (no model.json): run stage 7 again"
    ]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("model", {"files": lambda _: None}, "files is None, not an object"),
        (
            "model",
            {"files": lambda f: {**f, "las.onnx": {}}},
            "files.las.onnx.bytes is None, not of type int",
        ),
        (
            "model",
            {"int8": lambda _: {"relaxed": ["joiner"]}},
            r"int8.relaxed\[0\] is 'joiner', not an object",
        ),
        ("gate", {"passed": lambda _: 1}, "passed is 1, not of type bool"),
        (
            "gate",
            {"words": lambda rows: [rows[0], {**rows[1], "wer": "low"}]},
            r"words\[1\].wer is 'low', not of",
        ),
        (
            "gate",
            {"words": lambda rows: [{**rows[0], "wer": float("nan")}]},
            r"words\[0\].wer is nan, not a finite",
        ),
        ("gate", {"odd": lambda _: {}}, "odd is {}, not a list"),
        (
            "bench",
            {"rows": lambda rows: [{**rows[0], "rtf": None}]},
            r"rows\[0\].rtf is None, not of type float",
        ),
        (
            "bench",
            {"rows": lambda rows: [{**rows[0], "first_minute": {"resident_mb": 1}}]},
            r"rows\[0\].first_minute.chunk_ms_median is None",
        ),
    ],
)
def test_damage_names_the_file_and_the_field(root, name, changes, told):
    path = root / "student" / "export" / f"{name}.json"
    change(path, **changes)
    with pytest.raises(UserError, match=told) as error:
        collect.collect(root)
    assert str(error.value).startswith(f"{path}: ") and str(error.value).endswith("; run stage 7 again")
    path.write_text("{")
    with pytest.raises(UserError, match=rf"export/{name}\.json is not valid JSON"):
        collect.collect(root)


def test_fields_of_any_depth():
    wanted = {"a": [{"b": Maybe(float)}], "c": {str: int}}
    fields.check({"a": [{"b": 1}, {"b": None}, {}], "c": {"x": 1}, "more": "x"}, wanted, "f", "mend")
    for value, told in (
        (3, "f is not an object; mend"),
        ({"a": [{"b": True}], "c": {}}, "f: a[0].b is True, not of type float; mend"),
        ({"a": [], "c": {"x": 1, "y": "2"}}, "f: c.y is '2', not of type int; mend"),
        ({"a": [], "c": list(range(99))}, f"f: c is {repr(list(range(99)))[:80]}..., not an object; mend"),
    ):
        with pytest.raises(UserError) as error:
            fields.check(value, wanted, "f", "mend")
        assert str(error.value) == told


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint": lambda _: "epoch-1"},
        {"rows": lambda rows: [{**rows[0], "bytes": rows[0]["bytes"] - 1}]},
    ],
)
def test_a_benchmark_of_another_export_is_left_out(root, changes):
    change(root / "student" / "export" / "bench.json", **changes)
    report = collect.collect(root)
    assert of_export(report["missing"]) == [
        "the benchmark of the export of phase student, which is of another export: run stage 7 again"
    ]
    assert {row[0] for row in device.speed_rows(report)[1:]} == {"teacher"}


# Models of other recipes


@pytest.fixture
def beside(root):
    """dual_mode's sparse student, measured in the run of `root`; returns its model folder."""
    exp = root.parents[2] / "dual_mode" / "exp" / "synthetic-mini"
    export = write_export(write_phase(exp, "extracted", []), {"a": 4.0, "b": 9.0}, (2.0, 0.5))
    write_bench(export, (2.0, 8.0), (16.0, 64.0))
    run = json.loads((export / "bench.json").read_text())
    measured = {name: run.pop(name) for name in ("checkpoint", "rows")}
    measured["files"] = json.loads((export / "model.json").read_text())["files"]
    measured.update(name="dual_mode/extracted", folder=os.path.relpath(export, root))
    write_json(root / "beside.json", {**run, "models": [measured]})
    (export / "bench.json").unlink()
    return export


def test_they_stand_below_the_own_ones(root, beside):
    report = collect.collect(root)
    assert of_export(report["missing"]) == []
    assert [row[:8] for row in device.device_rows(report)[5:]] == [
        ["dual_mode/extracted", "float", "2.00", "4.00 (4.00)", "9.00 (9.00)", "16.0", "2.0", "0.0200"],
        ["dual_mode/extracted", "int8", "0.50", "4.25 (4.00)", "9.25 (9.00)", "64.0", "8.0", "0.0050"],
    ]
    assert "another recipe" in device.device_notes(report)[1]
    assert [row[0] for row in device.speed_rows(report)[5:]] == 2 * ["dual_mode/extracted"]
    assert len(device.speed_notes(report)) == 1, "it is one run"
    assert {row[0] for row in device.words_rows(report)[1:]} == {"teacher", "student"}
    names = {t.get_text() for t in plots.wer_on_device(report).legends[0].get_texts()}
    assert {"dual_mode/extracted float", "dual_mode/extracted int8"} < names
    colours = plots._device_colours(report, device.deployed(report))
    assert set(colours) == {"teacher", "student", "dual_mode/extracted"} and len(set(colours.values())) == 3
    facts = {row[0]: row[1] for row in tables.provenance_rows(report)}
    assert facts["dual_mode/extracted: exported by"] == "commit abc123, local/export.py"


def exported_anew(export):
    """Under the same names, with the same bytes."""
    change(export / "model.json", files=lambda files: {n: {**f, "sha256": "1"} for n, f in files.items()})


@pytest.mark.parametrize("name", ["dual_mode/extracted", "a_long_recipe/with_quite_a_long_phase", "a/b"])
def test_the_legend_stays_on_the_page(root, beside, name):
    change(
        root / "beside.json", models=lambda models: [{**models[0], "name": f"{name}{i}"} for i in range(5)]
    )
    figure = plots.wer_on_device(collect.collect(root))
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width


@pytest.mark.parametrize(
    "harm, told",
    [
        (exported_anew, "dual_mode/extracted, which was measured beside these and is another or gone by now"),
        (shutil.rmtree, "dual_mode/extracted, which was measured beside these and is another or gone by now"),
        (
            lambda export: change(export / "gate.json", words=lambda _: 1),
            "words is 1, not a list; run stage 7",
        ),
        (lambda export: (export / "gate.json").write_text("{"), "of that recipe"),
    ],
)
def test_those_that_are_not_what_was_measured_are_left_out(root, beside, harm, told):
    harm(beside)
    report = collect.collect(root)
    (gap,) = [m for m in report["missing"] if "beside" in m]
    assert told in gap and ".." not in gap
    assert len(device.device_rows(report)) == 5 and len(device.device_notes(report)) == 1


def test_they_are_nothing_by_themselves(root, beside):
    for name in WERS:
        (root / name / "export").rename(root / name / "away")
    report = collect.collect(root)
    assert device.device_tables(report) == [] and of_export(report["missing"]) == []
    assert not [row for row in tables.provenance_rows(report) if "dual_mode" in row[0]]


def test_the_figure_needs_only_their_gates(root, beside):
    for name in WERS:
        (root / name / "export" / "gate.json").unlink()
    names = {t.get_text() for t in plots.wer_on_device(collect.collect(root)).legends[0].get_texts()}
    assert names == {"dual_mode/extracted float", "dual_mode/extracted int8", "a", "b"}


def test_damage_of_what_was_measured_beside_is_named(root, beside):
    change(root / "beside.json", models=lambda models: [{**models[0], "rows": "none"}])
    with pytest.raises(UserError, match=r"beside.json: models\[0\].rows is 'none', not a list; run stage 7"):
        collect.collect(root)


# Pages and figures


def test_every_page_shows_the_device(root, no_figures, tmp_path):
    report = collect.collect(root)
    report["missing"] = []
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    text.update_block(readme, report)
    row = "| student | int8 | 1.00 | 3.25 | 12.25 | 32.0 | 5.0 |"
    assert row in readme.read_text() and device.SPEED_TITLE not in readme.read_text()
    page, section, terminal = (
        html.render(report, ""),
        text.markdown_section(report),
        text.terminal_report(report),
    )
    for shown in (page.replace("&#39;", "'"), section, terminal):
        for title in (device.TITLE, device.WORDS_TITLE, device.SPEED_TITLE):
            assert title in shown
        assert "3.25 [2.25, 4.25]" in shown and device.ODD_TITLE not in shown
    assert f"{device.TITLE} (synthetic speech)" in page
    facts = {row[0]: row[1] for row in tables.provenance_rows(report)}
    assert facts["student: exported by"] == "commit abc123, local/export.py"
    assert facts["student: benchmark on the device by"] == "commit abc123, local/bench_export.py"


def test_without_exports_there_is_nothing_of_the_device(root, no_figures, tmp_path):
    for name in WERS:
        (root / name / "export").rename(root / name / "away")
    report = collect.collect(root)
    assert device.device_tables(report) == [] and [p["export"] for p in report["phases"]] == [None, None]
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    text.update_block(readme, report)
    for shown in (html.render(report, ""), text.markdown_section(report), readme.read_text()):
        assert "On the device" not in shown


def test_a_point_for_each_phase_precision_and_test_set(root):
    report = collect.collect(root)
    figure = plots.wer_on_device(report)
    by_size, by_time = figure.axes
    points = {
        (tuple(line.get_xydata()[0]), line.get_marker(), line.get_markerfacecolor() == "none")
        for line in by_size.lines
        if line.get_linestyle() == "None" and len(line.get_xydata())
    }
    assert points == {
        ((size, wer + more), shape, more > 0)
        for name, sizes in (("teacher", (32.0, 8.0)), ("student", (4.0, 1.0)))
        for size, more in zip(sizes, (0.0, 0.25))
        for wer, shape in zip(WERS[name].values(), "os")
    }
    assert by_size.get_xscale() == "log" and by_time.get_xscale() == "linear"
    times = {tuple(line.get_xydata()[0]) for line in by_time.lines if len(line.get_xydata()) == 1}
    assert (0.008, 12.25) in {(round(x, 6), y) for x, y in times} and len(times) == 8
    names = {t.get_text() for t in figure.legends[0].get_texts()}
    assert names == {"teacher float", "teacher int8", "student float", "student int8", "a", "b"}
    (drawing,) = [f for f in plots.figures(report) if f.title == "Word error rate on the device"]
    assert "teacher int8" in drawing.svg.replace("\u00a0", " ")
    assert 'Word error rate on the device<span class="soft"> (synthetic speech)' in html.render(report, "")


def test_the_figure_needs_no_benchmark_and_no_gate_has_none(root):
    for name in WERS:
        (root / name / "export" / "bench.json").unlink()
    assert len(plots.wer_on_device(collect.collect(root)).axes) == 2
    for name in WERS:
        (root / name / "export" / "gate.json").unlink()
    titles = [f.title for f in plots.figures(collect.collect(root))]
    assert "Word error rate on the device" not in titles
