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
"""

import argparse
import dataclasses
import logging
import math
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.log import run_main, setup_logging  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="experiment folder of the phase, with epoch-N.pt")
    add("--epoch", type=int, default=0, help="N for epoch-N.pt; 0 (default): the last one; -1: best-valid.pt")
    add("--avg", type=int, default=1, help="average over this many epochs, ending at --epoch")
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
    add("--max-duration", type=float, default=200.0, help="audio seconds in a batch")
    add(
        "--num-utts",
        type=int,
        default=0,
        help="decode only about the first N utterances of a part; no record or rescore.json is written",
    )
    add(
        "--fbank-dir",
        default="",
        help="folder with cuts_<part>.jsonl.gz (default: the one the phase was trained with)",
    )
    add("--lang-dir", default="", help="folder with bpe.model (default: the one the phase was trained with)")
    add("--device", default="auto", help="auto (the GPU where there is one), cpu, cuda or cuda:N")
    add("--num-threads", type=int, default=0, help="CPU threads of one operation; 0: torch's choice")
    search = parser.add_argument_group("search")
    search.add_argument(
        "--chunk-size", type=int, default=-1, help="encoder frames of 40 ms; 0: full context; -1: as trained"
    )
    search.add_argument(
        "--max-sym-per-frame", type=int, default=1, help="greedy_search, streaming_greedy_search"
    )
    search.add_argument("--beam-size", type=int, default=4, help="modified_beam_search: hypotheses kept")
    search.add_argument(
        "--beam", type=float, default=20.0, help="fast_beam_search*: log-probability below the best"
    )
    search.add_argument(
        "--max-contexts", type=int, default=8, help="fast_beam_search*: contexts kept per frame"
    )
    search.add_argument("--max-states", type=int, default=64, help="fast_beam_search*: states kept per frame")
    search.add_argument(
        "--num-paths", type=int, default=200, help="fast_beam_search_nbest*: paths drawn from a lattice"
    )
    search.add_argument(
        "--nbest-scale", type=float, default=0.5, help="... with log-probabilities scaled by this"
    )
    search.add_argument(
        "--save-lattices", type=Path, metavar="DIR", help="fast_beam_search*: keep them, in DIR/<part>/"
    )
    add_second_pass_options(parser)
    args = parser.parse_args()
    args.methods = split_list(args.decoding_method or ["greedy_search"])
    args.parts = split_list(args.test_parts or ["test-clean,test-other"])
    check_arguments(parser, args)
    return args


def add_second_pass_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "second pass (*_las_rescore)", "score = (1 - mu) first + mu second + length_weight x number of tokens"
    )
    group.add_argument(
        "--tune-part", default="", metavar="PART", help="tune mu and length_weight on this part, e.g. dev"
    )
    group.add_argument("--las-mu", type=float, help="mu by hand instead, 0 to 1")
    group.add_argument("--las-length-weight", type=float, help="length_weight by hand, goes with --las-mu")
    group.add_argument(
        "--rescore-nbest", type=int, default=16, help="best hypotheses of each list to rescore; 0: all"
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program with one line for an option that makes no sense."""

    def option(name: str) -> str:
        return "--" + name.replace("_", "-")

    positive = (
        "max_duration max_sym_per_frame beam_size beam max_contexts max_states num_paths nbest_scale avg"
    )
    for name in positive.split():
        if not getattr(args, name) > 0:
            parser.error(f"{option(name)} must be greater than 0")
    for name, lowest in (
        ("num_threads", 0),
        ("num_utts", 0),
        ("rescore_nbest", 0),
        ("epoch", -1),
        ("chunk_size", -1),
    ):
        if getattr(args, name) < lowest:
            parser.error(f"{option(name)} must be {lowest} or more, not {getattr(args, name)}")
    for name, found in (("decoding_method", args.methods), ("test_parts", args.parts)):
        if not found:
            parser.error(f"{option(name)} {shlex.quote(','.join(getattr(args, name)))} names nothing")
    if args.epoch == -1 and (args.avg > 1 or args.use_averaged_model):
        parser.error(
            "--epoch -1 is best-valid.pt, which has no average: leave --avg, --use-averaged-model out"
        )
    if args.save_lattices and not any(m.startswith("fast_beam_search") for m in args.methods):
        parser.error("--save-lattices needs one of the fast_beam_search methods")
    check_second_pass(parser, args)


