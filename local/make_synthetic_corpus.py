#!/usr/bin/env python3
"""Make the synthetic corpus: device commands spoken by espeak-ng in noisy rooms, in LibriSpeech layout.

Stage 0 with `--corpus synthetic`. The same scale and seed give the same audio whatever the number of jobs;
running it again makes only the speakers that are missing.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transducer_kd.data.synthetic import SCALES, make_corpus  # noqa: E402
from transducer_kd.log import run_main, setup_logging  # noqa: E402


def get_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        help="folder to hold train/, dev/, ... e.g. download/LibriSpeech",
    )
    parser.add_argument(
        "--scale",
        default="mini",
        choices=sorted(SCALES),
        help="mini: 5 hours of speech, a minute on two cores; smoke: minutes of speech (default: mini)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="another seed speaks other sentences (default: 1)"
    )
    parser.add_argument(
        "--num-jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="speakers generated at a time (default: all cores)",
    )
    return parser.parse_args(argv)


def main() -> None:
    args = get_args()
    setup_logging()
    summary = make_corpus(args.output_dir, args.scale, args.seed, args.num_jobs)
    for name, part in summary["parts"].items():
        logging.info(
            "%-11s %3d speakers %5d utterances %6.1f min, SNR %g-%g dB",
            name,
            part["speakers"],
            part["utterances"],
            part["hours"] * 60,
            *part["snr_db"],
        )


if __name__ == "__main__":
    run_main(main)
