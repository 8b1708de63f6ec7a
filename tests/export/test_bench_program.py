"""local/bench_export.py end to end on tiny exported models: what it writes, what it refuses."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording

from tests.data.test_features import speechlike
from tests.export.folders import with_int8
from transducer_kd.log import UserError
from transducer_kd.report.exports import read_beside, read_export

PROGRAM = Path(__file__).resolve().parents[2] / "local" / "bench_export.py"


def write_part(fbank_dir, part, seconds):
    cuts = []
    for i, duration in enumerate(seconds):
        path = fbank_dir / f"{part}-{i}.wav"
        soundfile.write(path, speechlike(round(16000 * duration), i), 16000)
        cuts.append(MonoCut(path.stem, 0.0, duration, 0, [], recording=Recording.from_file(path)))
    CutSet.from_cuts(cuts).to_file(fbank_dir / f"cuts_{part}.jsonl.gz")


@pytest.fixture
def exp(streaming_folder, offline_folder, tmp_path):
    """teacher/export, which does not stream, and student/export, which has int8 files; fbank/."""
    (tmp_path / "fbank").mkdir()
    write_part(tmp_path / "fbank", "test-clean", [1.0, 2.0])
    write_part(tmp_path / "fbank", "test-other", [1.5])
    shutil.copytree(offline_folder, tmp_path / "teacher" / "export")
    with_int8(streaming_folder, tmp_path / "student" / "export")
    config = {"data": {"fbank_dir": str(tmp_path / "fbank")}}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def run(exp, monkeypatch):
    """Function: runs the program on phases of exp."""
    spec = importlib.util.spec_from_file_location("bench_export_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def call(*phases, options=()):
        folders = [str(exp / phase / "export") for phase in phases]
        small = ["--audio-s", "2", "--turns", "2", "--stream-s", "121", "--streams", "1"]
        argv = ["bench_export.py", "--export-dir", *folders, *small, *options]
        monkeypatch.setattr(program, "setup_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", argv)
        return program.main()

    return call


def test_every_folder_gets_its_rows(run, exp, capsys):
    assert run("teacher", "student") == 0
    found = {
        name: json.loads((exp / name / "export/bench.json").read_text()) for name in ("teacher", "student")
    }
    for bench in found.values():
        assert bench["reference"] == "teacher float" and bench["num_threads"] == 1
        assert bench["runtime"].startswith("sherpa-onnx ") and bench["checkpoint"] == "epoch-1"
        assert (bench["turns"], bench["audio_s"], bench["stream_s"]) == (2, 2, 121)
        assert "--export-dir" in bench["command"] and bench["commit"]
    (teacher,) = found["teacher"]["rows"]
    assert teacher["mode"] == "offline" and teacher["first_minute"] is None
    assert teacher["times_faster"] == teacher["times_smaller"] == 1
    float_row, int8_row = found["student"]["rows"]
    assert (float_row["precision"], int8_row["precision"]) == ("float", "int8")
    for row in (float_row, int8_row):
        assert row["phase"] == "student" and row["mode"] == "streaming"
        parts = ("encoder-streaming", "decoder", "joiner")
        suffix = ".onnx" if row is float_row else ".int8.onnx"
        folder = exp / "student" / "export"
        assert row["bytes"] == sum((folder / f"{part}{suffix}").stat().st_size for part in parts)
        assert row["times_smaller"] == teacher["bytes"] / row["bytes"]
        assert row["rtf"] == pytest.approx(row["rtf_model"] + row["rtf_features"], rel=0.5)
        assert 0 < row["rtf_features"] < 1 and 0 < row["chunk_ms_median"] <= row["chunk_ms_p95"]
        for minute in (row["first_minute"], row["last_minute"]):
            assert row["baseline_mb"] < minute["resident_mb"] <= row["peak_mb"]
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in shown[1:]] == [
        ["teacher", "float", "offline"],
        ["student", "float", "streaming"],
        ["student", "int8", "streaming"],
    ]


def test_the_report_reads_it(run, exp):
    run("student", options=["--fbank-dir", str(exp / "fbank"), "--test-parts", "test-other"])
    export, _ = read_export(exp / "student", None, [])
    assert [row["precision"] for row in export["bench"]["rows"]] == ["float", "int8"]


@pytest.fixture
def other(exp):
    """The student's folder, moved to elsewhere/export; it passed its gate."""
    folder = exp / "elsewhere" / "export"
    folder.parent.mkdir()
    (exp / "student" / "export").rename(folder)
    (folder / "gate.json").write_text('{"passed": true}')
    return folder