def check_second_pass(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
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


Row = Tuple[str, Any, Any]  # part, MethodResult, WerReport


def split_list(items: List[str]) -> List[str]:
    """["a,b", "c"] -> [a, b, c], each once."""
    return list(dict.fromkeys(name.strip() for item in items for name in item.split(",") if name.strip()))


def first_utterances(batches: Iterator, count: int) -> Iterator:
    """Batches until they hold `count` utterances; all of them where count is 0."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch.cut_ids)
        if 0 < count <= seen:
            return


def main() -> int:
    args = parse_arguments()
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    import torch

    from transducer_kd import build
    from transducer_kd.data.datamodule import load_cuts
    from transducer_kd.decode import evaluate
    from transducer_kd.decode.lattice import FastBeamSearchConfig
    from transducer_kd.train import ddp

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = ddp.setup(args.device).device
    loaded = build.load_model(
        args.exp_dir, args.epoch, args.avg, args.use_averaged_model, str(device), args.lang_dir
    )
    loaded.config.data.fbank_dir = args.fbank_dir or loaded.config.data.fbank_dir
    options = evaluate.SearchOptions(
        chunk_size=args.chunk_size if args.chunk_size >= 0 else loaded.config.model.encoder.chunk_size,
        max_sym_per_frame=args.max_sym_per_frame,
        beam_size=args.beam_size,
        fast_beam=FastBeamSearchConfig(args.beam, args.max_contexts, args.max_states),
        num_paths=args.num_paths,
        nbest_scale=args.nbest_scale,
        rescore_nbest=args.rescore_nbest,
    )
    # What cannot work should fail now, not after the first part.
    evaluate.check_methods(args.methods, loaded.model, options, device)
    for part in args.parts + ([args.tune_part] if args.tune_part else []):
        load_cuts(Path(loaded.config.data.fbank_dir), part)
    data = build.build_data(loaded.config.data, loaded.tokenizer)
    options = with_weights(args, loaded, data, options)
    rows = [row for part in args.parts for row in decode_part(args, loaded, data, options, part)]
    print(table(rows))
    return 0


def with_weights(args: argparse.Namespace, loaded: Any, data: Any, options: Any) -> Any:
    """`options` with the weights of the *_las_rescore methods: given by hand, tuned now, or tuned earlier."""
    from transducer_kd.decode import evaluate, rescore

    methods = [method for method in args.methods if evaluate.is_rescore(method)]
    if args.las_mu is not None:
        by_hand = rescore.Weights(args.las_mu, args.las_length_weight)
        return dataclasses.replace(options, weights={method: by_hand for method in methods})
    path, tunings = args.exp_dir / "rescore.json", []
    decoder = part_decoder(args, loaded, data, options, args.tune_part)
    for method in methods:
        settings = {"chunk_size": options.chunk_size, **options.of_nbest(method)}
        about = {"method": method, "checkpoint": loaded.checkpoint, "settings": settings}
        if args.tune_part:
            scored = decoder.scored_nbests(method)
            tunings.append(rescore.tune(scored, decoder.words, part=args.tune_part, **about))
        else:
            tunings.append(rescore.load_tuning(path, test_parts=args.parts, **about))
        logging.info("%s", tunings[-1].line())
    if args.tune_part and not args.num_utts:
        rescore.save_tunings(path, tunings)
    return dataclasses.replace(options, weights={tuning.method: tuning.weights() for tuning in tunings})


def decode_part(args: argparse.Namespace, loaded: Any, data: Any, options: Any, part: str) -> List[Row]:
    """Decode one part with all methods; files and records are written as the methods finish."""
    from transducer_kd.decode import records, wer

    logging.info("decoding %s with %s", part, loaded.checkpoint)
    lattice_dir = args.save_lattices / part if args.save_lattices else None
    decoder = part_decoder(args, loaded, data, options, part, lattice_dir)
    rows = []
    for result in decoder.decode(args.methods):
        suffix = f"{loaded.checkpoint}-{options.suffix(result.method)}"
        if args.num_utts:
            suffix += f"-first-{len(result.utterances)}"
        report = wer.write_results(
            args.exp_dir / result.method, part, suffix, result.utterances, result.method
        )
        logging.info("[%s-%s] %s, %.1f s", part, result.method, report.line(), result.decode_s)
        if not report.ref_words:
            logging.warning("%s has no reference words: nothing to score, so no record", part)
        elif not args.num_utts:
            recogs = f"{result.method}/recogs-{part}-{suffix}.txt"
            record = records.Record(
                **described(loaded, options, result.method),
                **found(part, options, result, report),
                recogs=recogs,
            )
            records.append_record(args.exp_dir / "metrics.json", record)
        rows.append((part, result, report))
    return rows


def part_decoder(
    args: argparse.Namespace,
    loaded: Any,
    data: Any,
    options: Any,
    part: str,
    lattice_dir: Optional[Path] = None,
) -> Any:
    from transducer_kd.decode.evaluate import PartDecoder

    def batches() -> Iterator[Any]:
        return first_utterances(data.test_batches(part, args.max_duration), args.num_utts)

    device = next(loaded.model.parameters()).device
    return PartDecoder(loaded.model, loaded.tokenizer, batches, options, device, lattice_dir)


def described(loaded: Any, options: Any, method: str) -> Dict[str, Any]:
    """The fields of a record that name the model and this program's run."""
    import torch

    from transducer_kd.decode.evaluate import is_rescore
    from transducer_kd.train.experiment import git_commit

    config, model = loaded.config, loaded.model
    parameters = model.deployed_parameters() if is_rescore(method) else model.first_pass_parameters()
    return {
        **{name: getattr(config, name) for name in ("recipe", "corpus", "scale", "phase")},
        "mode": "streaming" if options.chunk_size else "offline",
        "chunk_size": options.chunk_size,
        "left_context": config.model.encoder.left_context,
        "checkpoint": loaded.checkpoint,
        "params_deployed": parameters,
        "bytes": 4 * parameters,
        "device": str(next(model.parameters()).device),
        "num_threads": torch.get_num_threads(),
        "commit": git_commit(),
        "command": shlex.join(sys.argv),
    }


def found(part: str, options: Any, result: Any, report: Any) -> Dict[str, Any]:
    """The fields of a record that hold the result."""
    scores = ("wer", "wer_low", "wer_high", "errors", "insertions", "deletions", "substitutions", "ref_words")
    return {
        "test_set": part,
        "num_utts": len(result.utterances),
        "method": result.method,
        "parameters": options.of(result.method),
        **{name: getattr(report, name) for name in scores},
        "audio_s": round(result.audio_s, 2),
        "decode_s": round(result.decode_s, 3),
        "second_pass_s": None if result.second_pass_s is None else round(result.second_pass_s, 3),
    }


def table(rows: List[Row]) -> str:
    """The results for the terminal: a line for each part and method.

    "2nd/1st": time of the second pass as a share of the first pass's, encoder included.
    """
    width = max(len(part) for part, _, _ in rows)
    lines = [
        f"{'part':{width}}  {'method':34}    WER %   95% interval  errors  words  decoded in  x real time  "
        "2nd/1st"
    ]
    for part, result, report in rows:
        speed = result.audio_s / max(result.decode_s, 1e-9)
        interval = f"{report.wer_low:.2f} to {report.wer_high:.2f}"
        share = "-"
        if result.second_pass_s is not None:
            share = f"{100 * result.second_pass_s / max(result.decode_s - result.second_pass_s, 1e-9):.1f} %"
        lines.append(
            f"{part:{width}}  {result.method:34}  {report.wer:7.2f}  {interval:>13}  {report.errors:6d}  "
            f"{report.ref_words:5d}  {result.decode_s:8.1f} s  {speed:11.0f}  {share:>7}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
