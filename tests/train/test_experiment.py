"""Resuming: the first weights and the teacher have to be what they were, wherever they lie now."""

import pytest

from transducer_kd.config import load_config
from transducer_kd.log import UserError
from transducer_kd.train import experiment


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
    moved = load_config(None, ["teacher.exp_dir=/other/disk", "init.exp_dir=there"])
    experiment.prepare_exp_dir(
        exp_dir, moved, 4, {"teacher": origin("a", "/other/disk"), "init": origin("b", "there")}
    )


@pytest.mark.parametrize(
    "origins, message",
    [
        (
            {**BOTH, "teacher": origin("c")},
            r"\(weights of teacher: 'aaaaaaaaaaaa' -> 'cccccccccccc'\).*--restart",
        ),
        ({**BOTH, "init": origin("d")}, r"\(weights of init: 'bbbbbbbbbbbb' -> 'dddddddddddd'\)"),
        ({"init": origin("b")}, r"\(weights of teacher: 'aaaaaaaaaaaa' -> None\)"),
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
    experiment.prepare_exp_dir(exp_dir, load_config(None), 4, {"teacher": origin("c")})


def test_a_run_that_knew_no_origins_goes_on(begun):
    exp_dir = begun({})
    (exp_dir / "meta.json").write_text('{"commit": "older"}')
    experiment.prepare_exp_dir(exp_dir, load_config(None), 4, {})
