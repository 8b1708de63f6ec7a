#!/usr/bin/env python3
"""Stage 1: 80-bin log-mel features of every part -> FBANK_DIR/cuts_<part>.jsonl.gz.

Parts that are up to date are left alone; a run that was killed goes on from its last finished shard. One
second of audio takes 16 kB. With --on-the-fly-feats no features are stored: training reads audio
(data.on_the_fly_feats=true).
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import List, Optional, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Several processes compute, one thread each; more threads would only get into each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transducer_kd.log import UserError, one_line, run_main, setup_logging  # noqa: E402

_ROLES = ("train", "unlabelled", "dev", "test")  # of the parts in parts.json


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--manifests-dir", type=Path, required=True, help="what local/prepare_manifests.py wrote"
    )
    parser.add_argument("--fbank-dir", type=Path, required=True, help="where cuts and features go")
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help="default: all parts in parts.json of the manifests"
    )
    parser.add_argument(
        "--feature-backend", choices=("auto", "kaldifeat", "lhotse"), default="auto",
        help="auto: kaldifeat where it is installed, else lhotse; the same within 1e-3 (default: auto)",
    )  # fmt: skip
    parser.add_argument("--on-the-fly-feats", action="store_true", help="store cuts without features")
    parser.add_argument(
        "--speed-perturb-parts", nargs="+", default=[], metavar="PART",
        help="also store copies at 0.9 and 1.1 of the speed: data.speed_perturb=true needs them",
    )  # fmt: skip
    parser.add_argument(
        "--bad-audio", choices=("error", "skip"), default="error",
        help="audio that cannot be read: stop and name it, or leave it out and count it (default: error)",
    )  # fmt: skip
    parser.add_argument(
        "--num-jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)"
    )
    return parser.parse_args(argv)


def all_parts(manifests_dir: Path) -> List[str]:
    """The parts that parts.json names, each once."""
    path = manifests_dir / "parts.json"
    try:
        roles = json.loads(path.read_text(encoding="utf-8"))
        return list(dict.fromkeys(part for role in _ROLES for part in roles[role]))
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f"{path} cannot be read ({one_line(e)}); make it again with local/prepare_manifests.py, or name "
            "the parts with --parts"
        ) from None


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    from transducer_kd.data.datamodule import SPEED_FACTORS
    from transducer_kd.data.store import StoreOptions, store_part

    parts = args.parts or all_parts(args.manifests_dir)
    jobs = [(part, 1.0) for part in parts]
    if not args.on_the_fly_feats:
        jobs += [(part, speed) for part in args.speed_perturb_parts for speed in SPEED_FACTORS]
    for part, speed in jobs:
        start = time.monotonic()
        options = StoreOptions(
            backend=args.feature_backend,
            with_features=not args.on_the_fly_feats,
            speed=speed,
            num_jobs=max(1, args.num_jobs),
            skip_bad=args.bad_audio == "skip",
        )
        count = store_part(args.manifests_dir, args.fbank_dir, part, options)
        if count is not None:
            logging.info("%s at speed %g: %d cuts in %.1f s", part, speed, count, time.monotonic() - start)
    return 0


if __name__ == "__main__":
    run_main(main)
