"""The training loop. It knows no task: an Objective gives sums, the loop divides, updates, logs, saves and
resumes.

Exactness: every random draw of an update comes from a generator seeded by (seed, update, rank), the data
order from (seed, epoch), the learning rate from the update alone, and a checkpoint is only taken between
updates. So a run that is killed and resumed goes through the same numbers as one that was not
(on a GPU up to the order in which its kernels add).
"""

import contextlib
import logging
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import nn

from transducer_kd.config import PhaseConfig, to_dict
from transducer_kd.log import UserError
from transducer_kd.objectives.base import LossOutput, Objective
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train import ddp, faults, memory
from transducer_kd.train.metrics import MetricsWindow, TrainLog, add_counts
from transducer_kd.train.optim import build_grad_scaler, build_optimizer, learning_rate

# Gradients are first accumulated of loss / 1024 and divided by the true frame count at the end. A power of
# two, so that the detour changes no bit of the result; near a batch's frame count, so that fp16 gradients
# stay in range.
_PROVISIONAL_FRAMES = 1024.0
# Below this scale fp16 gradients overflow because the weights do, not because the scale is too large.
_SMALLEST_FP16_SCALE = 1.0


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0  # optimiser updates done
    epoch: int = 1  # 1-based, the one in progress
    batch_in_epoch: int = 0  # batches of this epoch already used, per rank
    nonfinite: int = 0  # batches dropped since the last update that was made
    best_valid_loss: float = float("inf")
    elapsed_s: float = 0.0  # training time over all runs, without validation
    audio_s: float = 0.0  # audio seconds trained on


@dataclass
class Validation:
    """What a validation callable returns: means over the validation part, and samples to look at."""

    metrics: Dict[str, float]
    texts: List[Tuple[str, str, str]] = field(default_factory=list)  # cut id, reference, hypothesis
    images: Dict[str, torch.Tensor] = field(default_factory=dict)  # (H, W) in [0, 1]
    histograms: Dict[str, torch.Tensor] = field(default_factory=dict)  # counts (n,) of the numbers 0 .. n-1


