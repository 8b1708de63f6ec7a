"""Resuming: first weights, teacher and pseudo-labels have to be what they were, wherever they lie now. Taking
over: a finished training serves every recipe that would train the same.
"""

import json
import logging
import os
import subprocess

import pytest
import torch

from transducer_kd.config import load_config, to_dict
from transducer_kd.log import UserError
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train import experiment, reuse


def origin(sha256, path="exp/teacher"):
    return {"path": path, "checkpoint": "epoch-3-avg-1-use-averaged-model", "sha256": sha256 * 64}


BOTH = {"teacher": origin("a"), "init": origin("b", "exp/student")}


@pytest.fixture
def begun(tmp_path):
    """Function: the folder of a run that learnt from these origins and has saved a checkpoint."""

    def begin(origins):
        experiment.prepare_exp_dir(tmp_path, load_config(None), 4, origins)
        experiment.write_meta(tmp_path, {"origins": origins})
        (tmp_path / "checkpoint-5.pt").touch()
        return tmp_path

    return begin


def test_the_same_weights_may_lie_elsewhere(begun):
    exp_dir = begun(BOTH)
    moved = load_config(
        None,
        ["teacher.exp_dir=/other/disk", "init.exp_dir=there", "data.pseudo_labels=x", "compare_with=[a]"],
    )
    experiment.prepare_exp_dir(
        exp_dir, moved, 4, {"teacher": origin("a", "/other/disk"), "init": origin("b", "there")}
    )
    assert json.loads((exp_dir / "config.json").read_text())["teacher"]["exp_dir"] == "/other/disk"


@pytest.mark.parametrize(
    "origins, message",
    [
        (
            {**BOTH, "teacher": origin("c")},
            r"\(weights of teacher: 'aaaaaaaaaaaa' -> 'cccccccccccc'\).*--restart",
        ),
        ({**BOTH, "init": origin("d")}, r"\(weights of init: 'bbbbbbbbbbbb' -> 'dddddddddddd'\)"),
        ({"init": origin("b")}, r"\(weights of teacher: 'aaaaaaaaaaaa' -> None\)"),
        ({**BOTH, "labels": origin("e")}, r"\(pseudo-labels: None -> 'eeeeeeeeeeee'\)"),
    ],
)
def test_other_weights_are_refused(begun, origins, message):
    exp_dir = begun(BOTH)
    before = (exp_dir / "config.json").read_bytes(), (exp_dir / "meta.json").read_bytes()
    with pytest.raises(UserError, match=message):
        experiment.prepare_exp_dir(exp_dir, load_config(None), 4, origins)
    assert before == ((exp_dir / "config.json").read_bytes(), (exp_dir / "meta.json").read_bytes())


def test_a_teacher_that_was_not_there_is_refused(begun):
    with pytest.raises(UserError, match=r"weights of teacher: None -> 'aaaaaaaaaaaa'"):
        experiment.prepare_exp_dir(begun({}), load_config(None), 4, {"teacher": origin("a")})


def test_a_folder_without_checkpoints_may_be_begun_anew(begun):
    exp_dir = begun(BOTH)
    (exp_dir / "checkpoint-5.pt").unlink()
    experiment.prepare_exp_dir(exp_dir, load_config(None, ["optim.lr=0.5"]), 4, {"teacher": origin("c")})
    assert json.loads((exp_dir / "config.json").read_text())["optim"]["lr"] == 0.5


def test_a_run_that_knew_no_origins_goes_on(begun):
    exp_dir = begun({})
    (exp_dir / "meta.json").write_text('{"commit": "older"}')
    # As of a time when none of the settings was there: all had their default.
    (exp_dir / "config.json").write_text("{}")
    experiment.prepare_exp_dir(exp_dir, load_config(None), 4, {})
    assert json.loads((exp_dir / "config.json").read_text()) == to_dict(load_config(None))


# ---------------------------------------------------------------- taking over


@pytest.fixture
def finished(tmp_path):
    """Function: the folder of a training of two_pass that ended at update 7 of 7, after `damage` to it."""

    def make(name="finished", damage=None):
        folder = tmp_path / name
        experiment.prepare_exp_dir(folder, load_config(None, ["train.max_steps=7"]), 4, BOTH)
        experiment.write_meta(folder, {"origins": BOTH, "bpe_sha256": "f" * 64, "commit": "then"})
        for epoch, step in ((1, 4), (2, 7)):
            content = {"model": {"w": torch.tensor([epoch])}, "progress": {"step": step}}
            ckpt.save_checkpoint(folder / f"epoch-{epoch}.pt", content)
        (folder / "train_log.jsonl").write_text("{}")
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard" / "events").write_text("x")
        (folder / "metrics.json").write_text("of another recipe")
        if damage is not None:
            damage(folder)
        return folder

    return make


MINE = ["train.max_steps=7", "recipe=soft_hard"]


def take_over(exp_dir, *folders, settings=(), bpe_sha256="f" * 64, origins=BOTH):
    config = load_config(None, [*MINE, *settings])
    return reuse.take_over(exp_dir, folders, config, bpe_sha256, origins)


