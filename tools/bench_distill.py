#!/usr/bin/env python3
"""What lattice distillation costs: time and peak memory of a training step without it and with each form.

  python tools/bench_distill.py                          the sizes below, models of the scale `small`
  python tools/bench_distill.py --part losses            joiners and losses alone, encoder outputs given
  python tools/bench_distill.py --steps plain teacher pruned_kd --repeats 20 --json cost.json

N batch, T' encoder frames, U tokens, V vocabulary. Every utterance has the full T' and U. The steps:

  plain      student: forward, simple loss, pruning, joiner on N T' s_range nodes, pruned loss, backward
  teacher    teacher without gradient: encoder, prediction network, joiner on the student's nodes
  pruned_kd  plain, with the teacher and the divergence on the same nodes: all of `plain` and of `teacher`
  full_kd@K  plain, with the teacher and the divergence on all N T' (U+1) nodes, K utterances at a time;
             their logits are computed again in the backward pass, so that only K utterances are in memory

With `--ranges-from teacher`, as in the recipes, the teacher's simple loss prunes in pruned_kd, and its time
and memory are counted to that step. The student's prunes in all other steps, or with `student` in all.

With `--part losses` encoder_out and decoder_out of both models are given tensors, of which the student's get
a gradient. No step has an optimiser update or CTC; SpecAugment is only in `--part model`.

The steps take turns, so that whatever else the machine does hits all of them. Times are medians over the
turns, and so are their ratios, each taken within a turn: they are more to be trusted than the seconds.

Peak memory is what a step needs on top of the weights, the batch and the libraries. Each step is measured in
a process of its own, after a step of tiny sizes: on CUDA by torch.cuda.max_memory_allocated, on the CPU by
the peak of the resident set (VmHWM, reset through /proc/self/clear_refs; where that is forbidden, since the
process began). There malloc returns what is freed to the system at once (MALLOC_MMAP_THRESHOLD_), so that, as
on CUDA, tensors are counted and not what the allocator keeps for later.

The requirement on memory compares pruned distillation with full lattices of all utterances at once. In
`--part model` both steps hold the encoder's activations as well, which may be most of their memory; "above
plain" is what the steps need beyond the plain one, which has them too.
"""

import argparse
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transducer_kd import config as cfg  # noqa: E402
from transducer_kd.data.batch import Batch  # noqa: E402
from transducer_kd.log import UserError, run_main, setup_logging, write_json  # noqa: E402
from transducer_kd.losses import distill as kd  # noqa: E402
from transducer_kd.losses import pruned_rnnt  # noqa: E402
from transducer_kd.models.frozen import Frozen  # noqa: E402
from transducer_kd.models.spec_augment import SpecAugment  # noqa: E402
from transducer_kd.models.transducer import Transducer  # noqa: E402
from transducer_kd.objectives.distill import DistillObjective, teacher_pass  # noqa: E402
from transducer_kd.objectives.transducer import TransducerObjective  # noqa: E402
from transducer_kd.train.memory import kilobytes, peak_bytes  # noqa: E402

CONF = ROOT / "egs/librispeech/two_pass/conf/small"
MMAP_THRESHOLD = 2**16  # bytes
STEPS = ("plain", "teacher", "pruned_kd", "full_kd")
TINY = {"batch": 2, "frames": 12, "tokens": 3}
# What pruned distillation may cost: the largest ratio, and what it is a ratio of.
MAX_TIME = 1.3, "time of pruned_kd to that of a plain step and the teacher's, one after the other"
MAX_MEMORY = 0.1, "peak memory of pruned_kd to that of full-lattice distillation, all utterances at once"
# Tensors of all nodes' logits or joiner states that are alive at the peak of full_kd, with some to spare.
FULL_TENSORS = 8


class Sizes(NamedTuple):
    batch: int
    frames: int  # T'
    tokens: int  # U
    vocab: int
    joiner_dim: int
    s_range: int


