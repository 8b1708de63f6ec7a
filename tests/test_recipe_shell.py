"""What the recipes share, egs/librispeech/{common,runner,stages}.sh, run with invented phases."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from recipe_project import ROOT  # noqa: E402

EGS = "egs/librispeech"
# Configurations without Python: phase "student" has a teacher, the rest have none.
RECIPE = """
  recipe=mine recipe_dir=$PWD/egs/librispeech/mine last_stage=7
  source egs/librispeech/common.sh
  parse_options --scale smoke --env k2 {options}
  cd $root; jobs=${{jobs:-1}} cores=2 threads_are_given=0; corpus_name=synthetic mine=egs/librispeech/mine
  exp_root=$mine/exp/synthetic-smoke conf_dir=$mine/conf/smoke
  manifests_dir=m fbank_dir=f lang_dir=l
  phases="teacher student plain" learns_from=([student]=teacher)
  parts_of() {{ echo part; }}
  config_value() {{
    case $1.$2 in
      student.teacher.kind) echo exp_dir ;;
      *.teacher.kind) echo none ;;
      *.chunk_size) echo 16 ;;
      *.enabled | *.speed_perturb) echo False ;;
      *) echo ;;
    esac
  }}
  run() {{ echo "RUN $*"; }}
  now() {{ train_stage "$@"; train_queued; }}
  {body}
  trap - EXIT
"""


@pytest.fixture
def shell(tmp_path):
    """Function: lines of a recipe's body, in a folder of its own; `done` marks phases as trained."""
    (tmp_path / EGS / "mine/conf/smoke").mkdir(parents=True)
    for name in ("common.sh", "runner.sh", "stages.sh"):
        (tmp_path / EGS / name).write_text((ROOT / EGS / name).read_text())
    for phase in ("teacher", "student", "plain"):
        (tmp_path / EGS / f"mine/conf/smoke/{phase}.yaml").write_text(f"phase: {phase}\n")
        (tmp_path / EGS / f"mine/exp/synthetic-smoke/{phase}").mkdir(parents=True)
    (tmp_path / EGS / "mine/exp/synthetic-smoke/log").mkdir()

    def run(body, options="", status=0):
        script = RECIPE.format(body=body, options=options)
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    run.exp = tmp_path / EGS / "mine/exp/synthetic-smoke"
    return run


def trainings(output):
    """{phase: what train.py was told} of the trainings in an output."""
    lines = [line for line in output.splitlines() if line.startswith("RUN python local/train.py")]
    return {line.split("--exp-dir ")[1].split()[0].rpartition("/")[2]: line for line in lines}


def test_a_phase_learns_from_the_one_that_the_recipe_names(shell):
    told = trainings(shell("now 2 teacher; now 3 student not-a-phase; now 4 plain"))
    assert list(told) == ["teacher", "student", "plain"]
    assert "--set teacher.exp_dir=egs/librispeech/mine/exp/synthetic-smoke/teacher" in told["student"]
    assert "teacher.exp_dir" not in told["teacher"] + told["plain"]


def test_arguments_of_the_recipe_come_before_the_users_settings(shell):
    body = """
      phase_arguments() { run helper "$1"; arguments+=(--set "data.pseudo_labels=labels of $1"); }
      now 4 plain
    """
    output = shell(body, options="--set plain:data.pseudo_labels=mine")
    assert "RUN helper plain" in output
    line = trainings(output)["plain"]
    assert line.index("data.pseudo_labels=labels of plain") < line.index("data.pseudo_labels=mine")


def test_what_a_recipe_says_a_phase_was_made_from_makes_it_begin_anew(shell):
    body = """
      phase_inputs() { [ "$1" != plain ] || echo "labels $labels"; }
      labels=one; now 4 plain; is_current plain && echo CURRENT-ONE
      labels=two; is_current plain || echo STALE
    """
    output = shell(body + "now 4 plain; is_current plain && echo CURRENT-TWO; now 4 plain")
    assert all(word in output for word in ("CURRENT-ONE", "STALE", "CURRENT-TWO"))
    assert output.count("RUN python local/train.py") == 2
    assert output.count("its options changed") == 1 and output.count("done already") == 1
    assert "--restart" in output.split("its options changed")[1]


