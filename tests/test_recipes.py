"""Recipe two_pass from the outside, from the corpus to the report, and the options of every recipe."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Tuple

import pytest
import torch
from torch import nn

from transducer_kd.config import load_config

sys.path.insert(0, str(Path(__file__).parent))
from recipe_project import DATA, ROOT, Project, copy_project  # noqa: E402

TRAINED = ["teacher", "teacher_las", "student", "student_control", "student_las", "student_las_control"]
TRAINED += ["finetune", "finetune_control", "finetune_nokd"]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    """A copy in which nothing has run yet; for what ends before the environment is needed."""
    return Project(copy_project(tmp_path_factory.mktemp("recipe") / "project"), "two_pass")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Project:
    """A copy in which stages 0 to 6 have run, with the control arms."""
    project = Project(copy_project(tmp_path_factory.mktemp("smoke") / "project"), "two_pass")
    project.needs_environment()
    project.output = project.run("--stage", "0", "--stop-stage", "6", "--controls", "1")
    return project


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.frames = nn.Conv1d(80, 24, 7, stride=4)

    def forward(self, x: torch.Tensor, x_lens: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return self.frames(x.transpose(1, 2)).transpose(1, 2), (x_lens - 7) // 4 + 1


class _Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(60, 20)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding(y)


class _Joiner(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder_proj, self.decoder_proj = nn.Linear(24, 28), nn.Linear(20, 28)
        self.output_linear = nn.Linear(28, 60)

    def forward(self, am: torch.Tensor, lm: torch.Tensor, project_input: bool = True) -> torch.Tensor:
        if project_input:
            am, lm = self.encoder_proj(am), self.decoder_proj(lm)
        return self.output_linear(torch.tanh(am + lm))


class _Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.joiner = _Encoder(), _Decoder(), _Joiner()
        self.simple_am_proj, self.simple_lm_proj = nn.Linear(24, 60), nn.Linear(20, 60)


@pytest.fixture
def foreign_teacher(tmp_path) -> Path:
    """A TorchScript file with icefall's interface, of another width, whose T' may differ by a frame."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(_Foreign()).save(str(tmp_path / "jit_script.pt"))
    return tmp_path / "jit_script.pt"