class Bench:
    """Both models, a batch, and a function for each step."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes):
        self.sizes, self.device = sizes, torch.device(args.device)
        torch.manual_seed(0)
        student, teacher = (self._model(path) for path in (args.student, args.teacher))
        self.leaves: List[torch.Tensor] = []
        if args.part == "losses":
            self._give_outputs(student, requires_grad=True)
            self._give_outputs(teacher, requires_grad=False)
        self.student = student
        self.frozen = Frozen(teacher)
        self.batch = self._batch(args.part)
        loss = cfg.load_config(args.student).loss
        self.loss = cfg.LossConfig(args.backend, sizes.s_range, loss.lm_scale, loss.am_scale)
        augment = cfg.SpecAugmentConfig(enabled=args.part == "model")
        self.parts = (student, self.loss, SpecAugment(augment))
        self.distill = dict(weight=1.0, form=args.form, weighting=args.weighting)
        self.ranges_from = {"pruned": args.ranges_from, "full": "student"}
        self.backend = pruned_rnnt.resolve_backend(args.backend)

    def step(self, name: str) -> Callable[[], Any]:
        """The function that runs the step `name`."""
        if name == "teacher":
            return self._teacher_step()
        objective = TransducerObjective(*self.parts)
        if name != "plain":
            lattice, _, few = name.partition("_kd@") if "@" in name else ("pruned", "", 1)
            chosen = dict(self.distill, lattice=lattice, ranges_from=self.ranges_from[lattice])
            distill = cfg.DistillConfig(utterances_at_once=int(few), **chosen)
            objective = DistillObjective(*self.parts, distill, self.frozen)
        objective.to(self.device).train()
        return lambda: objective(self.batch, self.loss.warm_step).loss_sum.backward()

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for tensor in (*self.student.parameters(), *self.leaves):
            tensor.grad = None

    def _teacher_step(self) -> Callable[[], Any]:
        model, batch = self.frozen.module, self.batch
        with torch.no_grad():
            ranges = TransducerObjective(*self.parts).transducer_pass(batch.features, batch).ranges

        @torch.no_grad()
        def run() -> None:
            taught = teacher_pass(model, batch)
            am, lm = pruned_rnnt.gather_pruned(
                model.joiner.encoder_proj(taught.encoder_out),
                model.joiner.decoder_proj(taught.decoder_out),
                ranges,
            )
            model.joiner(am, lm, project_input=False)

        return run

    def _model(self, path: Path) -> Transducer:
        config = cfg.load_config(path).model
        config.joiner_dim = self.sizes.joiner_dim
        return Transducer(config, self.sizes.vocab).to(self.device)

    def _give_outputs(self, model: Transducer, requires_grad: bool) -> None:
        """Let `model` return given outputs in place of running its encoder and prediction network."""
        n, t, u = self.sizes[:3]
        encoder_out = torch.randn(n, t, model.config.encoder.encoder_dim, device=self.device)
        decoder_out = torch.randn(n, u + 1, model.config.decoder.decoder_dim, device=self.device)
        lens = torch.full((n,), t, device=self.device)
        if requires_grad:
            self.leaves = [encoder_out.requires_grad_(), decoder_out.requires_grad_()]
        model.encode = lambda *_, **__: (encoder_out, lens)
        model.decode_labels = lambda y: decoder_out

    def _batch(self, part: str) -> Batch:
        n, frames, tokens, vocab = self.sizes[:4]
        t = 4 * frames + 3 if part == "model" else 1
        y = torch.randint(3, vocab, (n, tokens))
        lens = torch.full((n,), t), torch.full((n,), tokens)
        names = [str(i) for i in range(n)]
        return Batch(torch.randn(n, t, 80) * 4 - 8, lens[0], y, lens[1], names, names).to(self.device)


def seconds_of(bench: Bench, step: Callable[[], Any]) -> float:
    bench.clear()
    _synchronize(bench.device)
    begin = time.perf_counter()
    step()
    _synchronize(bench.device)
    return time.perf_counter() - begin


def measure_times(bench: Bench, names: List[str], repeats: int, full_repeats: int) -> Dict[str, List[float]]:
    """Seconds of every repeat of every step; the steps take turns."""
    steps = {name: bench.step(name) for name in names}
    found: Dict[str, List[float]] = {name: [] for name in names}
    for name, step in steps.items():
        if not is_full(name):  # warms up; a full lattice is too slow to be done in vain
            seconds_of(bench, step)
    for i in range(max(repeats, full_repeats)):
        for name, step in steps.items():
            if i < (full_repeats if is_full(name) else repeats):
                found[name].append(seconds_of(bench, step))
    return found


def measure_peak(args: argparse.Namespace, sizes: Sizes, name: str) -> int:
    """Bytes that one run of step `name` needs beyond those in use before it. For a process of its own."""
    Bench(args, sizes._replace(**TINY)).step(name)()  # libraries allocate when they are first used
    bench = Bench(args, sizes)
    step = bench.step(name)
    return peak_bytes(step, bench.device)


def measure_peak_apart(args: argparse.Namespace, name: str) -> int:
    """`measure_peak` in a new process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--measure-peak-of", name]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise UserError(f"step {name} failed (status {done.returncode}; its message is above, if it had one)")
    return int(done.stdout)


