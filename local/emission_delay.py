#!/usr/bin/env python3
"""Measure how much later than a reference model trained phases emit the tokens of test parts.

  local/emission_delay.py --exp-dir DIR [DIR ...] --reference-exp-dir DIR --use-averaged-model \\
      --test-parts test-clean,test-other

Writes <exp-dir>/delay.json of each phase: of each part the mean delay in encoder frames of 40 ms with its
95 % bootstrap interval, and the median. Both models get the same cuts and align their reference texts; each
runs in the mode it was trained in, an offline one with full context, one of two modes in streaming mode, a
supernet with its masks. See transducer_kd/decode/alignment.py.
"""

import argparse
import dataclasses
import logging
import shlex
import sys
from pathlib import Path
from typing import Any, Dict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.arguments import split_list  # noqa: E402
from transducer_kd.log import UserError, progress, run_main, setup_logging, write_json  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--exp-dir",
        type=Path,
        nargs="+",
        required=True,
        help="experiment folders of the phases, with epoch-N.pt",
    )
    add("--reference-exp-dir", type=Path, required=True, help="that of the model to compare with")
    add("--epoch", type=int, default=0, help="of the phase: N for epoch-N.pt; 0: the last; -1: best-valid.pt")
    add("--reference-epoch", type=int, default=0, help="the same of the reference model")
    add("--avg", type=int, default=1, help="average over this many epochs, ending there; both models")
    add(
        "--use-averaged-model",
        action="store_true",
        help="average all weights seen in those epochs, not only their ends; both models",
    )
    add(
        "--test-parts", default="test-clean,test-other", metavar="PART[,PART...]", help="default: %(default)s"
    )
    add("--max-duration", type=float, default=200.0, help="audio seconds in a batch (default 200)")
    add("--fbank-dir", default="", help="folder with cuts_<part>.jsonl.gz (default: as the phase's training)")
    add("--lang-dir", default="", help="folder with bpe.model (default: as in training)")
    add("--device", default="auto", help="auto (the GPU where there is one), cpu, cuda or cuda:N")
    add("--num-threads", type=int, default=0, help="CPU threads of one operation; 0: torch's choice")
    args = parser.parse_args()
    args.parts = split_list([args.test_parts])
    if not args.parts:
        parser.error("--test-parts names nothing")
    if not args.max_duration > 0 or args.num_threads < 0:
        parser.error("--max-duration must be greater than 0 and --num-threads not negative")
    return args


def main() -> int:
    args = parse_arguments()
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    import torch

    from transducer_kd import build
    from transducer_kd.train import ddp
    from transducer_kd.train.experiment import git_commit

    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    device = str(ddp.setup(args.device).device)
    of_both = {"avg": args.avg, "use_averaged_model": args.use_averaged_model, "device": device}
    reference = build.load_model(
        args.reference_exp_dir, args.reference_epoch, lang_dir=args.lang_dir, **of_both
    )
    origin = build.origin_of("", reference.checkpoint, reference.model.state_dict())
    name = args.reference_exp_dir.resolve().name
    about = {
        "reference": {"phase": name, "checkpoint": reference.checkpoint, "sha256": origin["sha256"]},
        "commit": git_commit(),
        "command": shlex.join(sys.argv),
    }
    for exp_dir in args.exp_dir:
        loaded = build.load_model(exp_dir, args.epoch, lang_dir=args.lang_dir, **of_both)
        write_json(exp_dir / "delay.json", {**about, **delays_of(exp_dir, loaded, reference, args)})
    return 0


def delays_of(exp_dir: Path, loaded: Any, reference: Any, args: argparse.Namespace) -> Dict[str, Any]:
    """What delay.json says of the phase itself."""
    from transducer_kd import build
    from transducer_kd.data.datamodule import load_cuts
    from transducer_kd.decode import alignment

    if reference.tokenizer.sha256 != loaded.tokenizer.sha256:
        raise UserError(
            f"{exp_dir} has the BPE model {loaded.tokenizer.path} and {args.reference_exp_dir} another, "
            f"{reference.tokenizer.path}; delays need the same tokens: name another --reference-exp-dir"
        )
    data_config = loaded.config.data
    data_config.fbank_dir = args.fbank_dir or data_config.fbank_dir
    for part in args.parts:  # what cannot work should fail now, not after the first part
        load_cuts(Path(data_config.fbank_dir), part)
    data = build.build_data(data_config, loaded.tokenizer)
    found = {}
    for part in args.parts:
        batches = progress(data.test_batches(part, args.max_duration), desc=f"delays of {part}")
        found[part] = alignment.measure_delay(loaded.model, reference.model, batches, part)
        logging.info("%s, %s: %s", exp_dir.name, part, found[part].line())
    return {
        "checkpoint": loaded.checkpoint,
        "mode": "streaming" if loaded.config.model.encoder.chunk_size else "offline",
        "frame_ms": alignment.FRAME_MS,
        "parts": {part: dataclasses.asdict(delay) for part, delay in found.items()},
    }


if __name__ == "__main__":
    run_main(main)
