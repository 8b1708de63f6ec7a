"""From invented records to report.json, report.html and RESULTS.md: numbers, named gaps, clear errors."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from transducer_kd.log import UserError
from transducer_kd.report import collect, html, plots, tables, text

sys.path.insert(0, str(Path(__file__).parent))
from made_up import ROOT, record, write_lines, write_phase  # noqa: E402


@pytest.fixture
def exp_dir(tmp_path):
    root = tmp_path / "two_pass" / "exp" / "synthetic-mini"
    small = {"phase": "student", "params_deployed": 500_000}
    taught = {"teacher": {"kind": "exp_dir", "exp_dir": str(root / "teacher")}}
    student = [record(wer=8.0, **small), record(test_set="test-other", **small)]
    write_phase(root, "student", student, 500_000, **taught)
    teacher = [record(), record(test_set="test-other", method="beam", wer=9.0)]
    write_phase(root, "teacher", teacher, 1_750_000)
    stages = [(2, "teacher", 99.0), (0, "data", 5.0), (2, "teacher", 60.0), (2, "teacher_las", 3.0)]
    write_lines(root / "stages.jsonl", [{"stage": s, "name": n, "seconds": t} for s, n, t in stages])
    return root


# Collecting


def test_collects_phases_and_the_newest_stage_times(exp_dir):
    report = collect.collect(exp_dir)
    assert (report["recipe"], report["corpus"], report["scale"]) == ("two_pass", "synthetic", "mini")
    assert report["is_synthetic"]
    assert [(p["name"], p["params_deployed"]) for p in report["phases"]] == [
        ("teacher", 1_750_000),
        ("student", 500_000),
    ]
    assert [r["phase"] for r in report["records"]] == ["teacher", "teacher", "student", "student"]
    assert [(s["stage"], s["seconds"]) for s in report["stages"]] == [(0, 5.0), (2, 60.0), (2, 3.0)]
    assert report["missing"] == ["the description of the synthetic corpus (corpus.json)"]


def test_steps_that_were_renamed_or_moved_count_once(exp_dir):
    steps = [
        (6, "decode and report", 100.0), (6, "decode", 50.0), (6, "report", 2.0), (3, "teacher_las", 7.0),
        (2, "teacher", 60.0), (2, "teacher_las", 8.0), (6, "decode teacher", 10.0), (6, "report", 3.0),
        (6, "decode teacher_las", 11.0),
    ]  # fmt: skip
    write_lines(exp_dir / "stages.jsonl", [{"stage": s, "name": n, "seconds": t} for s, n, t in steps])
    report = collect.collect(exp_dir)
    kept = {(s["stage"], s["name"]): s["seconds"] for s in report["stages"]}
    assert kept == {
        (2, "teacher"): 60.0, (2, "teacher_las"): 8.0, (6, "decode teacher"): 10.0,
        (6, "decode teacher_las"): 11.0, (6, "report"): 3.0,
    }  # fmt: skip
    assert tables.stage_total(report) == "1.5 minutes together"


def test_the_time_of_control_arms_is_told_apart(exp_dir):
    steps = {
        "student": 120.0, "student_control": 60.0, "finetune_nokd": 30.0, "decode student": 60.0,
        "decode student_control": 90.0,
    }  # fmt: skip
    lines = [{"stage": 6 if " " in n else 3, "name": n, "seconds": t} for n, t in steps.items()]
    write_lines(exp_dir / "stages.jsonl", lines)
    report = collect.collect(exp_dir)
    told = "without the control arms: 3.0 minutes; the control arms: 3.0 minutes"
    assert tables.stage_total(report) == told
    assert told in html.render(report, "") and f"Stages ({told}):" in text.markdown_section(report)


def test_training_speed_is_weighted_by_time_and_the_last_validation_is_kept(exp_dir):
    training = collect.collect(exp_dir)["phases"][0]["training"]
    # 10 s at 100 and 30 s at 200 audio-s/s, not the mean of 100 and 200.
    assert training["audio_s_per_s"] == pytest.approx(175.0)
    assert training["elapsed_s"] == 40.0 and training["updates"] == 100
    assert training["last_valid"]["step"] == 100


def test_missing_pieces_are_named_and_old_runs_are_left_out(exp_dir):
    (exp_dir / "student" / "metrics.json").unlink()
    (exp_dir / "student" / "train_log.jsonl").unlink()
    (exp_dir / "teacher" / "meta.json").unlink()
    (exp_dir / "stages.jsonl").unlink()
    write_phase(exp_dir, "teacher.old-20260101-000000", [record(wer=99.0)])
    report = collect.collect(exp_dir)
    named = "; ".join(report["missing"])
    for piece in (
        "student has not been decoded",
        "training log of phase student",
        "meta.json of phase teacher",
    ):
        assert piece in named
    assert "stage times" in named
    assert [p["name"] for p in report["phases"]] == ["teacher", "student"]
    page = html.render(report, "made by a test")
    assert "student has not been decoded" in page and "99.00" not in page
    assert "; phase student has not been decoded" in text.markdown_section(report)


def test_undecoded_phase_alone_is_a_report_too(tmp_path):
    folder = write_phase(tmp_path / "r" / "exp" / "librispeech-small", "teacher", [])
    (folder / "config.json").unlink()
    report = collect.collect(folder.parent)
    assert (report["corpus"], report["scale"], report["is_synthetic"]) == ("librispeech", "small", False)
    page = html.render(report, "")
    assert "Nothing has been decoded yet" in page and tables.SYNTHETIC_WARNING not in page
    assert report["phases"][0]["params_deployed"] == 5  # from meta.json


def test_corpus_description_is_found_beside_the_features(exp_dir, tmp_path):
    data = tmp_path / "data"
    (data / "download" / "LibriSpeech").mkdir(parents=True)
    part = {"speakers": 24, "utterances": 1632, "hours": 1.5, "snr_db": [12.0, 40.0], "accents": ["en-us"]}
    summary = {"seed": 7, "version": 1, "parts": {"train": part}}
    (data / "download" / "LibriSpeech" / "corpus.json").write_text(json.dumps(summary))
    config = {"corpus": "synthetic", "scale": "mini", "data": {"fbank_dir": str(data / "fbank")}}
    (exp_dir / "teacher" / "config.json").write_text(json.dumps(config))
    report = collect.collect(exp_dir)
    assert tables.corpus_rows(report)[1] == ["train", "24", "1,632", "90.0", "12 to 40", "en-us"]
    assert report["missing"] == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("{}", "expected a list"),
        ("[3]", "record 1 is not an object"),
        (json.dumps([record(), {**record(), "wer": "low"}]), "record 2: wer is 'low'"),
        (json.dumps([{k: v for k, v in record().items() if k != "errors"}]), "errors is None"),
        (json.dumps([record()]).replace("1200.0", "NaN"), "audio_s is nan"),
        (json.dumps([record()]).replace("1750000", "true"), "params_deployed is True"),
        (json.dumps([record(second_pass_s="long")]), "second_pass_s is 'long'"),
    ],
)
def test_damaged_metrics_name_the_file_and_the_field(exp_dir, content, told):
    path = exp_dir / "teacher" / "metrics.json"
    path.write_text(content)
    with pytest.raises(UserError, match=told) as error:
        collect.collect(exp_dir)
    assert str(path) in str(error.value)


def test_training_log_cut_by_a_kill_is_read_and_a_damaged_one_named(exp_dir):
    path = exp_dir / "teacher" / "train_log.jsonl"
    with open(path, "a") as f:
        f.write('{"kind": "train", "st')
    assert collect.collect(exp_dir)["phases"][0]["training"]["updates"] == 100
    path.write_text('{"kind": "train", "st\n{"kind": "train", "step": 3}\n')
    with pytest.raises(UserError, match=r"train_log\.jsonl:1 is not valid JSON"):
        collect.collect(exp_dir)
    path.write_text('{"kind": "train"}\n')
    with pytest.raises(UserError, match=r"train_log\.jsonl:1: expected an object with kind, step"):
        collect.collect(exp_dir)


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        collect.collect(tmp_path / "none")
    with pytest.raises(UserError, match="holds no phase"):
        collect.collect(tmp_path)


# Tables


def test_results_have_a_column_per_test_set_and_a_gap_where_one_was_not_decoded(exp_dir):
    rows = tables.results_rows(collect.collect(exp_dir))
    assert rows[0] == [
        "phase",
        "mode",
        "method",
        "parameters",
        "test-clean WER %",
        "test-other WER %",
        "x real time",
    ]
    assert rows[1] == ["teacher", "offline", "greedy_search", "1.75 M", "5.00 [3.75, 6.50]", "-", "120"]
    assert rows[2][2:6] == ["beam", "1.75 M", "-", "9.00 [7.75, 10.50]"]
    assert rows[3][4:] == ["8.00 [6.75, 9.50]", "5.00 [3.75, 6.50]", "120"]


def test_notes_warn_of_oracles_and_of_mixed_or_dirty_code():
    def notes(*records):
        return tables.notes({"records": list(records), "phases": []})

    assert notes(record()) == []
    oracle = record(method="fast_beam_search_nbest_oracle")
    assert notes(oracle) == [tables.ORACLE_NOTE]
    rescored = record(method="modified_beam_search_las_rescore", parameters={"rescore_nbest": 16})
    told = "The LAS rescored the best 16 hypotheses of the first pass's n-best list."
    assert notes(oracle, rescored) == [f"{tables.ORACLE_NOTE} {told}"]
    assert "several commits (abc123, def456)" in notes(record(), record(commit="def456"))[0]
    assert "-dirty" in notes(record(commit="abc-dirty"))[0]


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ([16, 16], "the best 16 hypotheses of the first pass's n-best list"),
        ([0], "all hypotheses of the first pass's n-best list"),
        ([16, 8], "the best first few"),
        ([None], "the best first few"),
        ([], ""),
    ],
)
def test_how_many_hypotheses_the_second_pass_saw(counts, told):
    method = "fast_beam_search_nbest_las_rescore"
    records = [record(method=method, parameters=n and {"rescore_nbest": n}) for n in counts]
    if counts == [0]:
        records = [record(method=method, parameters={"rescore_nbest": 0})]
    found = tables.rescored_text({"records": [record(), *records]})
    assert found.startswith(told) and bool(found) == bool(told)


def test_a_part_that_was_validated_on_and_tested_is_named(exp_dir):
    config = {"corpus": "synthetic", "scale": "mini", "data": {"valid_part": "test-other"}}
    (exp_dir / "teacher" / "config.json").write_text(json.dumps(config))
    tuned = [record(parameters={"tuned_on": "test-clean"}), record(parameters={"tuned_on": "dev"})]
    (exp_dir / "teacher" / "metrics.json").write_text(json.dumps(tuned))
    report = collect.collect(exp_dir)
    named = [note.split()[0] for note in tables.notes(report) if "no independent test" in note]
    assert named == ["test-other", "test-clean"]
    assert "test-other is a test set here and was also" in html.render(report, "")


def test_training_shows_the_terms_of_the_last_validation(exp_dir):
    report = collect.collect(exp_dir)
    rows = tables.training_rows(report)
    assert rows[0][-3:] == ["dev pruned_loss", "dev las_loss", "dev WER %"]
    assert rows[1][-3:] == ["0.625", "-", "30.0"]
    teacher = report["phases"][0]
    teacher["config"]["objective"] = "las"  # the first pass is frozen: its WER is another phase's
    teacher["training"]["last_valid"] = {"step": 9, "las_loss": 1.5, "loss": 2.0, "wer": 30.0}
    assert tables.training_rows(report)[1][-3:] == ["-", "1.500", "-"]
    assert (
        len(plots.learning_curves(teacher).axes) == 2
        and len(plots.learning_curves(report["phases"][1]).axes) == 3
    )
    assert "prunes by its teacher's bounds" in text.markdown_section(report)
    assert "see other lattices" in html.render(report, "")


def test_terminal_and_markdown_tables():
    rows = [["name", "WER %"], ["a|b", "1.5"], ["c", "10.25"]]
    assert text.terminal_table(rows) == "name  WER %\n-----------\na|b     1.5\nc     10.25"
    long = [["name", "rate of all sets"], ["a", "+1.5"], ["b", "-10"]]
    assert (
        text.terminal_table(long)
        == "      rate\n        of\n       all\nname  sets\n----------\na     +1.5\nb      -10"
    )
    assert text.markdown_table(rows) == "| name | WER % |\n|---|---|\n| a\\|b | 1.5 |\n| c | 10.25 |"


def test_results_md_keeps_the_sections_of_other_corpora(exp_dir, tmp_path):
    path = tmp_path / "RESULTS.md"
    report = collect.collect(exp_dir)
    text.update_results(
        path, {**report, "corpus": "librispeech", "scale": "small", "is_synthetic": False}, "one"
    )
    text.update_results(path, report, "two")
    first = path.read_text()
    report["records"][0]["wer"] = 77.0
    text.update_results(path, report, "three")
    last = path.read_text()
    assert last.startswith("<!-- generated by local/report.py") and "```sh\nthree\n```" in last
    assert last.count("## synthetic, mini") == last.count("## librispeech, small") == 1
    assert last.count(tables.SYNTHETIC_WARNING) == 1
    assert "77.00" in last and "77.00" not in first
    begin = "<!-- begin librispeech-small -->"
    assert first.split(begin)[1].split("<!-- end")[0] == last.split(begin)[1].split("<!-- end")[0]
    assert str(ROOT) not in last  # commands read the same in another checkout


def test_files_of_others_are_not_overwritten(exp_dir, tmp_path):
    report = collect.collect(exp_dir)
    path = tmp_path / "RESULTS.md"
    path.write_text("# My own results\n")
    with pytest.raises(UserError, match="not made by local/report.py"):
        text.update_results(path, report, "")
    assert path.read_text() == "# My own results\n"
    text.update_results(tmp_path / "made.md", report, "")
    damaged = (tmp_path / "made.md").read_text().replace("<!-- end synthetic-mini -->", "")
    (tmp_path / "made.md").write_text(damaged)
    with pytest.raises(UserError, match="damaged section marks"):
        text.update_results(tmp_path / "made.md", report, "")


def test_readme_block_is_renewed_and_the_rest_kept(exp_dir, tmp_path):
    report = collect.collect(exp_dir)
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n")
    text.update_block(path, report)
    once = path.read_text()
    text.update_block(path, report)
    assert path.read_text() == once
    assert once.startswith("before\n<!--") and once.endswith("-->\nafter\n") and "\nold\n" not in once
    row = "| student | - | 8.00 | 5.00 | 0.50 M | 2.0 | 71.4 % | 120 |"
    assert row in once and tables.SYNTHETIC_WARNING in once
    assert "[3.75, 6.50]" not in once  # every method's interval is too much for a README
    (tmp_path / "plain.md").write_text("no marks")
    with pytest.raises(UserError, match="results:begin"):
        text.update_block(tmp_path / "plain.md", report)


# The page


def test_page_is_self_contained_and_labels_synthetic_speech(exp_dir):
    (exp_dir / "teacher" / "meta.json").write_text(json.dumps({"command": "<script>alert(1)</script>"}))
    page = html.render(collect.collect(exp_dir), "made by a test")
    assert page.count(tables.SYNTHETIC_WARNING.replace("'", "&#39;")) == 1
    assert "<script" not in page and "&lt;script&gt;" in page
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!#)|url\((?!#)|@import", without_names)
    assert "5.00 [3.75, 6.50]" in page and "abc123" in page and "made by a test" in page


def test_every_figure_is_svg_with_live_text_and_the_colours_of_the_page(exp_dir):
    found = plots.figures(collect.collect(exp_dir))
    assert [figure.title for figure in found] == [
        "Word error rate against size",
        "Word error rate by decoding method",
        "Learning curves: teacher",
        "Learning curves: student",
        "Time of each stage",
    ]
    for _, svg, *_ in found:
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg") and "viewBox" in root.attrib and "width" not in root.attrib
        assert "currentColor" in svg and "#010203" not in svg and "#040506" not in svg
        assert any(e.tag.endswith("text") for e in root.iter())
    assert "test-other" in found[0][1] and "0  data" in found[-1][1].replace("\u00a0", " ")


def test_same_input_gives_the_same_page(exp_dir):
    report = collect.collect(exp_dir)
    assert html.render(report, "") == html.render(report, "")


# The program


def run_program(*arguments):
    command = [sys.executable, str(ROOT / "local" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_program_writes_all_files_and_prints_the_table(exp_dir):
    done = run_program("--exp-dir", exp_dir)
    assert done.returncode == 0, done.stderr
    assert tables.SYNTHETIC_WARNING in done.stdout
    assert re.search(r"^student +8\.00 +5\.00 +0\.50 M +2\.0 +71\.4 % +120$", done.stdout, re.MULTILINE)
    assert "missing: paired comparisons: the records of phase teacher name no recogs file" in done.stdout
    assert json.loads((exp_dir / "report.json").read_text())["records"][0]["wer"] == 5.0
    assert (exp_dir / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "## synthetic, mini" in (exp_dir.parent.parent / "RESULTS.md").read_text()


def test_one_phase_is_shown_method_by_method(exp_dir, tmp_path):
    (exp_dir / "student").rename(exp_dir / "student.old-20260101-000000")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->")
    done = run_program("--exp-dir", exp_dir, "--readme", readme, "--results", "none")
    assert done.returncode == 0, done.stderr
    assert "5.00 [3.75, 6.50]" in done.stdout and "side by side" not in done.stdout
    assert "5.00 [3.75, 6.50]" in readme.read_text() and "smaller than" not in readme.read_text()
    assert "Systems side by side" not in (exp_dir / "report.html").read_text()


def test_program_reports_a_damaged_file_in_one_line(exp_dir):
    (exp_dir / "teacher" / "metrics.json").write_text("[")
    done = run_program("--exp-dir", exp_dir, "--results", "none")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "metrics.json" in done.stderr
    assert not (exp_dir / "report.html").exists()
