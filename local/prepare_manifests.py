#!/usr/bin/env python3
"""Stage 0: from a corpus on disk (or a download) to checked lhotse manifests.

Writes recordings_<part>.jsonl.gz and supervisions_<part>.jsonl.gz for every part, parts.json (which parts are
for training, validation, test, unlabelled), and problems_<part>.txt where an utterance was found faulty. A
part whose input has not changed is left as it is. One source must be named:

  --corpus mini_librispeech --download-dir DIR         download (skipped when it is there)
  --corpus librispeech [--full-libri 1]                100 h, or 960 h; with --corpus-dir an unpacked copy
  --corpus synthetic --corpus-dir DIR                  what local/make_synthetic_corpus.py wrote
  --corpus-dir DIR [--train-parts A B] [--dev-parts C] [--test-parts D]     any folder in LibriSpeech layout
  --csv train=train.csv dev=dev.csv test=test.csv      columns path,text,speaker[,id]
  --kaldi-dir train=data/train dev=data/dev            wav.scp, text [, segments, utt2spk]
  --manifest-dir DIR --train-parts A --dev-parts B     lhotse recordings/supervisions_<part>, or cuts_<part>
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.data import corpora  # noqa: E402
from transducer_kd.log import UserError, run_main, setup_logging, write_json  # noqa: E402

Reader = Callable[[str], List[corpora.Utterance]]


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the manifests")
    source = parser.add_argument_group("source")
    source.add_argument("--corpus", choices=sorted(corpora.NAMED_PARTS), help="a corpus with known parts")
    source.add_argument(
        "--download-dir", type=Path, help="where --corpus downloads to, or finds an earlier download"
    )
    source.add_argument("--full-libri", type=int, choices=(0, 1), default=0, help="1: 960 h instead of 100 h")
    source.add_argument("--corpus-dir", type=Path, help="folder in LibriSpeech layout")
    source.add_argument("--csv", nargs="+", metavar="PART=FILE", help="CSV files")
    source.add_argument("--kaldi-dir", nargs="+", metavar="PART=DIR", help="Kaldi data folders")
    source.add_argument("--manifest-dir", type=Path, help="folder with lhotse manifests")
    parts = parser.add_argument_group(
        "parts (default: those of --corpus, or by name: train*; dev*, valid*; test*, eval*; unlabelled*)"
    )
    parts.add_argument("--train-parts", nargs="+", default=None, metavar="PART")
    parts.add_argument("--dev-parts", nargs="+", default=None, metavar="PART")
    parts.add_argument("--test-parts", nargs="+", default=None, metavar="PART")
    parts.add_argument(
        "--unlabelled-parts", nargs="*", default=None, metavar="PART",
        help="parts whose transcripts may be missing; where they exist they only serve to measure",
    )  # fmt: skip
    checks = parser.add_argument_group("checks")
    checks.add_argument(
        "--bad-audio", choices=("error", "skip"), default="error",
        help="a faulty utterance: stop and name it, or leave it out, count it and list it (default: error)",
    )  # fmt: skip
    checks.add_argument(
        "--resample", action="store_true", help="accept audio that is not 16 kHz and resample it"
    )
    checks.add_argument(
        "--channel", type=int, default=None, help="take this channel of audio that has several"
    )
    checks.add_argument(
        "--text-norm", choices=("upper", "none"), default="upper", help="default: LibriSpeech style"
    )
    checks.add_argument(
        "--check-audio", choices=("full", "header"), default="full",
        help="decode every file, or only read headers, which misses damage inside FLAC (default: full)",
    )  # fmt: skip
    checks.add_argument("--num-jobs", type=int, default=os.cpu_count() or 1, help="files checked at a time")
    return parser.parse_args(argv)


def choose_source(args: argparse.Namespace) -> Tuple[Reader, corpora.PartNames]:
    """The reader of a part, and the parts to read."""
    named = named_parts(args)
    if args.corpus and args.corpus != "synthetic" and not args.corpus_dir:
        return download_source(args, named)
    given = [name for name in ("corpus_dir", "csv", "kaldi_dir", "manifest_dir") if getattr(args, name)]
    if len(given) != 1:
        named = ", ".join("--" + n.replace("_", "-") for n in given) or "none"
        raise UserError(
            "name one source: --corpus-dir, --csv, --kaldi-dir, --manifest-dir, or --corpus with "
            f"--download-dir (given: {named})"
        )
    if args.csv or args.kaldi_dir:
        sources = part_sources(args.csv or args.kaldi_dir)
        read = corpora.read_csv if args.csv else corpora.read_kaldi_dir
        return lambda part: read(sources[part]), choose_parts(args, list(sources))
    if args.manifest_dir:
        if not (args.train_parts or args.dev_parts or args.test_parts):
            raise UserError(
                "--manifest-dir needs --train-parts, --dev-parts or --test-parts: which of its parts to read"
            )
        return lambda part: corpora.read_manifests(args.manifest_dir, part), choose_parts(args, [])
    found = named.all() if named else corpora.find_parts(args.corpus_dir)
    return lambda part: corpora.read_librispeech_part(args.corpus_dir, part), choose_parts(args, found, named)


def named_parts(args: argparse.Namespace) -> Optional[corpora.PartNames]:
    """The parts that --corpus and --full-libri stand for; None without --corpus."""
    if args.full_libri and args.corpus != "librispeech":
        raise UserError(
            "--full-libri 1 says which parts of --corpus librispeech to use; for other data name them with "
            "--train-parts"
        )
    named = corpora.NAMED_PARTS.get(args.corpus)
    if named and args.full_libri:
        named = dataclasses.replace(named, train=named.train + corpora.FULL_LIBRI_PARTS)
    return named


def download_source(args: argparse.Namespace, named: corpora.PartNames) -> Tuple[Reader, corpora.PartNames]:
    if not args.download_dir:
        raise UserError(
            f"--corpus {args.corpus} needs --download-dir, or --corpus-dir with the unpacked corpus"
        )
    parts = choose_parts(args, named.all(), named)
    corpus_dir = corpora.download(args.corpus, parts.all(), args.download_dir)
    return lambda part: corpora.read_librispeech_part(corpus_dir, part), parts


def choose_parts(
    args: argparse.Namespace, found: Sequence[str], named: Optional[corpora.PartNames] = None
) -> corpora.PartNames:
    """What the options say, else what the corpus is known for, else a guess from the names."""
    default = named or corpora.guess_roles(found)
    roles = [
        getattr(args, f"{role}_parts")
        if getattr(args, f"{role}_parts") is not None
        else getattr(default, role)
        for role in ("train", "dev", "test", "unlabelled")
    ]
    parts = corpora.PartNames(*roles)
    if not parts.all():
        raise UserError(
            f"cannot tell what these parts are for: {', '.join(found)}; say so with --train-parts, "
            "--dev-parts and --test-parts"
        )
    return parts


def part_sources(items: Sequence[str]) -> Dict[str, Path]:
    sources = {}
    for item in items:
        part, equals, path = item.partition("=")
        if not (part and equals and path):
            raise UserError(f"{item}: write it as PART=PATH, e.g. train={item}")
        sources[part] = Path(path)
    return sources


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = parse_arguments(argv)
    setup_logging()
    from transducer_kd.data.validate import CheckOptions, prepare_part  # late: --help answers at once

    read, parts = choose_source(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    options = CheckOptions(
        resample=args.resample,
        channel=args.channel,
        text_norm=args.text_norm,
        decode=args.check_audio == "full",
        num_jobs=max(1, args.num_jobs),
    )
    for part in parts.all():
        part_options = dataclasses.replace(options, text_optional=part in parts.unlabelled)
        prepare_part(args.output_dir, part, read(part), part_options, skip_bad=args.bad_audio == "skip")
    write_json(args.output_dir / "parts.json", dataclasses.asdict(parts))
    logging.info("parts: %s", json.dumps(dataclasses.asdict(parts)))
    return 0


if __name__ == "__main__":
    run_main(main)