class TestWholeRun:
    """In this order: the later tests go on from what the earlier ones left."""

    def test_all_stages_run_and_the_results_table_is_printed(self, smoke):
        stages = smoke.stages()
        assert stages[:2] == ["corpus and manifests", "features and BPE"] and stages[-1] == "report"
        assert sorted(stages[2 : 2 + len(TRAINED)]) == sorted(TRAINED)
        smoke.check_order(TRAINED)
        assert sorted(stages[2 + len(TRAINED) : -1]) == sorted(f"decode {phase}" for phase in TRAINED)
        for word in ("test-clean", "las_rescore", "greedy_search", "modified_beam_search"):
            assert word in smoke.output
        assert ("fast_beam_search_nbest_oracle" in smoke.output) == (smoke.environment == "k2")
        assert ("no k2 in this environment" in smoke.output) == (smoke.environment == "modern")

    def test_records_report_and_logs_are_where_they_should_be(self, smoke):
        records = json.loads((smoke.exp / "finetune" / "metrics.json").read_text())
        assert {r["test_set"] for r in records} == {"test-clean", "test-other"}
        methods = {r["method"] for r in records}
        assert {"greedy_search", "modified_beam_search"} <= methods
        assert sum("las_rescore" in method for method in methods) == 1
        for record in records:
            assert record["corpus"] == "synthetic" and record["scale"] == "smoke"
            assert record["ref_words"] > 0 and record["params_deployed"] > 0
        for name in ("report.html", "report.json", "RESULTS.md", "log/stage-2-teacher.log"):
            assert (smoke.exp / name).stat().st_size > 0, name
        assert not (smoke.root / "egs/librispeech/two_pass/RESULTS.md").exists()

    def test_every_phase_streams(self, smoke):
        """Chunk by chunk it says what it says where the chunks are a mask over the whole utterance."""
        for phase in TRAINED:
            records = json.loads((smoke.exp / phase / "metrics.json").read_text())
            assert {record["mode"] for record in records} == {"streaming"}
            said = {
                (r["test_set"], r["method"]): (smoke.exp / phase / r["recogs"]).read_text() for r in records
            }
            for part in ("test-clean", "test-other"):
                assert said[part, "streaming_greedy_search"] == said[part, "greedy_search"], phase

    def test_freezing_the_first_pass_keeps_its_results_to_the_letter(self, smoke):
        """Stage 4 trains the LAS alone: what the transducer recognises may not change in a single word."""
        for before, after in (("teacher", "teacher_las"), ("student", "student_las")):
            records = [
                json.loads((smoke.exp / phase / "metrics.json").read_text()) for phase in (before, after)
            ]
            texts = [
                {(r["test_set"], r["method"]): (smoke.exp / phase / r["recogs"]).read_text() for r in own}
                for phase, own in zip((before, after), records)
            ]
            assert texts[0] and all(texts[1][key] == text for key, text in texts[0].items())

    def test_each_phase_knows_whose_weights_it_began_with_and_who_taught_it(self, smoke):
        origins = smoke.origins
        assert origins("teacher") == origins("student_control") == {}
        assert origins("teacher_las") == {"init": "teacher"} and origins("student") == {"teacher": "teacher"}
        assert origins("student_las") == {"init": "student", "teacher": "teacher_las"}
        assert origins("finetune") == {"init": "student_las", "teacher": "teacher_las"}
        assert origins("finetune_control") == {"init": "student_las_control"}
        assert origins("finetune_nokd") == {"init": "student_las"}

    def test_features_and_bpe_are_those_of_the_smoke_corpus(self, smoke):
        tokens = (smoke.root / DATA / "lang_bpe_60" / "tokens.txt").read_text().splitlines()
        assert tokens[:3] == ["<blk> 0", "<sos/eos> 1", "<unk> 2"] and len(tokens) == 60
        assert (smoke.root / DATA / "fbank" / "cuts_train.jsonl.gz").exists()

    def test_the_same_command_again_only_makes_the_report(self, smoke):
        before = smoke.stages()
        output = smoke.run("--controls", "1")
        assert output.count("done already") == 2 + 2 * len(TRAINED)
        assert smoke.stages() == [*before, "report"]

    def test_teacher_and_student_are_exported_through_their_gates(self, smoke):
        before = smoke.stages()
        output = smoke.run("--stage", "7", "--controls", "1")
        exports = [f"export {phase}" for phase in ("teacher_las", "finetune")]
        assert smoke.stages() == [*before, *exports, "bench", "report"]
        smoke.check_exports(dict.fromkeys(["teacher_las", "finetune"], ("streaming", "offline")))
        for word in ("implementation", "the gate is passed", "ms a chunk", "Page:"):
            assert word in output
        for phase in ("teacher_las", "finetune"):
            gate = json.loads((smoke.exp / phase / "export/gate.json").read_text())
            assert {row["two_pass"] for row in gate["words"]} == {False, True}
            # The first pass has not learnt to say anything in so few updates.
            assert any(row["two_pass"] and not row["is_mute"] for row in gate["words"])
        again = smoke.run("--stage", "7", "--controls", "1")
        assert again.count("done already") == 3

    def test_one_stage_alone_runs_alone_and_force_runs_it_though_it_is_done(self, smoke):
        before = smoke.stages()
        output = smoke.run("--stage", "1", "--stop-stage", "1")
        assert "Stage 1: features and BPE: done already" in output and "Stage 0" not in output
        smoke.run("--stage", "1", "--stop-stage", "1", "--force")
        assert smoke.stages() == [*before, "features and BPE"]

    def test_another_setting_trains_anew_and_keeps_the_old_model(self, smoke):
        before = smoke.stages()
        settings = (
            "--stop-stage",
            "3",
            "--set",
            "teacher:train.max_steps=6",
            "--set",
            "teacher:train.save_every=100",
        )
        output = smoke.run(*settings)
        assert "Stage 2: teacher: its options changed" in output
        # Who began with its weights, or learnt from it, is of another teacher now.
        assert sorted(smoke.stages()[len(before) :]) == ["student", "teacher", "teacher_las"]
        smoke.check_order(["teacher", "teacher_las", "student"])
        kept = [d for d in smoke.exp.iterdir() if d.name.startswith("teacher.old-")]
        assert len(kept) == 1 and (kept[0] / "metrics.json").exists()
        config = json.loads((smoke.exp / "teacher" / "config.json").read_text())
        assert config["train"]["max_steps"] == 6
        assert "Stage 2: teacher: done already" in smoke.run(*settings)

    def test_a_model_trained_anew_is_decoded_anew(self, smoke):
        options = (
            "--stage",
            "6",
            "--set",
            "teacher:train.max_steps=6",
            "--set",
            "teacher:train.save_every=100",
        )
        before = smoke.stages()
        smoke.run(*options)
        decoded = [f"decode {phase}" for phase in ("teacher", "teacher_las", "student")]
        assert smoke.stages() == [*before, *decoded, "report"]

    def test_somebody_elses_teacher_takes_the_place_of_ours(self, smoke, foreign_teacher):
        tokens = smoke.root / DATA / "lang_bpe_60" / "tokens.txt"
        before = smoke.stages()
        foreign = ("--teacher-torchscript", str(foreign_teacher), "--teacher-tokens", str(tokens))
        output = smoke.run("--stop-stage", "5", *foreign)
        assert smoke.stages() == [*before, "student", "student_las", "finetune"]
        assert "Stage 2" not in output
        origins = json.loads((smoke.exp / "finetune" / "meta.json").read_text())["origins"]
        assert origins["teacher"]["path"] == str(foreign_teacher)
        config = json.loads((smoke.exp / "student_las" / "config.json").read_text())
        assert config["teacher"]["kind"] == "none" and config["two_pass"]["las_kd_weight"] == 0

    def test_a_stage_that_was_stopped_says_so_and_goes_on(self, smoke):
        long = ("--stage", "2", "--stop-stage", "2", "--set", "train.max_steps=100000")
        output = smoke.stop_in("stage-2-teacher.log", ("max_steps=100000", "Epoch 3"), *long)
        assert "stage 2 (teacher) was stopped" in output and "stage-2-teacher.log" in output
        assert not (smoke.exp / "teacher" / ".done").exists()
        checkpoints = sorted((smoke.exp / "teacher").glob("checkpoint-*.pt"))
        assert checkpoints, "a SIGTERM to run.sh reaches the training, which saves"

    def test_a_failing_stage_is_named_with_its_log(self, smoke):
        (smoke.root / DATA / "manifests" / "parts.json").unlink()
        output = smoke.run("--stage", "1", "--stop-stage", "1", "--force", status=1)
        last = output.strip().splitlines()[-1]
        assert "ERROR stage 1 (features and BPE) failed" in last and "stage-1-features-and-BPE.log" in last
        assert "The same command without --force goes on from here" in last
        assert "run stage 0 first" in output


