"""The loop: exact resume, global normalisation, accumulation, skipped batches, signals, files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toy import ToyObjective, run_killed_after, toy_batches, toy_trainer  # noqa: E402

from transducer_kd.log import UserError
from transducer_kd.objectives.base import LossOutput
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train import experiment
from transducer_kd.train.metrics import read_train_log


def losses(exp_dir):
    """Everything in the training log but the clock."""
    lines = read_train_log(exp_dir / "train_log.jsonl")
    return [{k: v for k, v in line.items() if k not in ("elapsed_s", "audio_s_per_s")} for line in lines]


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.objective.parameters()])


def test_files_of_a_run(tmp_path):
    trainer = toy_trainer(tmp_path)
    assert trainer.run() is True
    # 18 updates of 5 a pass: three whole epochs and a part of the fourth.
    assert ckpt.epochs_in(tmp_path) == [1, 2, 3, 4]
    kept = sorted(int(p.stem.split("-")[1]) for p in tmp_path.glob("checkpoint-*.pt"))
    assert kept == [9, 12, 15]
    assert (tmp_path / "best-valid.pt").exists() and list((tmp_path / "tensorboard").iterdir())
    lines = losses(tmp_path)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [4, 8, 12, 16, 18]
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [6, 12, 18]


@pytest.mark.parametrize("stop_after, resumes_at", [(1, 0), (4, 4), (5, 4), (7, 6), (13, 12)])
def test_resumed_run_goes_through_the_same_numbers(tmp_path, stop_after, resumes_at):
    whole = toy_trainer(tmp_path / "whole")
    whole.run()
    # Killed without a chance to save: the second process starts from whatever checkpoint there was.
    run_killed_after(toy_trainer(tmp_path / "cut", "train.save_every=2"), stop_after)
    second = toy_trainer(tmp_path / "cut", "train.save_every=2")
    resumed_update, done = second._update, []
    second._update = lambda *args: (resumed_update(*args), done.append(1))
    second.run()
    assert len(done) == 18 - resumes_at
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert torch.equal(weights(second), weights(whole))
    for name, value in whole.average.items():
        assert torch.equal(second.average[name], value)


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path):
    toy_trainer(tmp_path / "whole").run()
    trainer = toy_trainer(tmp_path / "cut", "train.save_every=1000")
    update = trainer._update

    def interrupted(*args):
        update(*args)
        if trainer.progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer._update = interrupted
    assert trainer.run() is False
    # It came between two updates; all ranks agree to stop at the end of the next one.
    assert ckpt.load_checkpoint(tmp_path / "cut" / "checkpoint-8.pt")["progress"]["step"] == 8
    assert toy_trainer(tmp_path / "cut", "train.save_every=1000").run() is True
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_gradient_does_not_depend_on_how_a_batch_is_cut(tmp_path):
    """Accumulating pieces of unequal size equals one batch with everything."""

    def whole(epoch, start):
        parts = list(toy_batches(1, 0, num_batches=3))
        parts[0].features = torch.cat([p.features for p in parts])
        yield parts[0]

    one = toy_trainer(tmp_path / "a", "train.max_steps=1", dropout=0.0, batches=whole)
    one.run()
    three = toy_trainer(tmp_path / "b", "train.max_steps=1", "train.accumulate=3", dropout=0.0)
    three.run()
    torch.testing.assert_close(weights(one), weights(three), rtol=1e-6, atol=1e-7)
    assert losses(tmp_path / "a")[0]["loss"] == pytest.approx(losses(tmp_path / "b")[0]["loss"], rel=1e-6)


def test_loss_is_divided_once_by_all_frames(tmp_path):
    toy_trainer(tmp_path, "train.max_steps=1", "optim.lr=1e-9", dropout=0.0).run()
    batch = next(toy_batches(1, 0))
    objective = ToyObjective(0.0)
    expected = objective(batch, 0).loss_sum / len(batch.features)
    assert losses(tmp_path)[0]["loss"] == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in objective.parameters()]).norm()
    assert losses(tmp_path)[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_non_finite_batch_is_named_saved_and_skipped(tmp_path, caplog):
    trainer = toy_trainer(tmp_path, poison={(1, 2)})
    assert trainer.run() is True
    assert "the loss of cut-1-2-0 (T'=1.0, U=3), in the batch saved as" in caplog.text
    assert "cut-1-2-1" not in caplog.text
    saved = torch.load(tmp_path / "nonfinite-2-rank0.pt", weights_only=True)
    assert saved["cut_ids"][0] == "cut-1-2-0" and torch.isnan(saved["features"]).any()
    assert torch.isfinite(weights(trainer)).all()


def test_too_many_non_finite_batches_end_the_run(tmp_path):
    poison = {(1, i) for i in range(5)}
    with pytest.raises(UserError, match=r"number 3 in a row, train\.max_nonfinite=2"):
        toy_trainer(tmp_path, "train.max_nonfinite=2", poison=poison).run()


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_out_of_memory_names_the_batch_and_what_to_lower(tmp_path, message):
    trainer = toy_trainer(tmp_path)

    def hungry(batch, step):
        raise RuntimeError(message)

    trainer.objective.forward = hungry
    expected = r"update 0, 3 utterances of up to T=3 frames and U=3 tokens \(cut-1-0-0, .*lower data\.max"
    with pytest.raises(UserError, match=expected):
        trainer.run()


def test_run_that_can_only_drop_batches_gives_up_and_listens(tmp_path):
    """Fewer batches an epoch than may be dropped: the count has to go on from epoch to epoch."""

    def poisoned(epoch, start):
        return toy_batches(epoch, start, num_batches=2, poison={(epoch, 0), (epoch, 1)})

    with pytest.raises(UserError, match="number 6 in a row"):
        toy_trainer(tmp_path / "a", batches=poisoned).run()
    trainer = toy_trainer(tmp_path / "b", "train.max_nonfinite=10000", batches=poisoned)
    trainer.stop_signal = signal.SIGTERM
    assert trainer.run() is False


def test_old_epochs_go_whenever_one_is_saved(tmp_path):
    toy_trainer(tmp_path, "train.keep_epochs=2", "train.save_every=1000").run()
    assert ckpt.epochs_in(tmp_path) == [3, 4]


def test_finished_run_is_not_trained_again(tmp_path):
    toy_trainer(tmp_path).run()
    before = (tmp_path / "train_log.jsonl").read_bytes()
    assert toy_trainer(tmp_path).run() is True
    assert (tmp_path / "train_log.jsonl").read_bytes() == before


def test_other_bpe_model_is_refused(tmp_path):
    toy_trainer(tmp_path).run()
    other = toy_trainer(tmp_path)
    other.bpe_sha256 = "other"
    with pytest.raises(UserError, match="another BPE model"):
        other.run()


def test_other_number_of_processes_is_refused(tmp_path):
    toy_trainer(tmp_path).run()
    newest, content = ckpt.find_resume_point(tmp_path)
    ckpt.save_checkpoint(newest, {**content, "world_size": 2})
    assert toy_trainer(tmp_path).run() is True  # nothing is left to do, so it does not matter
    with pytest.raises(UserError, match="saved by 2 processes and these are 1"):
        toy_trainer(tmp_path, "train.max_steps=20").run()


def test_full_disk_is_seen_before_training(tmp_path):
    config = toy_trainer(tmp_path).config
    with pytest.raises(UserError, match="training with 15 checkpoints needs about"):
        experiment.prepare_exp_dir(tmp_path / "exp", config, num_parameters=10**15)
    assert not (tmp_path / "exp").exists()


def test_other_configuration_names_what_differs(tmp_path):
    trainer = toy_trainer(tmp_path)
    experiment.prepare_exp_dir(tmp_path, trainer.config, 4)
    trainer.run()
    other = toy_trainer(tmp_path, "optim.lr=0.1", "train.log_every=2").config
    with pytest.raises(UserError, match=r"\(optim\.lr: 0\.05 -> 0\.1\)"):
        experiment.prepare_exp_dir(tmp_path, other, 4)
    # A setting that a newer version added does not make an old run another one.
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["train"]["keep_epochs"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    experiment.prepare_exp_dir(tmp_path, trainer.config, 4)
    experiment.set_aside(tmp_path)
    assert not tmp_path.exists() and len(list(tmp_path.parent.glob(f"{tmp_path.name}.old-*/epoch-4.pt"))) == 1


def test_no_batch_is_an_error_not_an_endless_loop(tmp_path):
    with pytest.raises(UserError, match="epoch 1 has no batch"):
        toy_trainer(tmp_path, batches=lambda epoch, start: iter(())).run()


def test_fp16_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="fp16 needs a CUDA device"):
        toy_trainer(tmp_path, "train.precision=fp16")


def test_bf16_on_a_cpu_trains_or_says_what_it_needs(tmp_path):
    if torch.__version__.startswith("1."):
        with pytest.raises(UserError, match="needs torch 2"):
            toy_trainer(tmp_path, "train.precision=bf16")
    else:
        assert toy_trainer(tmp_path, "train.precision=bf16").run() is True


KILLED_RUN = """
import sys, time
sys.path.insert(0, sys.argv[2])
from toy import toy_trainer
trainer = toy_trainer(sys.argv[1], "train.save_every=1", "train.max_steps=40")
update = trainer._update
def slow(*args):
    update(*args)
    time.sleep(0.02)
