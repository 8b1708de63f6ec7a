#!/usr/bin/env python3
"""Decode test parts with a trained phase and score them.

  local/decode.py --exp-dir DIR --epoch 7 --avg 2 --use-averaged-model \\
      --decoding-method greedy_search,modified_beam_search,fast_beam_search --test-parts test-clean,test-other

For each part and method, <exp-dir>/<method>/ gets recogs-*.txt, errs-*.txt and wer-summary-*.txt, and
<exp-dir>/metrics.json gets one record, as soon as that method has finished with the part; a decoding that is
stopped keeps all it has finished. The encoder runs once for all methods of one call: the decoding time of a
method is the encoder's and its own. The fast_beam_search methods also share their lattices.

*_las_rescore, for a phase with a LAS, is a second pass over the n-best lists of fast_beam_search_nbest or,
where k2 is absent, of modified_beam_search. Two weights, mu and length_weight, join the scores of the two:

  local/decode.py --exp-dir DIR --decoding-method fast_beam_search_nbest_las_rescore --tune-part dev

tunes them on a part that is not tested, keeps them in <exp-dir>/rescore.json and decodes the test parts.
Later calls with the same weights of the model and the same search find them there.

A phase decodes in the mode that it was trained in, one of two modes streams; --chunk-size 0 decodes with full
context. What a supernet leaves out when it streams is 0 then. Results of both modes are kept.
"""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import Any, Union

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.arguments import check_epoch, number, split_list  # noqa: E402
from transducer_kd.log import run_main, setup_logging  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="experiment folder of the phase, with epoch-N.pt")
    add_number(parser, "--epoch", 0, "N for epoch-N.pt; 0: the last one; -1: best-valid.pt", -1)
    add_number(parser, "--avg", 1, "average over this many epochs, ending at --epoch")
    add(
        "--use-averaged-model",
        action="store_true",
        help="average all weights seen in those epochs, not only their ends",
    )
    add(
        "--decoding-method", action="append", metavar="METHOD[,METHOD...]",
        help="greedy_search (default), modified_beam_search, fast_beam_search, fast_beam_search_nbest, "
        "fast_beam_search_nbest_oracle, streaming_greedy_search, modified_beam_search_las_rescore, "
        "fast_beam_search_nbest_las_rescore; may be repeated",
    )  # fmt: skip
    add("--test-parts", action="append", metavar="PART[,PART...]", help="default: test-clean,test-other")
    add_number(parser, "--max-duration", 200.0, "audio seconds in a batch")
    add_number(
        parser, "--num-utts", 0, "only about a part's first N utterances; leaves no record or rescore.json", 0
    )
    add("--fbank-dir", default="", help="folder with cuts_<part>.jsonl.gz (default: as in training)")
    add("--lang-dir", default="", help="folder with bpe.model (default: as in training)")
    add("--device", default="auto", help="auto (the GPU where there is one), cpu, cuda or cuda:N")
    add_number(parser, "--num-threads", 0, "CPU threads of one operation; 0: torch's choice", 0)
    search = parser.add_argument_group("search")
    add_number(search, "--chunk-size", -1, "encoder frames of 40 ms; 0: full context; -1: as trained", -1)
    add_number(search, "--max-sym-per-frame", 1, "greedy_search, streaming_greedy_search")
    add_number(search, "--beam-size", 4, "modified_beam_search: hypotheses kept")
    add_number(search, "--beam", 20.0, "fast_beam_search*: log-probability below the best")
    add_number(search, "--max-contexts", 8, "fast_beam_search*: contexts kept per frame")
    add_number(search, "--max-states", 64, "fast_beam_search*: states kept per frame")
    add_number(search, "--num-paths", 200, "fast_beam_search_nbest*: paths drawn from a lattice")
    add_number(search, "--nbest-scale", 0.5, "... with log-probabilities scaled by this")
    search.add_argument(
        "--save-lattices", type=Path, metavar="DIR", help="fast_beam_search*: keep them, in DIR/<part>/"
    )
    second = parser.add_argument_group(
        "second pass (*_las_rescore)", "score = (1 - mu) first + mu second + length_weight x number of tokens"
    )
    second.add_argument(
        "--tune-part", default="", metavar="PART", help="tune mu and length_weight on this part, e.g. dev"
    )
    second.add_argument("--las-mu", type=float, help="mu by hand instead, 0 to 1")
    second.add_argument("--las-length-weight", type=float, help="length_weight by hand, goes with --las-mu")
    add_number(second, "--rescore-nbest", 16, "best hypotheses of each list to rescore; 0: all", 0)
    args = parser.parse_args()
    args.methods = split_list(args.decoding_method or ["greedy_search"])
    args.parts = split_list(args.test_parts or ["test-clean,test-other"])
    check_arguments(parser, args)
    return args