class Trainer:
    """Runs one phase in `exp_dir` to `config.train.max_steps` updates.

    train_batches(epoch, start_batch) iterates over one epoch's batches from `start_batch` on; a batch has
    `.to(device)`, `.audio_s`, `.cut_ids`, `.feature_lens`, `.y_lens`.  validate(objective, step) returns a
    Validation (rank 0 calls it).
    """

    def __init__(
        self,
        objective: Objective,
        config: PhaseConfig,
        exp_dir: Path,
        device: torch.device,
        train_batches: Callable[[int, int], Any],
        validate: Callable[[Objective, int], Validation],
        bpe_sha256: str = "",
    ):
        self.config, self.options = config, config.train
        self.exp_dir, self.device = Path(exp_dir), device
        self.objective = objective.to(device)
        self.train_batches, self.validate = train_batches, validate
        self.bpe_sha256 = bpe_sha256
        self.optimizer = build_optimizer(self.objective.model, config.optim)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.autocast_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.options.precision)
        if self.options.precision == "fp16" and device.type != "cuda":
            raise UserError("train.precision=fp16 needs a CUDA device; use bf16 or fp32 on this one")
        if self.options.precision == "bf16" and device.type == "cpu" and torch.__version__.startswith("1."):
            raise UserError(
                "train.precision=bf16 on a CPU needs torch 2 (--env modern); use fp32 with this torch"
            )
        self.scaler = build_grad_scaler(self.options.precision == "fp16")
        self.progress, self.window = Progress(), MetricsWindow()
        self._last_logged = (0.0, 0.0)  # audio and training seconds at the last log line
        self.average = ckpt.start_running_average(self.objective.model)
        self.wrapped: nn.Module = self.objective
        self.stop_signal: Optional[int] = None  # heard by this rank
        self.stopping = False  # agreed by all ranks, so that all leave the loop after the same update

    # ---------------------------------------------------------------- run

    def run(self) -> bool:
        """Train until max_steps -> True, or until SIGTERM/SIGINT, after saving -> False."""
        self._resume()
        if self.progress.step >= self.options.max_steps:
            logging.info("already trained: %d updates in %s", self.progress.step, self.exp_dir)
            return True
        self.wrapped = ddp.wrap(self.objective, self.device)
        self.log = TrainLog(self.exp_dir / "train_log.jsonl", self.progress.step) if ddp.is_main() else None
        self.writer = self._open_tensorboard() if ddp.is_main() else None
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        self.objective.train()
        self.bar = _progress_bar(self.options.max_steps, self.progress.step) if ddp.is_main() else None
        try:
            while self.progress.step < self.options.max_steps and not self.stopping:
                self._run_epoch()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self.bar is not None:
                self.bar.close()
            if self.writer is not None:
                self.writer.close()
        self._log_cost()
        return self.progress.step >= self.options.max_steps

    def _run_epoch(self) -> None:
        state = self.progress
        pending: List[Any] = []
        clock, data_seconds = time.perf_counter(), 0.0
        for batch in self.train_batches(state.epoch, state.batch_in_epoch):
            data_seconds += time.perf_counter() - clock
            pending.append(batch)
            if len(pending) == self.options.accumulate:
                self._update(pending, data_seconds)
                pending, data_seconds = [], 0.0
                if state.step >= self.options.max_steps or self.stopping:
                    break
            clock = time.perf_counter()
        else:
            if pending:
                self._update(pending, data_seconds)
            if state.batch_in_epoch == 0:
                raise UserError(
                    f"epoch {state.epoch} has no batch: every cut of data.train_parts was dropped or the "
                    "manifest is empty (see the counts above)"
                )
            finished = state.epoch
            state.epoch, state.batch_in_epoch = finished + 1, 0
            self._save(f"epoch-{finished}.pt")
            return
        if state.step >= self.options.max_steps:  # ends inside an epoch: its last weights still are epoch N's
            self._save(f"epoch-{state.epoch}.pt")
        else:
            logging.warning("told to stop: saving after update %d", state.step)
            self._save(f"checkpoint-{state.step}.pt")

    # ---------------------------------------------------------------- one update

    def _update(self, batches: List[Any], data_seconds: float) -> None:
        """One optimiser update, or none where a loss was not finite; then the ranks agree whether to stop."""
        self._try_update(batches, data_seconds)
        self.stopping = ddp.all_reduce_sum([float(self.stop_signal is not None)])[0] > 0

    def _try_update(self, batches: List[Any], data_seconds: float) -> None:
        """One optimiser update from `batches` of this rank (and those of the other ranks)."""
        start, state = time.perf_counter(), self.progress
        step = state.step
        # The same update draws the same dropout and masks, whenever it is run; ranks draw different ones.
        torch.manual_seed((self.options.seed * 1_000_003 + step) * 4099 + ddp.rank())
        rate = learning_rate(step, self.options.max_steps, self.config.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        totals = {"num_frames": 0.0, "audio_s": sum(b.audio_s for b in batches)}
        state.batch_in_epoch += len(batches)
        with faults.naming_out_of_memory(batches, step):
            for i, batch in enumerate(batches):
                if not self._forward_backward(batch, step, totals, last=i == len(batches) - 1):
                    return
            names = sorted(totals)
            totals = dict(zip(names, ddp.all_reduce_sum([totals[n] for n in names])))
            grad_norm = self._apply_gradients(totals["num_frames"])
        if grad_norm is None:
            self._drop_update(batches)
            return
        state.step += 1
        state.nonfinite = 0
        scalars = self.objective.after_step(state.step)
        if scalars:  # another model now, whose losses are not comparable with those before
            state.best_valid_loss = float("inf")
        ckpt.update_running_average(
            self.average, self.objective.model, state.step, self.options.average_period
        )
        state.audio_s += totals.pop("audio_s")
        self.window.add({n: v for n, v in totals.items() if n != "num_frames"}, totals["num_frames"])
        self.window.updates += 1
        self.window.grad_norm_sum += grad_norm
        if self.device.type == "cuda" and state.step % self.options.log_every == 0:
            torch.cuda.synchronize()
        state.elapsed_s += time.perf_counter() - start + data_seconds
        self._after_update(batches[-1], rate, scalars)

    def _forward_backward(self, batch: Any, step: int, totals: Dict[str, float], last: bool) -> bool:
        """Add one batch's gradients and sums; False when its loss was not finite (no update then)."""
        batch = batch.to(self.device)
        passes = self.objective.num_passes
        for number in range(passes):
            arguments = (batch, step) if passes == 1 else (batch, step, number)
            # Gradients travel between ranks once an update, with the last pass of the last batch.
            is_last = last and number == passes - 1
            with contextlib.nullcontext() if is_last else ddp.no_sync(self.wrapped):
                with self._autocast():
                    output: LossOutput = self.wrapped(*arguments)
                loss_sum = output.loss_sum
                is_finite = bool(torch.isfinite(loss_sum))
                # One rank's bad batch drops the update on all of them, or their weights would part.
                if ddp.all_reduce_sum([0.0 if is_finite else 1.0])[0]:
                    self._report_nonfinite(None if is_finite else (batch, output))
                    return False
                self.scaler.scale(loss_sum / _PROVISIONAL_FRAMES).backward()
            totals["num_frames"] += float(output.num_frames) if number == 0 else 0.0
            for name, value in output.metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        return True

    def _apply_gradients(self, num_frames: float) -> Optional[float]:
        """Divide by the global frame count, clip, update -> gradient norm; None when it was not finite."""
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        # DistributedDataParallel has averaged over ranks; the frame count is a sum over ranks.
        torch._foreach_mul_(gradients, _PROVISIONAL_FRAMES * ddp.world_size() / num_frames)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.config.optim.clip_norm))
        finite = norm == norm and norm != float("inf")
        if not finite:
            # The norm of finite gradients can overflow as well: the scaler would not see that by itself.
            self.scaler.update(self.scaler.get_scale() / 2 if self.scaler.is_enabled() else None)
            return None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, enabled=bool(self.autocast_dtype))

    def _report_nonfinite(self, mine: Optional[Tuple[Any, LossOutput]]) -> None:
        """Name and save this rank's batch, if it is the one, and count the event."""
        what = "the loss of another rank"
        if mine is not None:
            saved = self._save_batch(mine[0])
            what = f"the loss of {faults.nonfinite_cuts(*mine)}, in the batch saved as {saved},"
        self._count_nonfinite(what)

    def _drop_update(self, batches: List[Any]) -> None:
        """A gradient that is not finite. fp16's scaler expects some of them: it then lowers its scale."""
        if self.scaler.is_enabled() and self.scaler.get_scale() >= _SMALLEST_FP16_SCALE:
            return
        cuts = ", ".join(cut for batch in batches for cut in batch.cut_ids)
        saved = ", ".join(str(self._save_batch(batch, f"-{i}")) for i, batch in enumerate(batches))
        self._count_nonfinite(f"the gradient of {cuts}, saved as {saved},")

    def _save_batch(self, batch: Any, number: str = "") -> Path:
        path = self.exp_dir / f"nonfinite-{self.progress.step}-rank{ddp.rank()}{number}.pt"
        ckpt.save_checkpoint(path, dict(vars(batch)))
        return path

    def _count_nonfinite(self, what: str) -> None:
        state, limit = self.progress, self.options.max_nonfinite
        state.nonfinite += 1
        message = f"{what} is not finite at update {state.step}"
        if state.nonfinite > limit:
            raise UserError(
                f"{message}. That is number {state.nonfinite} in a row, "
                f"train.max_nonfinite={limit}: look at these cuts, lower optim.lr, or use "
                "train.precision=fp32"
            )
        logging.warning("%s; no update from it (%d in a row)", message, state.nonfinite)

    # ---------------------------------------------------------------- log, validate, save, resume

    def _after_update(self, batch: Any, rate: float, scalars: Dict[str, float]) -> None:
        state, options = self.progress, self.options
        if ddp.is_main():
            for name, value in scalars.items():
                self.writer.add_scalar(f"train/{name}", value, state.step)
        last = state.step == options.max_steps
        if state.step % options.log_every == 0 or last:
            self._log_window(batch, rate)
        if state.step % options.valid_every == 0 or last:
            self._validate()
        if state.step % options.save_every == 0 and not last:
            self._save(f"checkpoint-{state.step}.pt")
        if self.bar is not None:
            self.bar.update(1)

    def _log_window(self, batch: Any, rate: float) -> None:
        state, means = self.progress, self.window.means()
        audio_s, elapsed_s = state.audio_s, state.elapsed_s
        since_audio, since_elapsed = self._last_logged
        throughput = (audio_s - since_audio) / max(elapsed_s - since_elapsed, 1e-9)
        self._last_logged = (audio_s, elapsed_s)
        self.window = MetricsWindow()
        if not ddp.is_main():
            return
        losses = ", ".join(f"{k}={v:.4f}" for k, v in means.items() if k != "grad_norm")
        logging.info(
            "Epoch %d, batch %d, global_batch_idx: %d, batch size: %d, loss[%s], lr: %.2e, grad norm: %.2f, "
            "%.0f audio-s/s",
            state.epoch, state.batch_in_epoch, state.step, len(batch.cut_ids), losses, rate,
            means["grad_norm"], throughput,
        )  # fmt: skip
        line = {"kind": "train", "step": state.step, "epoch": state.epoch, **means, "lr": rate}
        self.log.append({**line, "audio_s_per_s": throughput, "elapsed_s": elapsed_s})
        for name, value in {**means, "lr": rate, "audio_s_per_s": throughput}.items():
            self.writer.add_scalar(f"train/{name}", value, state.step)

    def _validate(self) -> None:
        if not ddp.is_main():
            return
        start, state = time.perf_counter(), self.progress
        self.objective.eval()
        with torch.no_grad(), self._autocast():
            result = self.validate(self.objective, state.step)
        self.objective.train()
        shown = ", ".join(f"{k}={v:.4f}" for k, v in result.metrics.items())
        logging.info(
            "Epoch %d, validation at %d: %s (%.1f s)",
            state.epoch,
            state.step,
            shown,
            time.perf_counter() - start,
        )
        self.log.append(
            {
                "kind": "valid",
                "step": state.step,
                "epoch": state.epoch,
                **result.metrics,
                "elapsed_s": state.elapsed_s,
            }
        )
        for name, value in result.metrics.items():
            self.writer.add_scalar(f"valid/{name}", value, state.step)
        for name, image in result.images.items():
            self.writer.add_image(f"valid/{name}", image.unsqueeze(0), state.step)
        for name, counts in result.histograms.items():
            add_counts(self.writer, f"valid/{name}", counts, state.step)
        if result.texts:
            rows = "\n".join(f"| {c} | {r} | {h} |" for c, r, h in result.texts)
            self.writer.add_text(
                "valid/hypotheses", f"| cut | reference | hypothesis |\n|---|---|---|\n{rows}", state.step
            )
        if result.metrics["loss"] < state.best_valid_loss:
            state.best_valid_loss = result.metrics["loss"]
            self._save("best-valid.pt")

    def _save(self, name: str) -> None:
        if not ddp.is_main():
            return
        content = {
            "model": self.objective.model.state_dict(),
            "model_avg": self.average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "window": asdict(self.window),
            "config": to_dict(self.config),
            "bpe_sha256": self.bpe_sha256,
            "world_size": ddp.world_size(),
        }
        ckpt.save_checkpoint(self.exp_dir / name, content)
        ckpt.remove_old_checkpoints(self.exp_dir, self.options.keep_last, self.options.keep_epochs)
        logging.info("saved %s", self.exp_dir / name)

    def _resume(self) -> None:
        found = ckpt.find_resume_point(self.exp_dir)
        step = found[1]["progress"]["step"] if found else 0
        if ddp.all_reduce_sum([float(step)])[0] != ddp.world_size() * step:
            raise UserError(
                f"the processes see different checkpoints in {self.exp_dir}: all machines "
                "need the same folder"
            )
        if found is None:
            return
        path, content = found
        if content["bpe_sha256"] != self.bpe_sha256:
            raise UserError(
                f"{path} was trained with another BPE model (sha256 {content['bpe_sha256'][:12]}, now "
                f"{self.bpe_sha256[:12]}); use its lang_dir, or another --exp-dir for the new one"
            )
        if content["world_size"] != ddp.world_size() and step < self.options.max_steps:
            raise UserError(
                f"{path} was saved by {content['world_size']} processes and these are {ddp.world_size()}: "
                "which batches are left would differ. Resume with as many, or start again with --restart"
            )
        self.objective.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.progress, self.window = Progress(**content["progress"]), MetricsWindow(**content["window"])
        self.average = {k: v.to(self.device) for k, v in content["model_avg"].items()}
        self._last_logged = (self.progress.audio_s, self.progress.elapsed_s)
        logging.info("resumed from %s at update %d", path, self.progress.step)

    def _open_tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        purge = self.progress.step + 1 if self.progress.step else None
        return SummaryWriter(str(self.exp_dir / "tensorboard"), purge_step=purge)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop_signal = number

    def _log_cost(self) -> None:
        rate = self.progress.audio_s / max(self.progress.elapsed_s, 1e-9)
        peak = memory.peak_memory(self.device)
        logging.info("%d updates, %.0f audio-s/s, peak memory %s", self.progress.step, rate, peak)


def _progress_bar(total: int, done: int) -> Any:
    """tqdm over updates on a terminal; nothing elsewhere, where the log lines show progress."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc="updates", dynamic_ncols=True)
