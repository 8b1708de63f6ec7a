#!/usr/bin/env python3
"""Turn what the phases of one experiment folder left behind into tables, figures and pages.

Reads metrics.json, train_log.jsonl, config.json and meta.json of every phase, what stage 7 left in its
export/, and stages.jsonl, and compares the phases' recogs files by paired bootstrap. Writes
<exp-dir>/report.json and <exp-dir>/report.html (one file, nothing to load), renews the section of this corpus
and scale in RESULTS.md, and prints the main tables.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.log import atomic_write, run_main, setup_logging, write_json  # noqa: E402


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--exp-dir", type=Path, required=True, help="<recipe>/exp/<corpus>-<scale>, which holds the phases"
    )
    parser.add_argument(
        "--results", type=Path, help="the RESULTS.md to renew (default: <recipe>/RESULTS.md); none: leave it"
    )
    parser.add_argument(
        "--readme", type=Path, help="also put the short tables between this file's results marks"
    )
    parser.add_argument(
        "--corpus-json",
        type=Path,
        help="description of the synthetic corpus (default: found from the folder of the features)",
    )
    return parser.parse_args()


def main() -> None:
    args = get_args()
    setup_logging()
    # Imported late: --help should not wait for matplotlib.
    from transducer_kd.decode.compare import comparisons
    from transducer_kd.report import collect, html, tables, text

    exp_dir = args.exp_dir.absolute()
    report = collect.collect(exp_dir, args.corpus_json)
    report["comparisons"], not_compared = comparisons(exp_dir, report["phases"], report["records"])
    report["missing"] += not_compared
    command = tables.relative(shlex.join(sys.argv))
    write_json(exp_dir / "report.json", report)
    with atomic_write(exp_dir / "report.html") as f:
        f.write(html.render(report, f"Made on {time.strftime('%Y-%m-%d %H:%M')} by {command}"))
    if str(args.results) != "none":
        text.update_results(args.results or exp_dir.parent.parent / "RESULTS.md", report, command)
    if args.readme:
        text.update_block(args.readme, report)

    print("\n" + text.terminal_report(report))
    for item in report["missing"]:
        print(f"missing: {item}")
    print(f"Page: {tables.relative(str(exp_dir))}/report.html")


if __name__ == "__main__":
    run_main(main)