def is_full(name: str) -> bool:
    return name.startswith("full_kd@")


def ratios(runs: Dict[str, List[float]], peaks: Dict[str, int], batch: int) -> List[Dict[str, Any]]:
    """Quotients worth knowing, of the steps that were run; with limits where the project demands them."""
    found: List[Dict[str, Any]] = []

    def add(name: str, value: float, required: Tuple[Optional[float], Optional[str]] = (None, None)) -> None:
        found.append({"name": name, "value": value, "limit": required[0], "requirement": required[1]})

    def time_of(above: str, *below: str) -> float:
        # Turn by turn: what slows the machine down for a while slows down both sides.
        turns = zip(runs[above], *(runs[name] for name in below))
        return statistics.median(mine / sum(others) for mine, *others in turns)

    if {"pruned_kd", "plain", "teacher"} <= set(runs):
        add("time: pruned_kd / (plain + teacher)", time_of("pruned_kd", "plain", "teacher"), MAX_TIME)
    pairs = [("pruned_kd", full) for full in filter(is_full, runs)] if "pruned_kd" in runs else []
    if "plain" in runs:
        pairs += [(name, "plain") for name in runs if name != "plain"]
    for above, below in pairs:
        add(f"time: {above} / {below}", time_of(above, below))
        if peaks[below] > 0:
            required = [MAX_MEMORY] if below == f"full_kd@{batch}" else []  # others: what pieces save
            add(f"memory: {above} / {below}", peaks[above] / peaks[below], *required)
        plain = peaks.get("plain", peaks[below])
        if is_full(below) and peaks[below] > plain:
            value = (peaks[above] - plain) / (peaks[below] - plain)
            add(f"memory above plain: {above} / {below}", value)
    return found


def table(result: Dict[str, Any]) -> str:
    """The result as text."""
    lines = [f"{key}: {result[key]}" for key in ("command", "machine", "sizes", "compared")]
    lines += ["", f"{'step':<14}{'seconds':>10}{'fastest':>10}{'runs':>6}{'peak MB':>10}{'above plain':>13}"]
    plain = next((row["peak_bytes"] for row in result["rows"] if row["step"] == "plain"), None)
    for row in result["rows"]:
        runs, peak = row["seconds_of_runs"], row["peak_bytes"] / 1e6
        times = f"{row['seconds']:>10.3f}{min(runs):>10.3f}{len(runs):>6}"
        above = "-" if plain is None else f"{peak - plain / 1e6:.0f}"
        lines.append(f"{row['step']:<14}{times}{peak:>10.0f}{above:>13}")
    lines += ["", f"{'ratio':<44}{'value':>8}"]
    for ratio in result["ratios"]:
        lines.append(f"{ratio['name']:<44}{ratio['value']:>8.3f}")
        if ratio["limit"] is not None:
            verdict = "meets" if ratio["value"] <= ratio["limit"] else "MISSES"
            lines.append(f"    {verdict} the requirement, at most {ratio['limit']}: {ratio['requirement']}")
    return "\n".join(lines)


