#!/usr/bin/env python3
"""What two modes cost: time and peak memory of an update of dual-mode training against one of a single mode.

  python tools/bench_dual_mode.py                                the mini models of recipe dual_mode
  python tools/bench_dual_mode.py --scale small --device cuda --json cost.json

Exits with 1 when an update of two modes costs more than is allowed.

An update is that of training: for each pass of the batch forward and backward, then the optimiser; the masks
stay as they are between two refreshes. The batch is made up, all utterances equally long, no SpecAugment. The
phases take turns; times are medians over the turns. Ratios are medians of the turns' ratios to the mean of
the two single modes, those of `pretrain` to pretraining the full-context mode alone. Peak memory is what an
update needs on top of what was there before, in a process of its own: on CUDA by
torch.cuda.max_memory_allocated, on a CPU by the peak of the resident set.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from transducer_kd import build  # noqa: E402
from transducer_kd import config as cfg  # noqa: E402
from transducer_kd.data.batch import Batch  # noqa: E402
from transducer_kd.log import run_main, setup_logging, write_json  # noqa: E402
from transducer_kd.train.memory import peak_bytes  # noqa: E402
from transducer_kd.train.optim import build_optimizer  # noqa: E402

CONF = ROOT / "egs/librispeech/dual_mode/conf"
MAX_TIME = 2.1
SINGLE = ("offline", "streaming")
ALONE = "pretrain, one mode"
ONE_MODE = ["model.encoder.chunk_size=0", "model.pruned_groups=none", "pruning.sparsity=0"]
# Phase -> those that it is compared with.
SINGLES_OF: Dict[str, Sequence[str]] = {
    **dict.fromkeys((*SINGLE, "dual_dense", "supernet_scratch", "supernet_block"), SINGLE),
    **dict.fromkeys((ALONE, "pretrain"), (ALONE,)),
}


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    scales = sorted(path.name for path in CONF.iterdir())
    add("--scale", choices=scales, default="mini", help="whose models to train (default mini)")
    add("--batch", type=int, default=6, help="utterances of a batch (default 6)")
    add("--seconds", type=float, default=2.5, help="of speech in each (default 2.5)")
    add("--tokens", type=int, default=12, help="of each (default 12)")
    add("--vocab", type=int, default=100, help="classes (default 100)")
    add("--repeats", type=int, default=21, help="turns (default 21)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    add("--threads", type=int, default=0, help="CPU threads of one operation (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--peak-of", metavar="PHASE", help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args(argv)
    for name in ("batch", "tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if args.seconds * 25 < args.tokens + 2 or args.vocab < 4:
        parser.error("utterances need more than 0.04 s a token, and 4 classes")
    return args


def update_of(phase: str, args: argparse.Namespace) -> Callable[[], None]:
    """A function that makes one update of the phase, the masks as they are once they are fixed."""
    name, changes = ("pretrain", ONE_MODE) if phase == ALONE else (phase, [])
    config = cfg.load_config(CONF / args.scale / f"{name}.yaml", ["spec_augment.enabled=false", *changes])
    model = build.build_trained(config, args.vocab)
    objective = build.objective_of(model, config).to(args.device).train()
    if config.pruning.sparsity:
        from transducer_kd.compress.pruning import choose_masks

        model.masks.assign(choose_masks(model, config.pruning.sparsity))
    optimizer, batch = build_optimizer(model, config.optim), batch_of(args)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        for number in range(objective.num_passes):
            passed = (number,) if number else ()
            objective(batch, config.train.max_steps, *passed).loss_sum.backward()
        optimizer.step()
        if args.device == "cuda":
            torch.cuda.synchronize()

    return update


def batch_of(args: argparse.Namespace) -> Batch:
    generator = torch.Generator().manual_seed(0)
    frames = round(100 * args.seconds)
    features = torch.randn(args.batch, frames, 80, generator=generator) * 3 - 8
    y = torch.randint(3, args.vocab, (args.batch, args.tokens), generator=generator)
    names = [f"cut-{i}" for i in range(args.batch)]
    lens, y_lens = (torch.full((args.batch,), n) for n in (frames, args.tokens))
    return Batch(features, lens, y, y_lens, names, names).to(torch.device(args.device))


def peak_elsewhere(phase: str) -> int:
    """Peak memory of an update, the second one, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", phase]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return int(done.stdout.split()[-1])


def measure(args: argparse.Namespace) -> List[Dict[str, Any]]:
    updates = {phase: update_of(phase, args) for phase in SINGLES_OF}
    runs: Dict[str, List[float]] = {phase: [] for phase in SINGLES_OF}
    for turn in range(args.repeats + 2):
        for phase, update in updates.items():
            start = time.perf_counter()
            update()
            if turn >= 2:  # the first ones warm up
                runs[phase].append(time.perf_counter() - start)
    peaks = {phase: peak_elsewhere(phase) for phase in SINGLES_OF}
    rows = []
    for phase, seconds in runs.items():
        singles = [statistics.mean(turn) for turn in zip(*(runs[single] for single in SINGLES_OF[phase]))]
        ratios = [mine / single for mine, single in zip(seconds, singles)]
        rows.append({
            "phase": phase, "seconds": statistics.median(seconds), "ratio": statistics.median(ratios),
            "peak_bytes": peaks[phase], "seconds_of_runs": seconds,
            "peak_ratio": peaks[phase] / max(statistics.mean(peaks[s] for s in SINGLES_OF[phase]), 1),
        })  # fmt: skip
    return rows


def largest_ratio(rows: List[Dict[str, Any]]) -> float:
    return max(row["ratio"] for row in rows)


def table(rows: List[Dict[str, Any]]) -> str:
    lines = [f"{'phase':20} ms an update  to a single mode  peak MB  to a single mode"]
    for row in rows:
        lines.append(
            f"{row['phase']:20} {1000 * row['seconds']:12.1f}  {row['ratio']:16.2f}  "
            f"{row['peak_bytes'] / 1e6:7.0f}  {row['peak_ratio']:16.2f}"
        )
    worst = largest_ratio(rows)
    lines.append(
        f"largest ratio of time {worst:.2f}, allowed {MAX_TIME}: {'yes' if worst <= MAX_TIME else 'NO'}"
    )
    return "\n".join(lines)


def main() -> int:
    args = parse_arguments()
    setup_logging()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        update = update_of(args.peak_of, args)
        update()  # libraries and the optimiser allocate
        print(peak_bytes(update, torch.device(args.device)))
        return 0
    rows = measure(args)
    print(table(rows))
    if args.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "peak_of"}
        write_json(
            args.json, {"settings": settings, "threads": torch.get_num_threads(), **about, "rows": rows}
        )
    return 0 if largest_ratio(rows) <= MAX_TIME else 1


if __name__ == "__main__":
    run_main(main)