def add_number(group: Any, flag: str, default: Union[int, float], text: str, lowest: int = 1) -> None:
    """An option of the type of `default`: an integer from `lowest` on, or a number greater than 0."""

    kind = number(lowest if isinstance(default, int) else 0.0)
    group.add_argument(flag, type=kind, default=default, help=f"{text} (default {default})")


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with one line for options that make no sense together."""
    for flag, found in (("--decoding-method", args.methods), ("--test-parts", args.parts)):
        if not found:
            parser.error(f"{flag} names nothing")
    check_epoch(parser, args)
    if args.save_lattices and not any(m.startswith("fast_beam_search") for m in args.methods):
        parser.error("--save-lattices needs one of the fast_beam_search methods")
    by_hand = [args.las_mu, args.las_length_weight]
    if (args.tune_part or by_hand != [None, None]) and not any("las_rescore" in m for m in args.methods):
        parser.error("--tune-part, --las-mu and --las-length-weight need one of the *_las_rescore methods")
    if args.tune_part in args.parts:
        parser.error(
            f"--tune-part {args.tune_part} is also to be decoded: nothing may be tuned on what is tested; "
            "name a dev part, or leave it out of --test-parts"
        )
    if by_hand == [None, None]:
        return
    if None in by_hand or args.tune_part:
        parser.error("--las-mu and --las-length-weight are given together, and instead of --tune-part")
    if not 0 <= args.las_mu <= 1 or not math.isfinite(args.las_length_weight):
        parser.error("--las-mu must be from 0 to 1 and --las-length-weight a number")


def main() -> int:
    args = parse_arguments()
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    import torch

    from transducer_kd import build
    from transducer_kd.compress import size
    from transducer_kd.data.datamodule import load_cuts
    from transducer_kd.decode import evaluate, parts
    from transducer_kd.decode.lattice import FastBeamSearchConfig
    from transducer_kd.decode.rescore import Weights
    from transducer_kd.train import ddp
    from transducer_kd.train.experiment import git_commit

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = ddp.setup(args.device).device
    loaded = build.load_model(
        args.exp_dir, args.epoch, args.avg, args.use_averaged_model, str(device), args.lang_dir
    )
    chunk_size = args.chunk_size if args.chunk_size >= 0 else loaded.config.model.encoder.chunk_size
    size_of_mode = size.count(loaded.model, chunk_size)
    loaded = loaded.in_mode(chunk_size)
    loaded.config.data.fbank_dir = args.fbank_dir or loaded.config.data.fbank_dir
    by_hand = None if args.las_mu is None else Weights(args.las_mu, args.las_length_weight)
    options = evaluate.SearchOptions(
        chunk_size=chunk_size,
        max_sym_per_frame=args.max_sym_per_frame,
        beam_size=args.beam_size,
        fast_beam=FastBeamSearchConfig(args.beam, args.max_contexts, args.max_states),
        num_paths=args.num_paths,
        nbest_scale=args.nbest_scale,
        rescore_nbest=args.rescore_nbest,
        weights={method: by_hand for method in args.methods if by_hand},
    )
    # What cannot work should fail now, not after the first part.
    evaluate.check_methods(args.methods, loaded.model, options, device)
    for part in args.parts + ([args.tune_part] if args.tune_part else []):
        load_cuts(Path(loaded.config.data.fbank_dir), part)
    decoding = parts.Decoding(
        args.exp_dir,
        loaded,
        size_of_mode,
        build.build_data(loaded.config.data, loaded.tokenizer),
        options,
        args.max_duration,
        args.num_utts,
        args.save_lattices,
        {"commit": git_commit(), "command": shlex.join(sys.argv)},
    )
    if by_hand is None:
        decoding = decoding.with_weights(args.methods, args.tune_part, args.parts)
    print(parts.table([row for part in args.parts for row in decoding.decode(part, args.methods)]))
    return 0


if __name__ == "__main__":
    run_main(main)
