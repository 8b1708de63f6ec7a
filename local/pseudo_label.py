#!/usr/bin/env python3
"""Label speech without transcripts with a trained phase, for others to be trained on (data.pseudo_labels).

  local/pseudo_label.py --exp-dir DIR --parts unlabelled --output-dir DIR --soft int8

The work is cut into units, which do not depend on who does them. Share it among the processes that torchrun
starts, among machines that see the same folder by --shard 0/4 to --shard 3/4, or both; give all of them the
same options. A killed job loses at most the unit it was in: run it again, with any sharding. Whoever finds
that no unit is missing filters the labels and writes cuts.jsonl.gz, dropped.jsonl and summary.json
(transducer_kd/data/pseudo_labels.py has the formats). That set is then frozen: other filters need --refilter,
anything else another folder. --soft also stores the teacher's encoder output, for distillation without
running its encoder: an hour of audio is 0.09 MB for each of its channels in int8, 0.18 MB in float16.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.arguments import check_epoch, number, split_list  # noqa: E402
from transducer_kd.log import run_main, setup_logging  # noqa: E402


def parse_arguments(argv: Optional[List[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="experiment folder of the teacher, with epoch-N.pt")
    add("--parts", required=True, metavar="PART[,PART...]", help="what to label, as one set")
    add("--output-dir", type=Path, required=True, help="gets the labels")
    add("--epoch", type=number(-1), default=0, help="N for epoch-N.pt; 0: the last one; -1: best-valid.pt")
    add("--avg", type=number(1), default=1, help="average over this many epochs, ending at --epoch")
    add("--use-averaged-model", action="store_true", help="average all weights seen in those epochs")
    add("--chunk-size", type=number(-1), default=-1, help="encoder frames; 0: full context; -1: as trained")
    add("--beam-size", type=number(1), default=4, help="hypotheses kept (default %(default)s)")
    add("--max-duration", type=number(0.0), default=200.0, help="audio seconds in a batch (%(default)s)")
    add("--unit-hours", type=number(0.0), default=0.25, help="audio of a work unit (default %(default)s)")
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="do the units of shard I of 0 to N - 1")
    add("--soft", choices=("none", "float16", "int8"), default="none", help="store the encoder's output as")
    add("--fbank-dir", default="", help="folder with cuts_<part>.jsonl.gz (default: as in training)")
    add("--lang-dir", default="", help="folder with bpe.model (default: as in training)")
    add("--device", default="auto", help="auto (the GPU where there is one), cpu, cuda or cuda:N")
    add("--num-threads", type=number(0), default=0, help="CPU threads of one operation; 0: torch's choice")
    add = parser.add_argument_group("filters, in this order after that of empty labels").add_argument
    add("--min-confidence", type=float, default=0.5, help="P(hypothesis)^(1/tokens) (default %(default)s)")
    add("--min-token-rate", type=float, default=0.02, help="tokens per encoder frame (default %(default)s)")
    add("--max-token-rate", type=float, default=0.6, help="(default %(default)s)")
    add("--max-repeats", type=int, default=3, help="of one to four words in a row (default %(default)s)")
    add("--refilter", action="store_true", help="make a set anew that was frozen with other filters")
    args = parser.parse_args(argv)
    args.parts = split_list([args.parts])
    if not args.parts:
        parser.error("--parts names nothing")
    check_epoch(parser, args)
    return args


def shard(given: str) -> Tuple[int, int]:
    """ "2/4" -> (2, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1, such as 0/4, not {given}")
    return int(found[1]), int(found[2])


def main(argv: Optional[List[str]] = None) -> int:
    args = parse_arguments(argv)
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    import torch

    from transducer_kd.data import label_set
    from transducer_kd.train import ddp

    limits = (args.min_confidence, args.min_token_rate, args.max_token_rate, args.max_repeats)
    filters = label_set.Filters(*limits)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    place = ddp.setup(args.device)
    setup_logging(rank=place.rank, world_size=place.world_size)
    try:
        summary = label(args, filters, place)
    finally:
        ddp.cleanup()
    if summary is not None:
        print(label_set.table(summary))
    return 0


def label(args: argparse.Namespace, filters: Any, place: Any) -> Optional[Dict[str, Any]]:
    """Do the units of this process and, where none is missing then, make the set -> its summary."""
    from transducer_kd import build
    from transducer_kd.data import label_set, pseudo_labels
    from transducer_kd.decode.labelling import Labeller
    from transducer_kd.decode.wer import word_error_rate
    from transducer_kd.train.experiment import git_commit

    weights = (args.exp_dir, args.epoch, args.avg, args.use_averaged_model)
    loaded = build.load_model(*weights, str(place.device), args.lang_dir)
    as_trained = loaded.config.model.encoder.chunk_size
    chunk_size = args.chunk_size if args.chunk_size >= 0 else as_trained
    loaded = loaded.in_mode(chunk_size)
    labeller = Labeller(loaded, chunk_size, args.beam_size, args.soft)

    folder, fbank_dir = args.output_dir, Path(args.fbank_dir or loaded.config.data.fbank_dir)
    cuts = labeller.load_parts(fbank_dir, args.parts)
    parts = ",".join(args.parts)
    units = pseudo_labels.work_units(cuts, parts, args.max_duration, args.unit_hours)
    run = {
        "teacher": build.origin_of(str(args.exp_dir), loaded.checkpoint, loaded.model.state_dict()),
        "part": parts,
        "cuts_sha256": pseudo_labels.cuts_sha256(cuts),
        "max_duration_s": args.max_duration,
        "unit_hours": args.unit_hours,
        **labeller.settings(),
    }
    pseudo_labels.join_run(folder, run)
    label_set.finished_set(folder, filters, args.refilter)  # refuses other filters before any work
    index, num_shards = args.shard
    first, step = index * place.world_size + place.rank, num_shards * place.world_size
    labeller.label_units(folder, units, range(first, len(units), step))
    created_by = {"commit": git_commit(), "command": shlex.join(sys.argv)}
    return label_set.finish(
        folder, fbank_dir, len(units), filters, args.refilter, word_error_rate, created_by
    )


if __name__ == "__main__":
    run_main(main)
