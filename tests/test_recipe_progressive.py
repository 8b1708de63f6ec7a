"""Recipe progressive: what its configurations promise, and a run at scale smoke."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from transducer_kd.compress.select import check_fits
from transducer_kd.config import load_config, to_dict
from transducer_kd.models.transducer import Transducer
from transducer_kd.train import experiment, reuse
from transducer_kd.train.checkpoint import save_checkpoint

sys.path.insert(0, str(Path(__file__).parent))
from recipe_project import ROOT, Project, copy_project  # noqa: E402

CONF = ROOT / "egs/librispeech/progressive/conf"
VOCAB = {"smoke": 60, "mini": 100, "small": 500, "full": 500}  # run.sh's defaults
STEPS = ["step1", "step2", "step3"]
NOINIT = ["noinit_step1", "noinit_step2", "noinit"]
TRAINED = ["teacher", *STEPS, "scratch", "oneshot", *NOINIT]


@pytest.fixture(params=VOCAB)
def scale(request):
    return request.param


@pytest.fixture
def phases(scale):
    assert sorted(p.stem for p in (CONF / scale).glob("*.yaml")) == sorted(TRAINED)
    return {name: load_config(CONF / scale / f"{name}.yaml") for name in TRAINED}


def teacher_of(recipe, scale):
    return load_config(ROOT / f"egs/librispeech/{recipe}/conf/{scale}/teacher.yaml")


def deployed(config, scale):
    return Transducer(config.model, VOCAB[scale], with_ctc=True).deployed_parameters()


class TestConfigurations:
    def test_steps_shrink_geometrically_to_less_than_two_fifths(self, phases, scale):
        sizes = [deployed(phases[name], scale) for name in ("teacher", *STEPS)]
        ratios = [after / before for before, after in zip(sizes, sizes[1:])]
        if scale == "smoke":
            assert max(ratios) < 0.9
        else:
            # A third of the way each, in logarithms.
            assert all(abs(ratio - (sizes[3] / sizes[0]) ** (1 / 3)) < 0.015 for ratio in ratios)
            assert 0.35 < sizes[3] / sizes[0] < 0.4

    def test_each_step_can_be_cut_out_of_the_one_before(self, phases):
        for before, after in zip(["teacher", *STEPS], STEPS):
            check_fits(phases[before].model, phases[after].model)
        check_fits(phases["teacher"].model, phases["oneshot"].model)

    def test_controls_have_the_size_and_the_updates_of_all_steps(self, phases):
        updates = {name: config.train.max_steps for name, config in phases.items()}
        total = sum(updates[name] for name in STEPS)
        assert updates["scratch"] == updates["oneshot"] == sum(updates[name] for name in NOINIT) == total
        assert [updates[name] for name in NOINIT] == [updates[name] for name in STEPS]
        for name in ("scratch", "oneshot"):
            assert phases[name].model == phases["step3"].model
        for name, like in zip(NOINIT, STEPS):
            assert phases[name].model == phases[like].model

    def test_phases_differ_in_nothing_else_than_they_should(self, phases):
        """Fresh weights train as the teacher did, selected ones alike, and all taught ones learn alike."""

        def settings(name):
            config = to_dict(phases[name])
            for key in ("phase", "model", "compare_with"):
                del config[key]
            for key in ("max_steps", "valid_every"):
                del config["train"][key]
            return config

        for name in (*STEPS[1:], "oneshot"):
            assert settings(name) == settings("step1")
        for name in NOINIT[1:]:
            assert settings(name) == settings("noinit_step1")
        assert settings("scratch") == settings("teacher")
        # From step1 to noinit_step1 and from there to scratch.
        fresh = {key: settings("scratch")[key] for key in ("loss", "optim", "spec_augment")}
        assert {**settings("step1"), **fresh} == settings("noinit_step1")
        untaught = {key: settings("scratch")[key] for key in ("objective", "teacher", "distill")}
        assert {**settings("noinit_step1"), **untaught} == settings("scratch")

    def test_teacher_and_students_stream_in_the_same_chunks(self, phases, scale):
        encoders = [config.model.encoder for config in phases.values()]
        assert len({(e.chunk_size, e.left_context) for e in encoders}) == 1 and encoders[0].chunk_size > 0
        assert all(config.distill.frame_shift == 0 for config in phases.values())
        offline = teacher_of("soft_hard", scale).model
        chunks = {"chunk_size": encoders[0].chunk_size, "left_context": encoders[0].left_context}
        assert encoders[0] == dataclasses.replace(offline.encoder, **chunks)
        assert phases["teacher"].model == dataclasses.replace(offline, encoder=encoders[0])

    def test_all_hear_the_same_silence(self, phases):
        assert {config.data.silence_prob for config in phases.values()} == {0.1}

    def test_the_teacher_is_taken_over_from_recipe_two_pass(self, phases, scale, tmp_path):
        """Without training: a folder as two_pass's teacher leaves it. That of scale mini is a larger one."""
        theirs, ours = teacher_of("two_pass", scale), phases["teacher"]
        there, here = tmp_path / "two_pass/teacher", tmp_path / "progressive/teacher"
        experiment.prepare_exp_dir(there, theirs, 1, {})
        experiment.write_meta(there, {"bpe_sha256": "b", "origins": {}})
        save_checkpoint(there / "epoch-1.pt", {"model": {}, "progress": {"step": theirs.train.max_steps}})
        is_taken = reuse.take_over(here, [there], ours, "b", {})
        assert is_taken == (scale != "mini") == (here / "epoch-1.pt").exists()
        theirs.recipe = ours.recipe
        assert (to_dict(theirs) == to_dict(ours)) == is_taken

    def test_the_last_step_is_compared_with_every_control(self, phases):
        assert phases["step3"].compare_with == ["scratch", "oneshot", "noinit"]
        assert set(phases["step3"].compare_with) < set(phases)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A copy in which stages 0 to 6 have run."""
    project = Project(copy_project(tmp_path_factory.mktemp("progressive") / "project"), "progressive")
    project.needs_environment()
    project.output = project.run()
    return project


class TestWholeRun:
    """In this order: the last test leaves a phase half trained."""

    def test_every_phase_is_trained_decoded_and_reported(self, smoke):
        stages = smoke.stages()
        assert sorted(stages[2 : 2 + len(TRAINED)]) == sorted(TRAINED) and stages[-1] == "report"
        smoke.check_order(TRAINED)
        assert stages[2 + len(TRAINED) : -1] == [f"decode {phase}" for phase in TRAINED]
        for name in ("report.html", "RESULTS.md"):
            assert (smoke.exp / name).stat().st_size > 0, name
        assert "init" not in (smoke.exp / "RESULTS.md").read_text().split("|")

    def test_every_phase_is_decoded_in_streaming_mode(self, smoke):
        sizes = {}
        for phase in TRAINED:
            records = json.loads((smoke.exp / phase / "metrics.json").read_text())
            assert {(r["test_set"], r["method"]) for r in records} == {
                (part, method)
                for part in ("test-clean", "test-other")
                for method in ("greedy_search", "modified_beam_search", "streaming_greedy_search")
            }
            assert all("streaming" in r["mode"] for r in records), phase
            (sizes[phase],) = {r["params_deployed"] for r in records}
        assert sizes["teacher"] > sizes["step1"] > sizes["step2"] > sizes["step3"]
        assert sizes["step3"] == sizes["scratch"] == sizes["oneshot"] == sizes["noinit"]

    def test_a_step_begins_with_weights_of_what_it_learns_from(self, smoke):
        teachers = dict(zip(STEPS, ["teacher", *STEPS]), oneshot="teacher")
        for phase, teacher in teachers.items():
            assert smoke.origins(phase) == {"init": phase, "teacher": teacher}
            meta = json.loads((smoke.exp / phase / "meta.json").read_text())
            selection = json.loads((smoke.exp / "init" / phase / "selection.json").read_text())
            assert selection["selected_from"] == meta["origins"]["teacher"]
            assert meta["origins"]["init"]["selected_from"] == meta["origins"]["teacher"]
            assert selection["parameters"]["after"] == meta["parameters"]["deployed"]

    def test_controls_begin_fresh(self, smoke):
        assert smoke.origins("scratch") == smoke.origins("teacher") == {}
        for phase, teacher in zip(NOINIT, ["teacher", *NOINIT]):
            assert smoke.origins(phase) == {"teacher": teacher}

    def test_the_same_command_again_only_makes_the_report(self, smoke):
        before = smoke.stages()
        output = smoke.run()
        assert output.count("done already") == 2 + 2 * len(TRAINED)
        assert smoke.stages() == [*before, "report"]
        assert "compress.py" not in output

    def test_the_teacher_and_the_last_step_are_exported(self, smoke):
        smoke.run("--stage", "7")
        smoke.check_exports(dict.fromkeys(["teacher", "step3"], ("streaming", "offline")))

    def test_another_recipe_takes_the_same_teacher_over_and_trains_one_that_differs(self, smoke):
        folder = smoke.root / "egs/librispeech/other"
        shutil.copytree(folder.with_name("progressive"), folder, ignore=shutil.ignore_patterns("exp"))
        for path, key in ((folder / "run.sh", "recipe="), (folder / "conf/smoke/teacher.yaml", "recipe: ")):
            path.write_text(path.read_text().replace(f"{key}progressive", f"{key}other"))
        other, teacher = Project(smoke.root, "other"), smoke.exp / "teacher"
        output = other.run("--stop-stage", "2")
        assert "Stage 1: features and BPE: done already" in output
        assert f"took over the training in {teacher.relative_to(smoke.root)}" in output
        last = sorted(teacher.glob("epoch-*.pt"))[-1].name
        assert (other.exp / "teacher" / last).read_bytes() == (teacher / last).read_bytes()
        assert json.loads((other.exp / "teacher/config.json").read_text())["recipe"] == "other"
        output = other.run("--stop-stage", "2", "--set", "teacher:train.max_steps=2")
        assert "Stage 2: teacher: its options changed" in output and "not taking over" in output
        assert not (other.exp / "teacher" / last).exists()

    def test_a_step_that_was_stopped_goes_on_from_the_same_selection(self, smoke):
        long = ("--stage", "3", "--stop-stage", "3", "--set", "step2:train.max_steps=100000")
        output = smoke.stop_in("stage-3-step2.log", ("max_steps=100000", "Epoch 3"), *long)
        assert "Stage 3: step1: done already" in output and "stage 3 (step2) was stopped" in output
        assert not (smoke.exp / "step2" / ".done").exists()
        output = smoke.stop_in("stage-3-step2.log", ("resumed from",), *long)
        assert output.count("local/compress.py") == 1

    def test_somebody_elses_teacher_is_refused(self, smoke):
        tokens = str(smoke.root / "egs/librispeech/data/synthetic-smoke/lang_bpe_60/tokens.txt")
        output = smoke.run("--teacher-torchscript", tokens, "--teacher-tokens", tokens, status=1)
        assert "cuts its students out of their teacher" in output and "Stage" not in output