def files_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("has_links", [True, False])
def test_a_finished_training_is_taken_over(finished, tmp_path, monkeypatch, has_links):
    folder, exp_dir = finished(), tmp_path / "deep" / "mine"
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("another disk")))
    (exp_dir / "log").mkdir(parents=True)
    (exp_dir / "log" / "log-train-0.txt").write_text("begun")
    before = {name: (folder / name).read_bytes() for name in files_in(folder)}
    assert take_over(exp_dir, folder, settings=["data.fbank_dir=moved", "compare_with=[a]"])
    assert files_in(exp_dir) == (set(before) - {"metrics.json"}) | {"log/log-train-0.txt"}
    for name in ("epoch-1.pt", "epoch-2.pt", "train_log.jsonl", "tensorboard/events"):
        assert (exp_dir / name).read_bytes() == before[name]
        # What may be appended to is a file of its own.
        is_checkpoint = name.endswith(".pt")
        assert os.path.samefile(exp_dir / name, folder / name) == (has_links and is_checkpoint)
    config = json.loads((exp_dir / "config.json").read_text())
    assert config["recipe"] == "soft_hard" and config["data"]["fbank_dir"] == "moved"
    meta = json.loads((exp_dir / "meta.json").read_text())
    assert meta == {**json.loads(before["meta.json"]), "reused_from": str(folder)}
    assert before == {name: (folder / name).read_bytes() for name in files_in(folder)}
    assert [path.name for path in exp_dir.parent.iterdir()] == ["mine"]
    # The same command again finds a finished run, whose origin is not forgotten.
    experiment.prepare_exp_dir(exp_dir, load_config(None, [*MINE, "data.fbank_dir=moved"]), 4, BOTH)
    experiment.write_meta(exp_dir, {"origins": BOTH})
    assert json.loads((exp_dir / "meta.json").read_text())["reused_from"] == str(folder)


@pytest.mark.parametrize(
    "mine, damage, reason",
    [
        ({"settings": ["train.seed=9"]}, None, "train.seed: 42 -> 9"),
        ({"settings": ["phase=student"]}, None, "phase: 'teacher' -> 'student'"),
        ({"bpe_sha256": "0" * 64}, None, "it has another BPE model"),
        ({"origins": {"init": origin("b")}}, None, "weights of teacher: 'aaaaaaaaaaaa' -> None"),
        ({}, lambda folder: (folder / "epoch-2.pt").unlink(), "it stands at update 4 of 7"),
        ({}, lambda folder: (folder / "epoch-2.pt").write_text("x"), "epoch-2.pt cannot be read"),
        ({}, lambda folder: [p.unlink() for p in folder.glob("*.pt")], "it has no epoch-N.pt"),
        ({}, lambda folder: (folder / "meta.json").unlink(), "it has no meta.json"),
        ({}, lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
    ],
)
def test_other_trainings_are_not_taken_over(finished, tmp_path, caplog, mine, damage, reason):
    folder, exp_dir = finished(damage=damage), tmp_path / "mine"
    with caplog.at_level(logging.INFO):
        assert not take_over(exp_dir, folder, **mine)
    assert f"not taking over {folder}: " in caplog.text and reason in caplog.text
    assert not exp_dir.exists()
    # The next folder may do.
    assert take_over(exp_dir, folder, finished("good"), **mine) == (not mine)


def test_a_training_of_its_own_is_not_replaced(finished, tmp_path):
    exp_dir = tmp_path / "mine"
    exp_dir.mkdir()
    (exp_dir / "checkpoint-3.pt").write_text("begun")
    assert not take_over(exp_dir, finished())
    assert files_in(exp_dir) == {"checkpoint-3.pt"}


def test_taking_over_can_be_interrupted(finished, tmp_path, monkeypatch):
    folder, exp_dir = finished(), tmp_path / "mine"
    (exp_dir / "log").mkdir(parents=True)
    (exp_dir / "config.json").write_text("of a run that never saved")
    with monkeypatch.context() as patched:
        patched.setattr(reuse, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            take_over(exp_dir, folder)
    assert files_in(exp_dir) == {"config.json"} and (exp_dir / "log").is_dir()
    assert take_over(exp_dir, folder)
    assert (exp_dir / "epoch-2.pt").exists() and (exp_dir / "log").is_dir()
    (aside,) = tmp_path.glob("mine.old-*")
    assert files_in(aside) == {"config.json"}


def test_the_commit_is_marked_when_code_differs_and_not_when_results_do(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert experiment.git_commit(tmp_path) == "unknown"
    code, results = tmp_path / "package/train.py", tmp_path / "recipe/RESULTS.md"
    for path in (code, results):
        path.parent.mkdir()
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = experiment.git_commit(code.parent)
    assert len(clean) == 12
    results.write_text("5 %")
    (tmp_path / "untracked.py").write_text("")
    assert experiment.git_commit(code.parent) == clean
    code.write_text("2")
    assert experiment.git_commit(code.parent) == f"{clean}-dirty"
