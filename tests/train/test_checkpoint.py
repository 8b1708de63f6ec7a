"""Checkpoints: averages against their definition, damaged files, what is kept."""

import errno
import os

import pytest
import torch

from transducer_kd.log import UserError
from transducer_kd.train import checkpoint as ckpt


def save_run(exp_dir, weights, period=2, steps_per_epoch=4):
    """epoch-N.pt of a run whose only weight has the given value after each update (weights[0]: before)."""
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(weights[0])
    average = ckpt.start_running_average(model)
    for step, value in enumerate(weights[1:], 1):
        model.weight.data.fill_(value)
        ckpt.update_running_average(average, model, step, period)
        if step % steps_per_epoch == 0:
            content = {
                "model": model.state_dict(),
                "model_avg": {k: v.clone() for k, v in average.items()},
                "progress": {"step": step},
                "config": {"train": {"average_period": period}},
            }
            ckpt.save_checkpoint(exp_dir / f"epoch-{step // steps_per_epoch}.pt", content)


WEIGHTS = [5.0, 1.0, 2.0, 3.0, 7.0, 1.0, -4.0, 0.5, 9.0, 2.5, 6.0, 3.5, 8.0]


def test_running_average_is_the_mean_of_its_samples(tmp_path):
    save_run(tmp_path, WEIGHTS)
    samples = [WEIGHTS[0]] + WEIGHTS[2::2]
    average = ckpt.load_checkpoint(tmp_path / "epoch-3.pt")["model_avg"]["weight"].item()
    assert average == pytest.approx(sum(samples) / len(samples), abs=1e-12)


def test_average_since_the_random_start_is_not_used(tmp_path, caplog):
    save_run(tmp_path, WEIGHTS)
    state, _, name = ckpt.select_weights(tmp_path, epoch=3, avg=3, use_averaged_model=True)
    assert state["weight"].item() == 8.0 and name == "epoch-3"
    assert "taking the last weights" in caplog.text


@pytest.mark.parametrize(
    "epoch, avg, expected", [(3, 1, (6.0 + 8.0) / 2), (3, 2, (-4.0 + 9.0 + 6.0 + 8.0) / 4)]
)
def test_average_of_a_span_holds_only_the_samples_in_it(tmp_path, epoch, avg, expected):
    save_run(tmp_path, WEIGHTS)
    state, _, _ = ckpt.select_weights(tmp_path, epoch=epoch, avg=avg, use_averaged_model=True)
    assert state["weight"].item() == pytest.approx(expected, abs=1e-12)


def test_plain_average_takes_the_last_weights_of_each_epoch(tmp_path):
    save_run(tmp_path, WEIGHTS)
    state, _, name = ckpt.select_weights(tmp_path, epoch=0, avg=2, use_averaged_model=False)
    assert state["weight"].item() == pytest.approx((9.0 + 8.0) / 2)
    assert name == "epoch-3-avg-2"


@pytest.fixture
def masked(tmp_path):
    """A run whose masks were chosen anew in epoch 2, though they did not change."""
    save_run(tmp_path, WEIGHTS)
    for epoch, refreshes in ((1, 3), (2, 7), (3, 7)):
        path = tmp_path / f"epoch-{epoch}.pt"
        content = ckpt.load_checkpoint(path)
        masks = {"masks.heads": torch.tensor([True]), "masks.refreshes": torch.tensor(refreshes)}
        for key in ("model", "model_avg"):
            content[key].update(masks)
        ckpt.save_checkpoint(path, content)
    return tmp_path


def test_masks_that_were_fixed_are_no_hindrance(masked):
    state, _, name = ckpt.select_weights(masked, 3, 1, use_averaged_model=True)
    assert state["masks.heads"].dtype == torch.bool and "averaged" in name
    ckpt.select_weights(masked, 3, 2, use_averaged_model=False)


@pytest.mark.parametrize("epoch, use_averaged_model", [(3, True), (2, False)])
def test_models_with_other_masks_are_not_averaged(masked, epoch, use_averaged_model):
    with pytest.raises(UserError, match=f"masks changed among the epochs up to {epoch} .*smaller --avg"):
        ckpt.select_weights(masked, epoch, 2, use_averaged_model)


def test_an_epoch_in_which_masks_changed_gives_its_last_weights(masked, caplog):
    state, _, name = ckpt.select_weights(masked, 2, 1, use_averaged_model=True)
    assert name == "epoch-2" and state["weight"].item() == 9.0
    assert "the masks changed in epoch 2; taking the last weights" in caplog.text


def test_span_without_a_sample_is_an_error():
    one = {"w": torch.ones(1)}
    with pytest.raises(UserError, match="larger --avg"):
        ckpt.average_of_span(one, one, 3, 3)


def test_missing_epoch_names_what_is_there(tmp_path):
    save_run(tmp_path, WEIGHTS)
    with pytest.raises(UserError, match=r"epoch-9\.pt does not exist; found there: epoch-1\.pt, epoch-2\.pt"):
        ckpt.select_weights(tmp_path, epoch=9, avg=1, use_averaged_model=False)
    with pytest.raises(UserError, match="--avg 4"):
        ckpt.select_weights(tmp_path, epoch=3, avg=4, use_averaged_model=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path, damage, caplog):
    save_run(tmp_path, WEIGHTS)
    newest = tmp_path / "epoch-3.pt"
    data = newest.read_bytes()
    newest.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(UserError, match=r"epoch-3\.pt cannot be read"):
        ckpt.load_checkpoint(newest)
    path, _ = ckpt.find_resume_point(tmp_path)
    assert path.name == "epoch-2.pt"
    assert "epoch-3.pt cannot be read" in caplog.text


def test_plain_values_come_back_exactly(tmp_path):
    content = {
        "model": {},
        "f": [0.1, float("inf"), -0.0],
        "i": 3,
        "n": None,
        "d": {"s": "x", "e": {}},
        "t": torch.ones(2),
    }
    ckpt.save_checkpoint(tmp_path / "a.pt", content)
    back = ckpt.load_checkpoint(tmp_path / "a.pt")
    assert torch.equal(back.pop("t"), content.pop("t")) and back == content and str(back["f"][2]) == "-0.0"


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    names = "checkpoint-5 checkpoint-10 checkpoint-100 epoch-2 epoch-10 epoch-1 best-valid"
    for name in names.split():
        (tmp_path / f"{name}.pt").write_bytes(b"x")
    ckpt.remove_old_checkpoints(tmp_path, keep_last=2, keep_epochs=1)
    left = sorted(p.stem for p in tmp_path.iterdir())
    assert left == ["best-valid", "checkpoint-10", "checkpoint-100", "epoch-10"]


def test_resume_point_has_the_most_updates_whatever_the_clock(tmp_path):
    for name, step in (("checkpoint-7", 7), ("epoch-1", 5), ("checkpoint-3", 3)):
        progress = {"step": step, "epoch": 1, "batch_in_epoch": step}
        ckpt.save_checkpoint(tmp_path / f"{name}.pt", {"model": {}, "progress": progress})
    os.utime(tmp_path / "checkpoint-7.pt", (1, 1))
    assert ckpt.find_resume_point(tmp_path)[0].name == "checkpoint-7.pt"


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "epoch-1.pt"
    ckpt.save_checkpoint(path, {"model": {}, "n": 1})

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"no space left on the disk while writing .*epoch-1\.pt"):
        ckpt.save_checkpoint(path, {"model": {}, "n": 2})
    monkeypatch.undo()
    assert ckpt.load_checkpoint(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-1.pt"]