def test_other_recipes_are_measured_beside_them(run, exp, other):
    found = exp / "beside.json"
    assert run("teacher", options=["--beside", str(other), "--beside-json", str(found)]) == 0
    own = json.loads((exp / "teacher/export/bench.json").read_text())
    assert [row["phase"] for row in own["rows"]] == ["teacher"] and not (other / "bench.json").exists()
    beside = json.loads(found.read_text())
    (model,) = beside["models"]
    info = json.loads((other / "model.json").read_text())
    assert model["name"] == f"{info['recipe']}/{info['phase']}" and model["folder"] == "elsewhere/export"
    assert [row["precision"] for row in model["rows"]] == ["float", "int8"]
    assert model["rows"][0]["times_smaller"] == own["rows"][0]["bytes"] / model["rows"][0]["bytes"]
    assert beside["command"] == own["command"] and beside["reference"] == "teacher float"
    assert model["files"] == info["files"]


@pytest.mark.parametrize(
    "harm, told",
    [
        (lambda folder: (folder / "decoder.onnx").unlink(), "decoder.onnx"),
        (lambda folder: (folder / "gate.json").unlink(), "it has not passed its gate"),
        (lambda folder: (folder / "gate.json").write_text('{"passed": false}'), "it has not passed its gate"),
        (lambda folder: (folder / "gate.json").write_text("[]"), "it has not passed its gate"),
        (lambda folder: (folder / "gate.json").write_text("{"), "is not valid JSON"),
        (shutil.rmtree, "there is no model folder"),
    ],
)
def test_what_is_wrong_with_another_recipes_model_stops_nothing(run, exp, other, caplog, harm, told):
    harm(other)
    beside = ["--beside", str(other), "--beside-json", str(exp / "beside.json")]
    assert run("teacher", options=beside) == 0
    assert f"{other} is not measured beside these" in caplog.text and told in caplog.text
    assert json.loads((exp / "beside.json").read_text())["models"] == [] and read_beside(exp) == ({}, [])


def test_of_two_that_have_one_name_the_first_is_measured(run, exp, other, caplog):
    copy = shutil.copytree(other, other.with_name("copy"))
    run("teacher", options=["--beside", str(other), str(copy), "--beside-json", str(exp / "beside.json")])
    assert f"{copy} is not measured beside these: {other} is of" in caplog.text


def test_copied_folders_have_their_own_names(run, exp):
    shutil.copytree(exp / "teacher" / "export", exp / "copies" / "one")
    shutil.copytree(exp / "teacher" / "export", exp / "copies" / "another")
    options = [
        "--fbank-dir",
        str(exp / "fbank"),
        "--export-dir",
        *map(str, sorted((exp / "copies").iterdir())),
    ]
    run("student", options=options)
    for name in ("one", "another"):
        bench = json.loads((exp / "copies" / name / "bench.json").read_text())
        assert bench["reference"] == "another float" and [row["phase"] for row in bench["rows"]] == [name]


@pytest.mark.parametrize(
    "phases, options, message",
    [
        (["nothing"], [], "there is no model folder .*nothing"),
        (["teacher", "teacher"], [], "both of a phase teacher"),
        (["teacher"], ["--test-parts", "x"], "cuts_x.*parts there: test-clean, test-other"),
        (["student"], [], "student/config.json does not exist.*--fbank-dir"),
    ],
)
def test_what_cannot_work_is_one_clear_error(run, exp, phases, options, message):
    with pytest.raises(UserError, match=message):
        run(*phases, options=options)
    assert not list(exp.glob("*/export/bench.json"))


@pytest.mark.parametrize(
    "options", [["--turns", "0"], ["--stream-s", "60"], ["--test-parts", ","], ["--beside", "x"]]
)
def test_options_that_make_no_sense_end_the_program(run, options):
    with pytest.raises(SystemExit):
        run("student", options=options)
