"""Checkpoints: averages against their definition, damaged files, what is kept."""

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
    state, _, name = ckpt.select_weights(tmp_path, epoch=3, avg=3, use_averaged_model=True)
    samples = [WEIGHTS[0]] + WEIGHTS[2::2]
    assert state["weight"].item() == pytest.approx(sum(samples) / len(samples), abs=1e-12)
    assert name == "epoch-3-avg-3-use-averaged-model"


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
    for step in (5, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}.pt").write_bytes(b"x")
    (tmp_path / "epoch-1.pt").write_bytes(b"x")
    ckpt.remove_old_checkpoints(tmp_path, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-100.pt",
        "checkpoint-20.pt",
        "epoch-1.pt",
    ]


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "epoch-1.pt"
    ckpt.save_checkpoint(path, {"model": {}, "n": 1})

    def broken(content, f):
        f.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(UserError, match="could not write checkpoint"):
        ckpt.save_checkpoint(path, {"model": {}, "n": 2})
    monkeypatch.undo()
    assert ckpt.load_checkpoint(path)["n"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["epoch-1.pt"]