def run(args: argparse.Namespace, sizes: Sizes) -> Dict[str, Any]:
    """Measure every step and put the figures together."""
    names = list(args.steps)
    if "full_kd" in names:
        at = names.index("full_kd")
        pieces = dict.fromkeys(min(k, sizes.batch) for k in sorted(args.utterances_at_once, reverse=True))
        names[at : at + 1] = [f"full_kd@{k}" for k in pieces]
        _check_memory(max(pieces), sizes, args.device)
    peaks = {}
    for name in names:
        logging.info("memory of %s", name)
        peaks[name] = measure_peak_apart(args, name)
    bench = Bench(args, sizes)
    logging.info("times")
    runs = measure_times(bench, names, args.repeats, args.full_repeats)
    models = f"student {args.student.stem} and teacher {args.teacher.stem} of {args.student.parent.name}"
    software = f"Python {platform.python_version()}, torch {torch.__version__}"
    return {
        "command": " ".join(["tools/bench_distill.py", *sys.argv[1:]]),
        "machine": f"{_processor(bench.device)}; {software}, {torch.get_num_threads()} threads, "
        f"load {os.getloadavg()[0]:.1f}",
        "sizes": sizes._asdict(),
        "compared": f"part {args.part}, form {args.form}, weighting {args.weighting}, pruned_kd by ranges of "
        f"the {args.ranges_from}'s simple loss, transducer loss by {bench.backend}, {models}",
        "rows": [
            {
                "step": name,
                "seconds": statistics.median(runs[name]),
                "seconds_of_runs": runs[name],
                "peak_bytes": peaks[name],
            }
            for name in names
        ],
        "ratios": ratios(runs, peaks, sizes.batch),
    }


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(flag: str, default: Any, what: str, **how: Any) -> None:
        if default is not None:
            what += f" (default {' '.join(map(str, default)) if isinstance(default, tuple) else default})"
        parser.add_argument(flag, default=default, help=what, **how)

    add("--part", "model", "whole models, or joiners and losses alone", choices=["model", "losses"])
    add("--device", "auto", "auto takes CUDA where it is", choices=["auto", "cpu", "cuda"])
    add("--steps", STEPS, "which steps", nargs="+", choices=STEPS)
    add("--batch", 16, "utterances, N", type=_positive)
    add("--frames", 250, "encoder frames of 40 ms, T'", type=_positive)
    add("--tokens", 60, "tokens of an utterance, U", type=_positive)
    add("--vocab", 500, "classes, V", type=_positive)
    add("--joiner-dim", 512, "width of both joiners", type=_positive)
    add("--s-range", 5, "nodes kept per frame", type=_positive)
    add("--utterances-at-once", (16, 4, 1), "the K of full_kd@K", nargs="+", type=_positive, metavar="K")
    add("--form", "full", "of the divergence", choices=kd.CHOICES["form"])
    add("--weighting", "uniform", "of the nodes", choices=kd.CHOICES["weighting"])
    add("--ranges-from", "teacher", "whose simple loss prunes in pruned_kd", choices=["student", "teacher"])
    add("--backend", "auto", "of the transducer loss", choices=["auto", "k2", "fast_rnnt", "torch"])
    for who in ("student", "teacher"):
        path = CONF / f"{who}.yaml"
        what = f"phase whose model section to use (default {path.relative_to(ROOT)})"
        parser.add_argument(f"--{who}", default=path, type=Path, metavar="YAML", help=what)
    add("--repeats", 5, "timed runs of plain, teacher and pruned_kd", type=_positive)
    add("--full-repeats", 1, "timed runs of each full_kd", type=_positive)
    add("--threads", None, "CPU threads of one operation (default: torch's choice)", type=_positive)
    add("--json", None, "write all figures there", type=Path, metavar="FILE")
    parser.add_argument("--measure-peak-of", help=argparse.SUPPRESS)  # what measure_peak_apart runs
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _check_memory(few: int, sizes: Sizes, device: str) -> None:
    """Better one line now than a machine that swaps. UserError says how much is missing."""
    nodes = few * sizes.frames * (sizes.tokens + 1)
    needed = FULL_TENSORS * nodes * max(sizes.vocab, sizes.joiner_dim) * 4
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else kilobytes("MemAvailable", "/proc/meminfo")
    if needed > free:
        raise UserError(
            f"full_kd@{few} needs about {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; make "
            "--utterances-at-once or --batch smaller"
        )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} cores"


def main() -> None:
    args = get_parser().parse_args()
    setup_logging()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = Sizes(args.batch, args.frames, args.tokens, args.vocab, args.joiner_dim, args.s_range)
    if args.frames < args.tokens or args.vocab < 4:
        raise UserError(f"--frames {args.frames} must be at least --tokens {args.tokens}, --vocab at least 4")
    if args.measure_peak_of:
        print(measure_peak(args, sizes, args.measure_peak_of))
        return
    result = run(args, sizes)
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run_main(main)