trainer._update = slow
trainer.run()
"""


def test_kill_9_at_any_moment_loses_nothing(tmp_path):
    """SIGKILLs, also while checkpoints are written; the last run ends where the uninterrupted one does."""
    command = [sys.executable, "-c", KILLED_RUN, str(tmp_path / "cut"), str(Path(__file__).parent)]
    log = tmp_path / "cut" / "train_log.jsonl"
    for delay in (0.05, 0.13, 0.31):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        seen = log.stat().st_mtime_ns if log.exists() else 0
        deadline = time.monotonic() + 60
        while (not log.exists() or log.stat().st_mtime_ns == seen) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=120)
    toy_trainer(tmp_path / "whole", "train.save_every=1", "train.max_steps=40").run()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


# ---------------------------------------------------------------- objectives of several passes


class InTwoPasses(ToyObjective):
    """The toy's loss, a third of it in the first pass and the rest in the second."""

    num_passes = 2

    def forward(self, batch, step, number=0):
        output = super().forward(batch, step)
        share = (1 / 3, 2 / 3)[number]
        frames = output.encoder_out_lens * (1 if number == 0 else 100)  # those of the first pass count
        return LossOutput(share * output.losses, frames, {"loss": share * output.metrics["loss"]})

    def after_step(self, step):
        return {"pruning/sparsity": 0.5} if step == 3 else {}

    def histograms(self):
        return {"codes": torch.tensor([3, 0, 1])}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_passes_of_a_batch_make_one_update(tmp_path, accumulate):
    whole = toy_trainer(tmp_path / "whole", f"train.accumulate={accumulate}", dropout=0.0)
    split = toy_trainer(tmp_path / "split", f"train.accumulate={accumulate}", dropout=0.0)
    split.objective.__class__ = InTwoPasses
    assert whole.run() and split.run()
    assert torch.allclose(weights(whole), weights(split), atol=1e-6)
    for one, other in zip(losses(tmp_path / "whole"), losses(tmp_path / "split")):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_second_pass_without_a_finite_loss_makes_no_update(tmp_path):
    trainer = toy_trainer(tmp_path, dropout=0.0)
    trainer.objective.__class__ = InTwoPasses
    before, forward = weights(trainer), InTwoPasses.forward

    def poisoned(batch, step, number=0):
        output = forward(trainer.objective, batch, step, number)
        if number == 1:
            output.losses = output.losses * float("nan")
        return output

    trainer.objective.forward = poisoned
    with pytest.raises(UserError, match="is not finite at update 0"):
        trainer.run()
    assert torch.equal(weights(trainer), before)


def test_scalars_of_an_update_and_histograms_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = toy_trainer(tmp_path)
    trainer.objective.__class__ = InTwoPasses
    validate = trainer.validate

    def with_histograms(objective, step):
        result = validate(objective, step)
        result.histograms = objective.histograms()
        return result

    trainer.validate = with_histograms
    trainer.run()
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/pruning/sparsity")] == [(3, 0.5)]
    found = events.Histograms("valid/codes")
    assert [e.step for e in found] == [6, 12, 18]
    assert found[0].histogram_value.num == 4 and found[0].histogram_value.sum == 2
    assert found[0].histogram_value.bucket == [3, 0, 1]
