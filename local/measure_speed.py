#!/usr/bin/env python3
"""Measure how fast the encoders of trained phases are; the first phase is what the others are compared with.

  local/measure_speed.py --exp-dir EXP/streaming EXP/supernet EXP/extracted --use-averaged-model

Float32 on the CPU, traced and frozen by TorchScript: whole utterances with full context and, where a phase
has a chunk size, chunk by chunk with caches. The phases take turns; a time is the median over their turns.
Features are random, which makes no difference to the time. A supernet computes with what it leaves out when
it streams, which is 0, so it is no faster than a dense model; what local/compress.py --extract makes of it
shows what is saved.

Writes <exp-dir>/speed.json of each phase, and prints a table. Real-time factor (RTF): seconds for a second of
audio.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any, Dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.arguments import check_epoch, number  # noqa: E402
from transducer_kd.log import run_main, setup_logging, write_json  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, nargs="+", required=True, help="experiment folders, the reference first")
    add("--epoch", type=number(-1), default=0, help="N for epoch-N.pt; 0: the last one; -1: best-valid.pt")
    add("--avg", type=number(1), default=1, help="average over this many epochs, ending at --epoch")
    add("--use-averaged-model", action="store_true", help="average all weights seen in those epochs")
    add("--lang-dir", default="", help="folder with bpe.model (default: as in training)")
    add("--num-threads", type=number(1), default=1, help="CPU threads (default %(default)s)")
    add("--audio-s", type=number(1), default=20, help="length of an utterance (default %(default)s)")
    add("--repeats", type=number(1), default=25, help="turns of every phase (default %(default)s)")
    args = parser.parse_args()
    check_epoch(parser, args)
    return args


def main() -> int:
    args = parse_arguments()
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    import torch

    from transducer_kd import build
    from transducer_kd.decode import speed
    from transducer_kd.train.experiment import git_commit

    torch.set_num_threads(args.num_threads)
    loaded = {
        exp_dir: build.load_model(
            exp_dir, args.epoch, args.avg, args.use_averaged_model, lang_dir=args.lang_dir
        )
        for exp_dir in args.exp_dir
    }
    found = speed.measure(
        {
            exp_dir: {mode: speed.FrozenEncoder(encoder) for mode, encoder in encoders_of(own).items()}
            for exp_dir, own in loaded.items()
        },
        args.audio_s,
        args.repeats,
    )
    about = {
        "reference": args.exp_dir[0].resolve().name,
        "num_threads": args.num_threads,
        "runtime": speed.RUNTIME,
        "repeats": args.repeats,
        "audio_s": args.audio_s,
        "torch": torch.__version__,
        "commit": git_commit(),
        "command": shlex.join(sys.argv),
    }
    for exp_dir, timings in found.items():
        of_phase = {
            "checkpoint": loaded[exp_dir].checkpoint,
            "chunk_size": loaded[exp_dir].config.model.encoder.chunk_size,
            "modes": {mode: dataclasses.asdict(timing) for mode, timing in timings.items()},
        }
        write_json(exp_dir / "speed.json", {**about, **of_phase})
    print(speed.table({exp_dir.resolve().name: timings for exp_dir, timings in found.items()}))
    return 0


def encoders_of(loaded: Any) -> Dict[str, Any]:
    """Of each mode in which the phase can run."""
    chunk_size = loaded.config.model.encoder.chunk_size
    modes = {"streaming": chunk_size, "offline": 0} if chunk_size else {"offline": 0}
    return {mode: loaded.in_mode(size).model.encoder for mode, size in modes.items()}


if __name__ == "__main__":
    run_main(main)