@pytest.mark.parametrize("scale", ["smoke", "mini", "small", "full"])
def test_teacher_and_students_stream_in_the_same_chunks_and_hear_the_same_silence(scale):
    folder = ROOT / "egs/librispeech/two_pass/conf" / scale
    phases = {path.stem: load_config(path) for path in folder.glob("*.yaml")}
    assert sorted(phases) == sorted(TRAINED)
    encoders = [config.model.encoder for config in phases.values()]
    assert len({(e.chunk_size, e.left_context) for e in encoders}) == 1 and encoders[0].chunk_size > 0
    assert all(config.distill.frame_shift == 0 for config in phases.values())
    assert {config.data.silence_prob for config in phases.values()} == {0.1}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--stge", "2"], ["unknown option --stge", "did you mean --stage?"]),
        (["--stop_stage", "2"], ["did you mean --stop-stage?"]),
        (["--recipee=two_pass"], ["did you mean --recipe?"]),
        (["--quite-another-thing", "1"], ["unknown option --quite-another-thing", "--help"]),
        (["two_pass"], ["two_pass is not an option"]),
        (["--train-parts", "a", "b"], ["b is not an option", "quoted"]),
        (["--recipe", "nine_pass"], ["no recipe 'nine_pass'", "two_pass"]),
        (["--recipe"], ["--recipe needs a name"]),
        (["--stage"], ["--stage needs a value"]),
        (["--stage", "two"], ["--stage must be a whole number"]),
        (["--stage", "4", "--stop-stage", "3"], ["nothing to do"]),
        (["--stop-stage", "8"], ["stage 8 is not there"]),
        (["--scale", "huge"], ["no scale huge", "smoke"]),
        (["--corpus", "timit"], ["--corpus timit is not one of", "--corpus-dir"]),
        (["--corpus", "librispeech", "--manifest-dir", "x"], ["no other source"]),
        (["--csv", "train=a.csv", "--corpus-dir", "b"], ["give one of"]),
        (["--corpus-dir", "b", "--corpus-name", "a/b"], ["--corpus-name a/b"]),
        (["--full-libri", "yes"], ["yes is not an option"]),
        (["--full-libri=yes"], ["--full-libri takes 0 or 1"]),
        (["--full-libri", "1"], ["--full-libri 1", "--corpus librispeech"]),
        (["--full-libri", "1", "--corpus-dir", "b"], ["--full-libri 1", "--corpus librispeech"]),
        (["--channel", "left"], ["--channel must be a whole number"]),
        (["--text-norm", "lower"], ["--text-norm takes upper or none"]),
        (["--bpe-model", "/gone.model"], ["--bpe-model /gone.model is not there"]),
        (["--teacher-torchscript", "/gone.pt"], ["--teacher-torchscript /gone.pt is not there"]),
        (["--teacher-torchscript", str(ROOT / "run.sh")], ["needs --teacher-tokens"]),
        (["--env", "conda"], ["--env conda is not one of"]),
        (["--nproc", "0"], ["--nproc must be at least 1"]),
    ],
)
def test_wrong_options_are_one_clear_line_before_anything_is_done(project, options, words):
    done = subprocess.run(["bash", project.root / "run.sh", *options], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "ERROR" in done.stderr and done.stdout == ""
    for word in words:
        assert word in done.stderr
    assert not (project.root / "egs/librispeech/data").exists()


def test_help_names_every_option(project):
    done = subprocess.run(
        ["bash", project.root / "run.sh", "--help"], capture_output=True, text=True, check=True
    )
    common = (ROOT / "egs/librispeech/common.sh").read_text()
    listed = common.partition('value_options="')[2].partition('"')[0]
    listed += " " + common.partition('switch_options="')[2].partition('"')[0]
    names = [item.partition("=")[0] for item in listed.split()]
    assert len(names) > 20
    missing = [name for name in (*names, "set", "recipe") if f"--{name}" not in done.stdout]
    assert missing == []
    assert max(len(line) for line in done.stdout.splitlines()) <= 120


def test_channel_and_text_norm_reach_the_manifests(project, tmp_path):
    """What the data programs recommend has to work through run.sh: its own words are run, not a stage."""
    script = f"""
      recipe=two_pass recipe_dir={project.root}/egs/librispeech/two_pass last_stage=7
      source {project.root}/egs/librispeech/common.sh
      parse_options --corpus-dir {tmp_path} --scale smoke "$@"
      manifests_dir=m fbank_dir=f lang_dir=l
      run() {{ echo "$@"; }}; parts_of() {{ echo train; }}; config_value() {{ echo False; }}
      data_fingerprint; stage_data; stage_features teacher
      trap - EXIT
    """
    options = ["--channel", "1", "--text-norm", "none"]
    lines = subprocess.run(
        ["bash", "-c", script, "run.sh", *options], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "channel=1" in lines and "text_norm=none" in lines
    manifests = next(line for line in lines if "prepare_manifests.py" in line)
    assert "--channel 1" in manifests and "--text-norm none" in manifests
    assert "--text-norm none" in next(line for line in lines if "prepare_lang.py" in line)


def test_a_setting_for_a_phase_that_is_not_there_is_an_error(project):
    project.needs_environment()
    output = project.run("--set", "studnet:optim.lr=1", status=1)
    assert "--set studnet:optim.lr=1: no such phase" in output and "student_las" in output


def test_a_misspelt_setting_is_an_error_before_the_first_stage(project):
    project.needs_environment()
    output = project.run("--set", "train.max_step=3", status=1)
    assert "unknown key train.max_step; did you mean max_steps?" in output
    assert "Traceback" not in output and "Stage 0" not in output


@pytest.mark.parametrize("recipe", sorted(p.parent.name for p in (ROOT / "egs/librispeech").glob("*/run.sh")))
def test_scripts_parse_and_stay_short(recipe):
    path = ROOT / "egs/librispeech" / recipe / "run.sh"
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK)
    assert len(path.read_text().splitlines()) <= 120
    assert (path.parent / "conf" / "smoke").is_dir()