def test_a_phase_that_is_no_longer_what_it_was_made_from_is_not_decoded(shell):
    body = """
      now 2 teacher; now 3 student
      force=1; now 2 teacher; force=0
      methods=greedy_search; decode_stage
    """
    output = shell(body)
    assert "student began with or learnt from what was made anew since" in output
    decoded = [line for line in output.splitlines() if line.startswith("RUN python local/decode.py")]
    assert len(decoded) == 1 and "/teacher " in decoded[0]
    assert "--decoding-method greedy_search,streaming_greedy_search" in decoded[0]


def test_a_phase_may_begin_with_the_phase_that_teaches_it(shell):
    body = "begins_with[student]=teacher; now 2 teacher; now 3 student; parents student"
    output = shell(body)
    told = [line for line in output.splitlines() if "local/train.py" in line and "/student " in line]
    assert len(told) == 1
    for key in ("init", "teacher"):
        assert f"--set {key}.exp_dir=egs/librispeech/mine/exp/synthetic-smoke/teacher" in told[0]
    assert output.splitlines()[-1].split() == ["teacher"]


def test_a_phase_is_stale_when_an_ancestor_of_its_parents_was_trained_anew(shell):
    body = """
      begins_with[finetune]=student; phases+=" finetune"
      cp "$conf_dir/student.yaml" "$conf_dir/finetune.yaml"; mkdir "$exp_root/finetune"
      now 2 teacher; now 3 student; now 5 finetune
      is_current finetune && echo CURRENT
      force=1; now 2 teacher; force=0
      is_current finetune || echo STALE
    """
    output = shell(body)
    assert "CURRENT" in output and "STALE" in output


