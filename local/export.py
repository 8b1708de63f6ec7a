#!/usr/bin/env python3
"""Export a trained phase for a device: ONNX files for sherpa-onnx, float and int8, and the gate they pass.

  local/export.py --exp-dir DIR --use-averaged-model --test-parts test-clean,test-other --dev-part dev

Writes the model folder <exp-dir>/export/: encoders that stream and that hear whole utterances, decoder,
joiner and, where the phase has one, the LAS, each as float and as int8; tokens.txt, bpe.model,
model.safetensors, a model card and model.json. What becomes int8, and how the scores of a LAS join those of
the beam search, is chosen on the dev part.

Then the gate: PyTorch on whole utterances and chunk by chunk, sherpa-onnx with the float files and with the
int8 files have to agree: tensor by tensor, on the utterances of the test parts (float: on 99.5 % of them;
int8: a WER at most 0.3 worse), and on odd inputs, those made of dev recordings and those made of the first
test part, of which int8 may understand one in ten differently, and half of a kind. What was found is printed
and kept in gate.json.

An earlier export stays as it is until the new one, written beside it, has passed its gate and takes its place
(with --skip-gate: is written). One that does not pass is kept in <exp-dir>/export.failed, to be looked at,
until another one fails or passes; the exit status is 1. What a killed export leaves, .export.new and
.export.old in <exp-dir>, the next one clears away; where there is no export, it brings the old one back.

run.sh does this as stage 7, which replaces what was exported into <exp-dir>/export by hand. For a folder that
stays as it is, name another --output-dir.

A model of two modes gets its own of each; one that only streams hears whole utterances with its chunks.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.arguments import check_epoch, number, split_list  # noqa: E402
from transducer_kd.log import UserError, run_main, setup_logging, write_json  # noqa: E402

RESCORE = "modified_beam_search_las_rescore"  # what a device can do: there is no k2
ODD_INPUTS = 4  # of each kind, from the dev part and from the first test part
MAX_DURATION_S = 200.0  # audio in a batch that the second pass is tuned on


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="experiment folder of the phase, with epoch-N.pt")
    add("--epoch", type=number(-1), default=0, help="N for epoch-N.pt; 0: the last one; -1: best-valid.pt")
    add("--avg", type=number(1), default=1, help="average over this many epochs, ending at --epoch")
    add("--use-averaged-model", action="store_true", help="average all weights seen in those epochs")
    add("--output-dir", type=Path, help="the model folder (default: <exp-dir>/export)")
    add("--test-parts", action="append", metavar="PART[,PART...]", help="default: test-clean,test-other")
    add("--dev-part", default="dev", metavar="PART", help="what to choose on (default: %(default)s)")
    add(
        "--num-dev",
        type=number(1),
        default=250,
        help="so many of its utterances try int8 (default %(default)s)",
    )
    add("--beam-size", type=number(1), default=16, help="hypotheses of two passes (default %(default)s)")
    add("--skip-gate", action="store_true", help="only write the folder")
    add("--fbank-dir", default="", help="folder with cuts_<part>.jsonl.gz (default: as in training)")
    add("--lang-dir", default="", help="folder with bpe.model (default: as in training)")
    args = parser.parse_args()
    check_epoch(parser, args)
    args.parts = split_list(args.test_parts or ["test-clean,test-other"])
    if not args.parts:
        parser.error("--test-parts names nothing")
    if args.dev_part in args.parts:
        parser.error(
            f"--dev-part {args.dev_part} is also to be tested: nothing may be chosen on what is tested; name "
            "another part, or leave it out of --test-parts"
        )
    args.output_dir = args.output_dir or args.exp_dir / "export"
    return args


def main() -> int:
    args = parse_arguments()
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    import torch

    from transducer_kd import build
    from transducer_kd.data.features import FeatureExtractor
    from transducer_kd.export import implementations, parity
    from transducer_kd.export.card import write_card
    from transducer_kd.export.dev_speech import MOST_TRIED, DevSpeech, steady_inputs
    from transducer_kd.export.quantise import quantise
    from transducer_kd.export.tensors import check_tensors
    from transducer_kd.export.write import check_target, new_beside, put_in_place, set_aside, write_folder
    from transducer_kd.train.experiment import git_commit

    check_target(args.output_dir)
    # One utterance at a time has no work for more, and where anything else is on the cores they wait for each
    # other, twenty times as long.
    torch.set_num_threads(1)
    loaded = build.load_model(
        args.exp_dir, args.epoch, args.avg, args.use_averaged_model, lang_dir=args.lang_dir
    )
    data = loaded.config.data
    data.fbank_dir = args.fbank_dir or data.fbank_dir
    if args.dev_part in data.train_parts:
        raise UserError(
            f"--dev-part {args.dev_part}: {args.exp_dir} was trained on it and makes fewer errors there than "
            "elsewhere; name a dev part"
        )
    speech = {part: recordings_of(loaded.config, part) for part in args.parts}
    dev = list(recordings_of(loaded.config, args.dev_part, args.num_dev)())
    run = {"commit": git_commit(), "command": shlex.join(sys.argv)}
    modes = modes_of(loaded)
    main_mode = modes.get("streaming", modes["offline"])
    rescore = tune(main_mode, args) if loaded.model.las is not None else None
    folder, parts = write_folder(
        new_beside(args.output_dir),
        main_mode.model,
        modes["offline"].model,
        loaded.model.state_dict(),
        loaded.tokenizer.path.parent,
        {**about(loaded), **run},
        rescore,
    )
    models = implementations.TorchModels(
        {mode: own.model for mode, own in modes.items()},
        FeatureExtractor("lhotse").extract,
        lambda tokens: loaded.tokenizer.decode(tokens).split(),
    )
    odd = steady_inputs(folder, models, dev, ODD_INPUTS)
    folder = quantise(folder, parts, DevSpeech(folder, models, dev, odd).loss)
    gate = None
    if not args.skip_gate:
        tensors = check_tensors(folder, parts, main_mode.model)
        heard = recordings_of(loaded.config, args.parts[0], MOST_TRIED)()
        unseen = steady_inputs(folder, models, list(heard), ODD_INPUTS)
        gate = parity.check(implementations.comparisons(folder, models), tensors, speech, odd, unseen, run)
        write_json(folder.path / "gate.json", gate)
        print(parity.table(gate))
    write_card(folder, gate)
    if gate is not None and not gate["passed"]:
        failed = set_aside(folder.path, args.output_dir)
        logging.error("the gate is not passed: look at %s; %s is as it was", failed, args.output_dir)
        return 1
    if args.output_dir.resolve() == (args.exp_dir / "export").resolve():
        # run.sh's mark: this one was made with other options, perhaps without its gate.
        (args.exp_dir / ".done-export").unlink(missing_ok=True)
    put_in_place(folder.path, args.output_dir)
    return 0


def about(loaded: Any) -> Dict[str, Any]:
    """Where a phase is from, for its model.json."""
    config = loaded.config
    return {
        **{name: getattr(config, name) for name in ("recipe", "corpus", "scale", "phase")},
        "join_prob": config.data.join_prob,
        "checkpoint": loaded.checkpoint,
        "bpe_sha256": loaded.tokenizer.sha256,
    }


def modes_of(loaded: Any) -> Dict[str, Any]:
    """Mode -> the phase in that mode alone, as a device runs it."""
    chunk_size = loaded.config.model.encoder.chunk_size
    if not chunk_size:
        return {"offline": loaded.in_mode(0)}
    streaming = loaded.in_mode(chunk_size)
    has_both = loaded.config.objective == "dual_mode"
    return {"streaming": streaming, "offline": loaded.in_mode(0) if has_both else streaming}


def recordings_of(config: Any, part: str, num: int = 0) -> Callable[[], Iterator[Any]]:
    """Function: the recordings of a part, one after the other; num: so many, from all over it; 0: all.

    UserError where the part is not there, or empty.
    """
    from transducer_kd.data.datamodule import load_cuts
    from transducer_kd.data.dataset import cut_text, load_audio
    from transducer_kd.export.parity import Recording

    cuts = load_cuts(Path(config.data.fbank_dir), part)
    if not cuts:
        raise UserError(f"part {part} has no utterance; name another one")
    if 0 < num < len(cuts):
        cuts = [cuts[i * len(cuts) // num] for i in range(num)]
    return lambda: (Recording(cut.id, load_audio(cut), cut_text(cut).split()) for cut in cuts)


def tune(loaded: Any, args: argparse.Namespace) -> Dict[str, Any]:
    """How two passes join on a device, in the mode that it is to use most, tuned on the dev part."""
    import torch

    from transducer_kd import build
    from transducer_kd.decode import evaluate, rescore

    options = evaluate.SearchOptions(loaded.config.model.encoder.chunk_size, beam_size=args.beam_size)
    data = build.build_data(loaded.config.data, loaded.tokenizer)
    decoder = evaluate.PartDecoder(
        loaded.model,
        loaded.tokenizer,
        lambda: data.test_batches(args.dev_part, MAX_DURATION_S),
        options,
        torch.device("cpu"),
    )
    settings = options.of_nbest(RESCORE)
    found = rescore.tune(
        decoder.scored_nbests(RESCORE),
        decoder.words,
        part=args.dev_part,
        method=RESCORE,
        checkpoint=loaded.checkpoint,
        settings=settings,
    )
    logging.info("%s", found.line())
    return {
        "method": RESCORE,
        "mu": found.mu,
        "length_weight": found.length_weight,
        "tuned_on": found.part,
        **settings,
    }


if __name__ == "__main__":
    run_main(main)
