#!/usr/bin/env python3
"""What the LAS gains in scoring n-best lists when predictions after shared prefixes are made once.

  python tools/bench_rescore.py                                 the sizes below, LAS of scale `small`
  python tools/bench_rescore.py --hyps 16 --tokens 30 --device cuda --json rescore.json

The lists are made up: each hypothesis is the first one of its list with --edits of its tokens replaced, at
random places, so it shares what comes before the first of them. Times are of Las.score, memory and LSTM
included, with share_prefixes and without, in turns; the ratio is the median of the turns' ratios.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from transducer_kd import config as cfg  # noqa: E402
from transducer_kd.log import UserError, run_main, setup_logging, write_json  # noqa: E402
from transducer_kd.models.las import Las, prefix_table  # noqa: E402

CONFIG = ROOT / "egs/librispeech/two_pass/conf/small/teacher_las.yaml"
SIZES = {
    "utterances": (8, "utterances of a batch"),
    "frames": (250, "encoder frames of each"),
    "hyps": (40, "hypotheses of each"),
    "tokens": (12, "tokens of a hypothesis"),
    "edits": (2, "tokens of a hypothesis that are not the first one's"),
    "vocab": (500, "classes"),
    "repeats": (11, "turns"),
}


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    for name, (default, what) in SIZES.items():
        add(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    add("--config", type=Path, default=CONFIG, metavar="YAML", help="phase whose model section to use")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default cpu)")
    add("--threads", type=int, help="CPU threads of one operation (default: torch's choice)")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    args = parser.parse_args(argv)
    for name in SIZES:
        if getattr(args, name) < (0 if name == "edits" else 4 if name == "vocab" else 1):
            parser.error(f"--{name} {getattr(args, name)} is too small")
    if args.edits > args.tokens:
        parser.error(f"--edits {args.edits} is more than --tokens {args.tokens}")
    return args


def make_nbests(args: argparse.Namespace) -> List[List[List[int]]]:
    """For each utterance its hypotheses, token ids from 3 on."""
    rng, nbests = random.Random(0), []
    for _ in range(args.utterances):
        first = [rng.randrange(3, args.vocab) for _ in range(args.tokens)]
        nbest = [first]
        for _ in range(args.hyps - 1):
            places = set(rng.sample(range(args.tokens), args.edits))
            nbest.append([rng.randrange(3, args.vocab) if i in places else t for i, t in enumerate(first)])
        nbests.append(nbest)
    return nbests


@torch.inference_mode()
def run(args: argparse.Namespace) -> Dict[str, Any]:
    torch.manual_seed(0)
    model = cfg.load_config(args.config).model
    if not model.las.enabled:
        raise UserError(f"{args.config} has no LAS (model.las.enabled); name a phase that has one")
    las = Las(model, args.vocab).eval().to(args.device)
    encoder_out = torch.randn(args.utterances, args.frames, model.encoder.encoder_dim, device=args.device)
    lens = torch.full((args.utterances,), args.frames, device=args.device)
    nbests = make_nbests(args)
    seconds: Dict[bool, List[float]] = {True: [], False: []}
    scores = {}
    for turn in range(args.repeats + 1):
        for share in seconds:
            begin = time.perf_counter()
            scores[share] = torch.cat(las.score(encoder_out, lens, nbests, share)).cpu()  # waits for the GPU
            if turn > 0:  # the first one warms up
                seconds[share].append(time.perf_counter() - begin)
    return {
        "command": " ".join(["tools/bench_rescore.py", *sys.argv[1:]]),
        "machine": f"{args.device}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}",
        "sizes": {name: getattr(args, name) for name in SIZES},
        "config": f"{args.config.parent.name}/{args.config.stem}",
        "prefixes": {
            "shared": len(prefix_table(nbests, True).slot),
            "separate": len(prefix_table(nbests, False).slot),
        },
        "seconds": {"shared": seconds[True], "separate": seconds[False]},
        "ratio": statistics.median(b / a for a, b in zip(seconds[True], seconds[False])),
        "largest_difference": float((scores[True] - scores[False]).abs().max()),
    }


def table(result: Dict[str, Any]) -> str:
    lines = [f"{key}: {result[key]}" for key in ("command", "machine", "sizes", "config")]
    lines += ["", f"{'prefixes':<10}{'seconds':>10}{'predictions':>13}"]
    for name, seconds in result["seconds"].items():
        lines.append(f"{name:<10}{statistics.median(seconds):>10.4f}{result['prefixes'][name]:>13}")
    lines.append(
        f"\nsharing prefixes is {result['ratio']:.2f} times as fast; the scores differ by at most "
        f"{result['largest_difference']:.1e}"
    )
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    setup_logging()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use; leave --device out")
    result = run(args)
    print(table(result))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    run_main(main)