class TestSideBySide:
    """--jobs 2: a phase waits for what it is made from, and for a free place."""

    RUN = """
      jobs=2 phases="teacher student plain late"
      cp "$conf_dir/plain.yaml" "$conf_dir/late.yaml"; mkdir "$exp_root/late"
      run() {
        local phase; phase=$(sed 's/.*--exp-dir //; s/ .*//; s/.*[/]//' <<<"$*")
        echo "begin $phase OMP_NUM_THREADS=$OMP_NUM_THREADS" >>"$exp_root/told"
        "of_$phase"
        echo "end $phase" >>"$exp_root/told"
      }
      until_told() { until grep -qx "$1" "$exp_root/told"; do sleep 0.05; done; }
      wait_for_it() { sleep 30 & child=$!; wait "$child"; }
      of_teacher() { until_told "end plain"; }
      of_student() { :; }
      of_plain() { until_told "begin teacher OMP_NUM_THREADS=1"; }
      of_late() { until_told "begin student OMP_NUM_THREADS=1"; }
    """
    ALL = "train_stage 2 teacher; train_stage 3 student; train_stage 4 plain late; train_queued"

    def told(self, shell):
        return (shell.exp / "told").read_text().splitlines()

    def test_what_does_not_wait_runs_beside(self, shell):
        """teacher ends only after plain has, plain after teacher has begun, late after student has begun."""
        output = shell(self.RUN + self.ALL)
        words = [line.partition(" OMP")[0] for line in self.told(shell)]
        assert {*words[:2]} == {"begin teacher", "begin plain"} and len(words) == 8
        assert words.index("begin late") > words.index("end plain")
        assert words.index("begin student") > words.index("end teacher")
        assert all(line.endswith("OMP_NUM_THREADS=1") for line in self.told(shell) if "begin" in line)
        trained = {path.parent.name for path in shell.exp.glob("*/.done")}
        assert trained == {"late", "plain", "student", "teacher"}
        log = (shell.exp / "log/stage-3-student.log").read_text()
        assert "student: " in output and "Stage 3: done in" in log

    def test_threads_that_the_user_asks_for_stay(self, shell):
        given = "export OMP_NUM_THREADS=7; threads_are_given=1\n"
        shell(given + self.RUN.replace("THREADS=1", "THREADS=7") + self.ALL)
        assert all(line.endswith("OMP_NUM_THREADS=7") for line in self.told(shell) if "begin" in line)

    @pytest.mark.parametrize(
        "queued, threads",
        [
            ("2 teacher; 3 student", "teacher=2 student=2"),
            ("4 plain", "plain=2"),
            # One waits for the teacher, one for that one.
            ("2 teacher; 3 student last", "teacher=2 student=2 last=2"),
            # late waits for nobody.
            ("2 teacher; 3 student; 4 late", "teacher=1 student=1 late=1"),
        ],
    )
    def test_a_phase_that_all_others_wait_for_has_all_cores(self, shell, queued, threads):
        others = """
          phases+=" last"; begins_with[last]=student
          cp "$conf_dir/plain.yaml" "$conf_dir/last.yaml"; mkdir "$exp_root/last"
          of_teacher() { [[ ${queue[*]} != *late* ]] || until_told "begin late OMP_NUM_THREADS=1"; }
          of_plain() { :; }
          of_last() { :; }
        """
        stages = "".join(f"train_stage {stage}; " for stage in queued.split("; "))
        shell(self.RUN + others + stages + "train_queued")
        begun = [line.split()[1:] for line in self.told(shell) if line.startswith("begin")]
        found = {phase: setting.partition("=")[2] for phase, setting in begun}
        assert found == dict(item.split("=") for item in threads.split())

    def test_when_one_fails_the_others_are_stopped_and_nothing_follows(self, shell):
        body = self.RUN + "of_plain() { until_told 'begin teacher OMP_NUM_THREADS=1'; return 3; }\n"
        body += "saved() { echo saved >>$exp_root/told; kill $child; exit 143; }\n"
        body += "of_teacher() { trap saved TERM; wait_for_it; }\n"
        output = shell(body + self.ALL, status=3)
        words = self.told(shell)
        assert "saved" in words and not [w for w in words if "student" in w or "late" in w or "end" in w]
        assert output.count("ERROR stage 4 (plain) failed (status 3)") == 1
        assert "stage-4-plain.log" in output and not list(shell.exp.glob("*/.done"))

    def test_a_signal_reaches_all(self, shell):
        body = self.RUN + "of_plain() { wait_for_it; }\nof_teacher() { wait_for_it; }\n"
        body += (
            'main=$$; both() { for phase in plain teacher; do until_told "begin $phase $THREADS"; done; }\n'
        )
        body += "THREADS=OMP_NUM_THREADS=1; (both; kill -TERM $main) &\n"
        output = shell(body + self.ALL, status=143)
        for stage, phase in ((2, "teacher"), (4, "plain")):
            assert output.count(f"ERROR stage {stage} ({phase}) was stopped (status 143)") == 1
        assert not [line for line in self.told(shell) if line.startswith("end")]


class TestReuse:
    """A phase of another recipe is offered to train.py where it can be the same."""

    BODY = """
      other=egs/librispeech/other/exp/synthetic-smoke
      mkdir -p $other/teacher $other/plain $other/student
      for phase in teacher student plain; do
        (phase_fingerprint $phase; echo "ended 1.0") >$other/$phase/.done
      done
    """
    TRAIN = "now 2 teacher; now 3 student; now 4 plain"
    OFFER = "--reuse egs/librispeech/other/exp/synthetic-smoke/"

    def test_where_it_has_neither_teacher_nor_first_weights(self, shell):
        told = trainings(shell(self.BODY + self.TRAIN))
        assert self.OFFER + "teacher" in told["teacher"] and self.OFFER + "plain" in told["plain"]
        assert "--reuse" not in told["student"]
        assert told["teacher"].count("--reuse") == 1, "its own folder is no other recipe's"

    def test_not_of_other_data(self, shell):
        told = trainings(shell(self.BODY + "corpus_dir=/elsewhere\n" + self.TRAIN))
        assert not any("--reuse" in line for line in told.values())

    def test_not_unless_it_has_ended(self, shell):
        told = trainings(shell(self.BODY + "rm $other/teacher/.done\n" + self.TRAIN))
        assert "--reuse" not in told["teacher"] and "--reuse" in told["plain"]

    def test_not_against_the_users_will(self, shell):
        told = trainings(shell(self.BODY + self.TRAIN, options="--force"))
        assert len(told) == 3 and not any("--reuse" in line for line in told.values())

    def test_not_where_the_recipe_adds_something(self, shell):
        body = 'phase_arguments() { arguments+=(--set "data.pseudo_labels=x"); }\n'
        assert "--reuse" not in trainings(shell(self.BODY + body + self.TRAIN))["plain"]


