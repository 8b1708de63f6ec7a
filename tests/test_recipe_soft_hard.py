"""Recipe soft_hard: what its configurations promise, and a run at scale smoke."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest

from transducer_kd import build
from transducer_kd.config import load_config, to_dict
from transducer_kd.data.pseudo_labels import load_pseudo_labels, read_soft_targets
from transducer_kd.models.transducer import Transducer
from transducer_kd.report import collect
from transducer_kd.report import phases as report_phases

sys.path.insert(0, str(Path(__file__).parent))
from recipe_project import DATA, ROOT, Project, copy_project  # noqa: E402

CONF = ROOT / "egs/librispeech/soft_hard/conf"
VOCAB = {"smoke": 60, "mini": 100, "small": 500, "full": 500}  # run.sh's defaults
STREAMING = ["supervised_streaming", "hard_streaming", "soft_streaming", "softhard_streaming"]
STREAMING += ["soft_streaming_shift0", "soft_streaming_shift4"]
SELF = ["supervised_self", "hard_self", "soft_self", "softhard_self"]
SECOND = ["hard_self2", "soft_self2"]
TRAINED = ["teacher", "base_streaming", *STREAMING, *SELF, *SECOND]
LABELLED_BY = dict.fromkeys([p for p in STREAMING + SELF if "supervised" not in p], "teacher")
LABELLED_BY.update(hard_self2="hard_self", soft_self2="soft_self")


@pytest.fixture(params=VOCAB)
def scale(request):
    return request.param


@pytest.fixture
def phases(scale):
    assert sorted(p.stem for p in (CONF / scale).glob("*.yaml")) == sorted(TRAINED)
    return {name: load_config(CONF / scale / f"{name}.yaml") for name in TRAINED}


class TestConfigurations:
    def test_arms_of_a_student_differ_in_their_targets_alone(self, phases):
        def all_else(name):
            config = to_dict(phases[name])
            for key in ("phase", "compare_with", "objective", "teacher", "distill"):
                del config[key]
            del config["loss"]["pseudo_weight"], config["data"]["pseudo_share"]
            return config

        for name in STREAMING:
            assert all_else(name) == all_else("supervised_streaming"), name
        for name in SELF + SECOND:
            assert all_else(name) == all_else("supervised_self"), name
        shares = {phases[name].data.pseudo_share for name in LABELLED_BY}
        assert len(shares) == 1 and 0 < shares.pop() < 1
        assert {phases[name].data.pseudo_share for name in TRAINED if name not in LABELLED_BY} == {0.0}

    def test_streaming_arms_go_on_from_a_student_of_their_shape_for_less_than_it_was_trained(self, phases):
        base, arm = phases["base_streaming"], phases["supervised_streaming"]
        assert base.model == arm.model and base.loss.ctc_weight == arm.loss.ctc_weight
        assert base.train.max_steps > arm.train.max_steps and arm.loss.warm_step == 0

    def test_targets_are_what_the_names_say(self, phases):
        distills = []
        for name, config in phases.items():
            targets = (config.objective, config.teacher.kind, config.loss.pseudo_weight)
            if name.startswith("soft"):
                assert targets == ("distill", "exp_dir", 1.0 if name.startswith("softhard") else 0.0), name
                assert (config.distill.utterances, config.distill.stored) == ("pseudo", True), name
                distills.append({**to_dict(config.distill), "frame_shift": 0})
            else:
                assert targets == ("transducer", "none", 1.0), name
        assert len(distills) == 7 and all(d == distills[0] and d["weight"] > 0 for d in distills)

    def test_the_sweep_covers_frame_shifts_0_2_and_4(self, phases):
        shift = {name: config.distill.frame_shift for name, config in phases.items()}
        sweep = ("soft_streaming_shift0", "soft_streaming", "soft_streaming_shift4")
        assert [shift[name] for name in sweep] == [0, 2, 4]
        assert shift["softhard_streaming"] == shift["soft_streaming"]
        assert {shift[name] for name in SELF + SECOND} == {0}

    def test_self_is_the_teachers_architecture_and_streaming_a_smaller_one(self, phases, scale):
        teacher = phases["teacher"].model
        assert teacher.encoder.chunk_size == 0
        assert all(phases[name].model == teacher for name in SELF + SECOND)
        student = phases["supervised_streaming"].model
        assert student.encoder.chunk_size == 8
        sizes = [Transducer(m, VOCAB[scale], True).deployed_parameters() for m in (student, teacher)]
        assert 0.3 < sizes[0] / sizes[1] < 0.45

    def test_each_arm_is_compared_with_those_before_it(self, phases):
        told = {name: config.compare_with for name, config in phases.items() if config.compare_with}
        expected = {f"soft_streaming_shift{shift}": ["soft_streaming"] for shift in (0, 4)}
        for student in ("streaming", "self"):
            arms = [f"{targets}_{student}" for targets in ("supervised", "hard", "soft", "softhard")]
            expected.update({arm: arms[:i] for i, arm in enumerate(arms) if i})
        expected["hard_self2"] = ["supervised_self", "hard_self"]
        expected["soft_self2"] = ["supervised_self", "soft_self", "hard_self2"]
        assert told == expected


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A copy in which stages 0 to 6 have run."""
    project = Project(copy_project(tmp_path_factory.mktemp("soft_hard") / "project"), "soft_hard")
    project.needs_environment()
    project.output = project.run("--stage", "0", "--stop-stage", "6")
    return project


def read(path):
    return json.loads(path.read_text())


def labels_of(smoke, phase):
    return smoke.exp / "labels" / phase


def summary_of(smoke, phase):
    return read(labels_of(smoke, phase) / "summary.json")


def weights_sha256(smoke, phase):
    lang_dir = str(smoke.root / DATA / "lang_bpe_60")
    loaded = build.load_model(smoke.exp / phase, use_averaged_model=True, lang_dir=lang_dir)
    return build.origin_of("", loaded.checkpoint, loaded.model.state_dict())["sha256"]


def begins_with(phase):
    return "teacher" if phase in SELF + SECOND else "base_streaming"


class TestWholeRun:
    """In this order: the last test leaves phases that are out of date."""

    def test_all_stages_run_in_the_order_in_which_they_need_each_other(self, smoke):
        stages = smoke.stages()
        for one_by_one, side_by_side in (
            (["corpus and manifests", "features and BPE"], ["teacher", "base_streaming"]),
            (["labels of teacher"], [*STREAMING, *SELF]),
            (["labels of hard_self", "labels of soft_self"], SECOND),
        ):
            for name in one_by_one:
                assert stages.pop(0) == name
            assert sorted(stages[: len(side_by_side)]) == sorted(side_by_side)
            del stages[: len(side_by_side)]
        assert stages == [*(f"decode {phase}" for phase in TRAINED), "emission delays", "report"]

    def test_every_phase_is_decoded_in_its_mode(self, smoke):
        sizes = {"offline": set(), "streaming": set()}
        for phase in TRAINED:
            mode, methods = "offline", {"greedy_search", "modified_beam_search"}
            if "streaming" in phase:
                mode, methods = "streaming", {*methods, "streaming_greedy_search"}
            records = read(smoke.exp / phase / "metrics.json")
            assert {r["mode"] for r in records} == {mode}, phase
            for part in ("test-clean", "test-other"):
                assert {r["method"] for r in records if r["test_set"] == part} == methods, phase
            sizes[mode].update(r["params_deployed"] for r in records)
        (offline,), (streaming,) = sizes.values()
        assert streaming < offline

    def test_labels_are_finished_and_by_the_weights_that_they_should_be_by(self, smoke):
        for who, dtype in (("teacher", "float16"), ("hard_self", None), ("soft_self", "float16")):
            summary, sha256 = summary_of(smoke, who), weights_sha256(smoke, who)
            cuts = load_pseudo_labels(labels_of(smoke, who), smoke.root / DATA / "fbank")
            dropped = sum(count["cuts"] for count in summary["dropped"].values())
            assert len(cuts) == summary["kept"]["cuts"] == 36 - dropped >= 10
            assert {summary["teacher"]["sha256"], *(c.custom["teacher_sha256"] for c in cuts)} == {sha256}
            assert (summary["soft"] or {"dtype": None})["dtype"] == dtype
            if dtype:
                soft = cuts[-1].custom["soft"]
                assert read_soft_targets(labels_of(smoke, who), soft).shape == (soft["frames"], 32)

    def test_arms_begin_alike_and_learn_from_one_frozen_set_for_the_same_updates(self, smoke):
        sets = {who: summary_of(smoke, who)["sha256"] for who in LABELLED_BY.values()}
        begun = {name: weights_sha256(smoke, name) for name in ("teacher", "base_streaming")}
        for phase in TRAINED[1:]:
            names, who = smoke.origins(phase), LABELLED_BY.get(phase)
            expected = {"init": begins_with(phase)} if phase != "base_streaming" else {}
            if who:
                expected.update({"labels": who}, **({"teacher": who} if phase.startswith("soft") else {}))
            assert names == expected, phase
            found = read(smoke.exp / phase / "meta.json")["origins"]
            assert "labels" not in found or found["labels"]["sha256"] == sets[who], phase
            by = summary_of(smoke, who)["teacher"]["sha256"] if who else ""
            assert "teacher" not in found or found["teacher"]["sha256"] == by, phase
            if phase != "base_streaming":
                assert found["init"]["sha256"] == begun[begins_with(phase)], phase
        logs = {phase: (smoke.exp / phase / "train_log.jsonl").read_text() for phase in TRAINED[1:]}
        updates = {phase: json.loads(log.splitlines()[-1])["step"] for phase, log in logs.items()}
        assert updates == {phase: 10 if phase in STREAMING else 15 for phase in TRAINED[1:]}
        assert [phase for phase, log in logs.items() if "kd_loss" in log] == [
            phase for phase in logs if phase.startswith("soft")
        ]

    def test_every_student_has_its_delay_behind_the_teacher(self, smoke):
        sha256 = weights_sha256(smoke, "teacher")
        for phase in TRAINED[1:]:
            delay = read(smoke.exp / phase / "delay.json")
            assert delay["reference"]["phase"] == "teacher" and delay["reference"]["sha256"] == sha256
            assert delay["mode"] == ("streaming" if "streaming" in phase else "offline"), phase
            assert list(delay["parts"]) == ["test-clean", "test-other"]
            assert all(p["tokens"] > 100 and p["low"] < p["high"] for p in delay["parts"].values())
        assert not (smoke.exp / "teacher" / "delay.json").exists()

    def test_the_report_has_labels_arms_and_the_crossover(self, smoke):
        results = (smoke.exp / "RESULTS.md").read_text()
        for who in ("teacher", "hard_self", "soft_self"):
            assert f"| {who} | unlabelled | {summary_of(smoke, who)['kept']['cuts']} |" in results
        for student, arms in (
            ("streaming", "supervised_streaming | hard_streaming | soft_streaming | softhard_streaming"),
            ("self-training", "supervised_self | hard_self | soft_self | softhard_self"),
            ("generation 2", "supervised_self | hard_self2 | soft_self2 | -"),
        ):
            (row,) = [line for line in results.splitlines() if f"| phase | {arms} |" in line]
            assert student in row.split("|")[1]
        page = (smoke.exp / "report.html").read_text()
        for words in (
            "Crossover (hard targets better for a streaming student",
            "Pseudo-labels",
            "Soft targets",
        ):
            assert words in results and words in page
        assert read(smoke.exp / "report.json")["missing"] == [] and "differ not only" not in results

    def test_the_same_command_again_only_makes_the_report(self, smoke):
        before = smoke.stages()
        output = smoke.run()
        assert output.count("done already") == len(before) - 1
        assert smoke.stages() == [*before, "report"]

    def test_the_teacher_and_two_students_are_exported_in_the_modes_that_they_have(self, smoke):
        smoke.run("--stage", "7")
        both = ("streaming", "offline")
        smoke.check_exports({"teacher": ("offline",), "softhard_streaming": both, "hard_streaming": both})

    def test_labelling_that_is_killed_goes_on_and_ends_with_the_same_labels(
        self, smoke, tmp_path, monkeypatch
    ):
        """Killed between the soft targets of a unit and its labels."""
        folder, undisturbed = labels_of(smoke, "teacher"), tmp_path / "undisturbed"
        folder.rename(undisturbed)
        (tmp_path / "sitecustomize.py").write_text(
            "import os, sys, time\n"
            "replace = os.replace\n"
            "def slow(source, target):\n"
            "    if str(target).endswith('00000.jsonl'):\n"
            "        print('now', file=sys.stderr)\n"
            "        time.sleep(60)\n"
            "    replace(source, target)\n"
            "os.replace = slow\n"
        )
        stage = ("--stage", "3", "--stop-stage", "3")
        with monkeypatch.context() as patched:
            patched.setenv("PYTHONPATH", str(tmp_path))
            output = smoke.stop_in("stage-3-labels-of-teacher.log", ("\nnow\n",), *stage)
        assert "stage 3 (labels of teacher) was stopped" in output
        assert (folder / "units/00000.soft").exists() and not (folder / "units/00000.jsonl").exists()
        assert not (folder / "summary.json").exists() and not (folder / ".done").exists()
        smoke.run(*stage)
        cuts = [gzip.decompress((f / "cuts.jsonl.gz").read_bytes()) for f in (folder, undisturbed)]
        assert cuts[0] == cuts[1] and not list(folder.rglob("*.tmp"))
        shutil.rmtree(folder)
        undisturbed.rename(folder)

    def test_a_teacher_trained_anew_labels_anew(self, smoke, monkeypatch):
        def stage(number):
            settings = ("max_steps=50", "valid_every=50", "save_every=50")
            sets = [word for setting in settings for word in ("--set", f"teacher:train.{setting}")]
            return "--stage", number, "--stop-stage", number, *sets

        before, labels = summary_of(smoke, "teacher"), labels_of(smoke, "teacher")
        smoke.run(*stage("2"))
        output = smoke.run(*stage("4"), status=1)
        assert "run stage 3 first" in output and "Stage 4" not in output
        output = smoke.run(*stage("3"))
        assert "Stage 3: labels of teacher: its options changed, so it runs again" in output
        (kept,) = labels.parent.glob("teacher.old-*")
        assert read(kept / "summary.json") == before
        after = summary_of(smoke, "teacher")["teacher"]["sha256"]
        assert after == weights_sha256(smoke, "teacher") != before["teacher"]["sha256"]
        assert "hard_self is not trained, or was made from what" in smoke.run(*stage("5"), status=1)
        # The report leaves out what came from the earlier teacher and its labels.
        monkeypatch.setattr(report_phases, "_ROOT", smoke.root)
        found, stale = collect.collect(smoke.exp), {*LABELLED_BY, "supervised_self"}
        assert {p["name"] for p in found["phases"] if p["is_stale"]} == stale
        assert sum("is stale" in line for line in found["missing"]) == len(stale)
        # That is trained again, and the rest is not.
        output = smoke.stop_in("stage-4-hard_streaming.log", ("moved the earlier run",), *stage("4"))
        assert "Stage 4: supervised_streaming: done already" in output
        assert "Stage 4: hard_streaming: its options changed, so it runs again" in output


class TestRefusals:
    """Before any training."""

    def test_a_corpus_without_an_unlabelled_part(self, smoke, tmp_path):
        corpus = tmp_path / "bare"
        corpus.mkdir()
        for part in ("train", "dev", "test-clean"):
            (corpus / part).symlink_to(smoke.root / DATA / "download/LibriSpeech" / part)
        smoke.run("--corpus-dir", str(corpus), "--stop-stage", "0")
        output = smoke.run("--corpus-dir", str(corpus), "--stage", "2", status=1)
        assert "the corpus has no unlabelled part" in output and "name one with --unlabelled-parts" in output
        assert "Stage" not in output

    def test_a_corpus_that_has_not_been_prepared(self, smoke):
        output = smoke.run("--corpus-name", "new", "--stage", "2", status=1)
        assert "parts.json is missing; run stage 0 first" in output and "unlabelled" not in output

    def test_somebody_elses_teacher(self, smoke):
        tokens = str(smoke.root / DATA / "lang_bpe_60/tokens.txt")
        output = smoke.run("--teacher-torchscript", tokens, "--teacher-tokens", tokens, status=1)
        assert "soft_hard trains the teacher itself" in output and "Stage" not in output