class TestExport:
    """Stage 7: each phase through its gate, all measured together, the report."""

    BODY = """
      exported="teacher student not-a-phase plain"
      now 2 teacher; now 3 student
      run() {
        local phase; phase=$(sed 's/.*--exp-dir //; s/ .*//; s/.*[/]//' <<<"$*")
        echo "RUN $*"
        case $2 in
          local/export.py)
            # Whether killed or by its gate, an export that fails leaves the earlier one as it is.
            [ "$phase" != "${fails:-}" ] || return 1
            mkdir -p "$exp_root/$phase/export"; date +%N >"$exp_root/$phase/export/model.json"
            touch "$exp_root/$phase/export/gate.json"; rm -f "$exp_root/$phase/export/bench.json" ;;
          local/bench_export.py)
            for phase in "$exp_root"/*/export; do touch "$phase/bench.json"; done ;;
        esac
      }
      parts_of() { [ "$1" = test ] && echo clean other || echo dev; }
      stage_report() { echo "REPORT"; }
    """

    def told(self, output):
        return [line.split("RUN python local/")[-1] for line in output.splitlines() if "RUN" in line]

    def test_what_is_trained_is_exported_then_measured_and_reported_once(self, shell):
        output = shell(self.BODY + "export_stage; force=0; export_stage", options="--stage 0 --stop-stage 7")
        programs = [line for line in self.told(output) if not line.startswith("train")]
        exp = "egs/librispeech/mine/exp/synthetic-smoke"
        assert programs == [
            f"export.py --exp-dir {exp}/{phase} --use-averaged-model --test-parts clean,other --dev-part dev"
            for phase in ("teacher", "student")
        ] + [
            f"bench_export.py --export-dir {exp}/teacher/export {exp}/student/export --test-parts "
            "clean,other --turns 2 --audio-s 5 --stream-s 120 --streams 1"
        ]
        assert output.count("plain is not trained") == 2 and output.count("REPORT") == 2
        assert output.count("done already") == 3

    def test_a_failing_gate_fails_the_stage_when_all_else_is_done(self, shell):
        output = shell(
            self.BODY + "fails=teacher; export_stage", options="--stage 0 --stop-stage 7", status=1
        )
        assert [line.split()[0] for line in self.told(output)] == [
            *2 * ["train.py"], *2 * ["export.py"], "bench_export.py",
        ]  # fmt: skip
        assert "/student/export --test-parts" in output and "/teacher/export" not in output.split("bench_")[1]
        assert "ERROR stage 7 (export teacher) failed (status 1)" in output and "REPORT" in output
        assert output.splitlines()[-1].endswith(
            "ERROR stage 7: the export of teacher failed, or did not pass its gate; see above"
        )
        assert [path.parent.name for path in shell.exp.glob("*/.done-export")] == ["student"]
        again = shell(self.BODY + "export_stage", options="--stage 7")
        assert [line.split()[0] for line in self.told(again)] == ["export.py", "bench_export.py"], (
            "what failed runs again, and what it is measured beside"
        )

    def test_a_failing_gate_leaves_the_earlier_export_and_what_was_measured_of_it(self, shell):
        shell(self.BODY + "export_stage", options="--stage 0 --stop-stage 7")
        output = shell(
            self.BODY + "rm $exp_root/teacher/.done-export; fails=teacher; export_stage",
            options="--stage 7",
            status=1,
        )
        assert [line.split()[0] for line in self.told(output)] == ["export.py"]
        assert "bench: done already" in output and "the export of teacher failed" in output
        assert (shell.exp / "teacher/export/bench.json").exists()

    def test_a_phase_that_was_trained_anew_is_exported_anew(self, shell):
        shell(self.BODY + "export_stage", options="--stage 0 --stop-stage 7")
        output = shell(
            self.BODY + "force=1; now 3 student; force=0; export_stage", options="--stage 0 --stop-stage 7"
        )
        assert [line.split()[0] for line in self.told(output)] == ["train.py", "export.py", "bench_export.py"]
        assert "Stage 7: export student: its options changed" in output

    @pytest.mark.parametrize(
        "lost, again", [("gate", ["export.py", "bench_export.py"]), ("bench", ["bench_export.py"])]
    )
    def test_what_an_export_by_hand_lacks_is_made(self, shell, lost, again):
        shell(self.BODY + "export_stage", options="--stage 0 --stop-stage 7")
        (shell.exp / f"student/export/{lost}.json").unlink()
        output = shell(self.BODY + "export_stage", options="--stage 7")
        assert [line.split()[0] for line in self.told(output)] == again

    ELSEWHERE = """
      other=egs/librispeech/other/exp/synthetic-smoke
      for phase in good another-corpus newer good.old-2026 not-trained not-exported half; do
        mkdir -p $other/$phase/export; echo 1 >$other/$phase/export/model.json
        echo "ended 5" >$other/$phase/.done
        printf '%s\\n' "$(data_fingerprint)" more "ended 5" "ended 6" >$other/$phase/.done-export
      done
      sed -i 's/^corpus=.*/corpus=else/' $other/another-corpus/.done-export
      echo "ended 7" >$other/newer/.done
      rm $other/not-trained/.done $other/not-exported/.done-export $other/half/export/model.json
      mv $other/good "$other/good one"
    """
    OWN, OTHER = (f"egs/librispeech/{recipe}/exp/synthetic-smoke" for recipe in ("mine", "other"))
    BESIDE = f"--beside {OTHER}/good one/export --beside-json {OWN}/beside.json"

    def test_exports_of_other_recipes_are_measured_beside_them(self, shell):
        again = """
          export_stage; echo FIRST; touch $exp_root/beside.json; export_stage
          echo LOST; rm $exp_root/beside.json; export_stage
          echo CHANGED; touch $exp_root/beside.json; echo 2 >"$other/good one/export/model.json"; export_stage
          echo GONE; rm -r $other; export_stage; [ ! -e $exp_root/beside.json ]
        """
        output = shell(self.BODY + self.ELSEWHERE + again, options="--stage 0 --stop-stage 7")
        first, lost = re.split("FIRST|LOST", output)[:2]
        lost_again, changed, gone = re.split("LOST|CHANGED|GONE", output)[1:]
        for part in (first, lost_again, changed):
            (told,) = [line for line in self.told(part) if "bench" in line]
            assert told.endswith(self.BESIDE + " --turns 2 --audio-s 5 --stream-s 120 --streams 1")
        assert "bench: done already" in lost and "bench: its options changed" in changed
        (told,) = [line for line in self.told(gone) if "bench" in line]
        assert "--beside" not in told and "can't read" not in output

    def test_an_export_that_leaves_no_model_is_the_error(self, shell):
        output = shell(
            self.BODY + "exported=student fails=student; export_stage",
            options="--stage 0 --stop-stage 7",
            status=1,
        )
        assert "bench_export.py" not in output and "nothing to export" not in output
        assert "the export of student failed" in output.splitlines()[-1]

    def test_without_a_trained_phase_there_is_an_error(self, shell):
        assert "nothing to export" in shell(
            self.BODY + "exported=plain; export_stage", options="--stop-stage 7", status=1
        )

    def test_it_has_to_be_asked_for(self, shell):
        assert shell("echo $stop_stage").splitlines()[-1] == "6"
        assert shell("echo $stop_stage", options="--stage 7").splitlines()[-1] == "7"
        assert "RUN python local/export.py" not in shell(self.BODY + "export_stage")


def test_shared_files_stay_short():
    for path in (ROOT / EGS).glob("*.sh"):
        subprocess.run(["bash", "-n", path], check=True)
        assert len(path.read_text().splitlines()) < 400
