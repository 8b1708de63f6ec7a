#!/usr/bin/env python3
"""Make a smaller model of a trained phase: first weights of a student, or a supernet's streaming mode.

Selecting a student's first weights: layers, attention heads, feed-forward units.

  local/compress.py --exp-dir EXP/teacher --config egs/librispeech/progressive/conf/mini/step1.yaml \\
      --set data.lang_dir=DIR --output-dir EXP/init/step1
  local/train.py ... --set init.exp_dir=EXP/init/step1 --set init.use_averaged_model=false

The YAML's model section says what is to be left. Of the trained phase those weights are taken that its
teacher section would teach with (teacher.epoch, teacher.avg, teacher.use_averaged_model). Written are

    epoch-1.pt       a checkpoint that init.exp_dir can name. A CTC head that the trained phase has not, and
                     any LAS, are not in it and begin fresh
    selection.json   what each layer was made of, and the numbers of parameters before and after

Extracting the streaming mode of a phase that trained a supernet, as a phase of its own:

  local/compress.py --extract --exp-dir EXP/supernet --epoch 12 --avg 3 --use-averaged-model \\
      --output-dir EXP/supernet_streaming
  local/decode.py --exp-dir EXP/supernet_streaming

Without what the masks leave out it computes the same. Beside the two files above, the folder gets config.json
and meta.json like any phase; selection.json also says what the modes weigh (transducer_kd/compress/size.py).
"""

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.arguments import check_epoch, number  # noqa: E402
from transducer_kd.config import (  # noqa: E402
    DistillConfig,
    EncoderConfig,
    InitConfig,
    PruningConfig,
    load_config,
    to_dict,
)
from transducer_kd.log import UserError, run_main, setup_logging, write_json  # noqa: E402

MAX_DIFFERENCE = 1e-5  # of an encoder output of an extracted model, in float32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="the trained phase to select or extract from")
    add("--output-dir", type=Path, required=True, help="where epoch-1.pt and selection.json go")
    group = parser.add_argument_group("selecting")
    group.add_argument("--config", type=Path, help="phase YAML of the student")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting of the student, as for local/train.py; data.lang_dir is needed",
    )  # fmt: skip
    group = parser.add_argument_group("extracting")
    group.add_argument("--extract", action="store_true", help="the streaming mode of a supernet")
    epoch = "N for epoch-N.pt; 0: the last one; -1: best-valid.pt (default 0)"
    group.add_argument("--epoch", type=number(-1), default=0, help=epoch)
    group.add_argument("--avg", type=number(1), default=1, help="average over this many epochs (default 1)")
    group.add_argument(
        "--use-averaged-model", action="store_true", help="average all weights seen in those epochs"
    )
    args = parser.parse_args()
    check_epoch(parser, args)
    chosen = args.epoch != 0 or args.avg > 1 or args.use_averaged_model
    if args.extract and (args.config or args.set):
        parser.error("--extract takes the configuration of --exp-dir: leave --config and --set out")
    if not args.extract and (chosen or not args.config):
        parser.error(
            "--epoch, --avg, --use-averaged-model go with --extract; to select, set teacher.epoch and so on"
            if chosen
            else "name the student's phase YAML with --config, or pass --extract"
        )
    return args


def main() -> int:
    args = parse_arguments()
    setup_logging()
    (extract_streaming if args.extract else select_student)(args)
    return 0


def select_student(args: argparse.Namespace) -> None:
    """First weights for a phase of `args.config`."""
    config = load_config(args.config, args.set)
    # Imported late: --help and a mistyped option should answer at once.
    from transducer_kd import build
    from transducer_kd.compress import select
    from transducer_kd.train import checkpoint

    tokenizer = build.build_tokenizer(config.data)
    chosen = dataclasses.replace(config.teacher, kind="exp_dir", exp_dir=str(args.exp_dir))
    frozen, origin = build.build_teacher(chosen, tokenizer)
    teacher = frozen.module
    student = build.build_model(config, tokenizer.vocab_size)
    selections = select.choose(teacher.state_dict(), teacher.config, config.model)
    selected = select.apply(teacher.state_dict(), selections, teacher.config)
    own = student.state_dict()
    # What the student does without stays behind: the teacher's CTC head, its LAS; masks are of its own size.
    state = {
        name: value
        for name, value in selected.items()
        if name in own and not name.startswith(("las.", "masks."))
    }
    content = {
        "model": state,
        "config": to_dict(config),
        "bpe_sha256": tokenizer.sha256,
        "selected_from": origin,
    }
    checkpoint.save_checkpoint(args.output_dir / "epoch-1.pt", content)
    layers = [dataclasses.asdict(selection) for selection in selections]
    before, after = teacher.deployed_parameters(), student.deployed_parameters()
    write_json(
        args.output_dir / "selection.json",
        {"selected_from": origin, "layers": layers, "parameters": {"before": before, "after": after}},
    )
    print(table(layers, teacher.config.encoder))
    print(f"parameters deployed: {before:,} -> {after:,} ({100 * (1 - after / before):.1f} % smaller)")


def extract_streaming(args: argparse.Namespace) -> None:
    """A phase that is the streaming mode of `args.exp_dir`'s supernet."""
    from transducer_kd import build
    from transducer_kd.compress import extract, size
    from transducer_kd.train import checkpoint, experiment

    output_dir: Path = args.output_dir
    if experiment.has_checkpoints(output_dir) and not (output_dir / "selection.json").exists():
        raise UserError(f"{output_dir} holds a training, which would be lost; name another --output-dir")
    loaded = build.load_model(args.exp_dir, args.epoch, args.avg, args.use_averaged_model)
    if loaded.config.model.pruned_groups == "none":
        raise UserError(
            f"{args.exp_dir} has no masks (model.pruned_groups=none), so there is nothing to extract; name a "
            "phase that trained a supernet"
        )
    supernet, masks = loaded.model, loaded.model.masks
    model_config, state = extract.extract(supernet)
    config = dataclasses.replace(
        loaded.config,
        phase=output_dir.resolve().name,
        objective="transducer",  # one mode is left
        compare_with=[args.exp_dir.resolve().name],
        init=InitConfig(str(args.exp_dir), args.epoch, args.avg, args.use_averaged_model),
        model=model_config,
        distill=DistillConfig(),
        pruning=PruningConfig(),
    )
    student = build.build_model(config, loaded.tokenizer.vocab_size)
    student.load_state_dict(state)
    difference = extract.largest_difference(supernet, student.eval())
    if difference > MAX_DIFFERENCE:
        raise UserError(
            f"what was extracted of {args.exp_dir} differs by {difference:.1e} from its streaming mode, "
            f"where {MAX_DIFFERENCE:.0e} is allowed: this is a mistake of the program, so nothing is written"
        )
    if masks.sparsity() == 0:
        logging.warning("%s has masks, but they leave nothing out: nothing gets smaller", args.exp_dir)
    origin = build.origin_of(str(args.exp_dir), loaded.checkpoint, supernet.state_dict())
    own = {**build.origin_of(str(output_dir), "epoch-1", state), "selected_from": origin}
    total = sum(p.numel() for p in student.parameters())
    before, after = supernet.deployed_parameters(), student.deployed_parameters()
    layers = extract.kept_groups(masks)
    sizes = {"offline": size.count(supernet, 0), "streaming": size.count(supernet)}
    selection = {
        "selected_from": origin,
        "layers": layers,
        "parameters": {"before": before, "after": after},
        "largest_difference": difference,
        "sizes": {mode: dataclasses.asdict(found) for mode, found in sizes.items()},
    }
    parameters = {"deployed": after, "total": total}
    sha256 = loaded.tokenizer.sha256
    meta = {"bpe_sha256": sha256, "parameters": parameters, "origins": {"init": own}}
    content = {"model": state, "config": to_dict(config), "bpe_sha256": sha256, "selected_from": origin}
    write_json(output_dir / "selection.json", selection)
    write_json(output_dir / "config.json", to_dict(config))
    experiment.write_meta(output_dir, meta)
    checkpoint.save_checkpoint(output_dir / "epoch-1.pt", content)  # last: with it the phase is whole
    print(block_table(layers, masks) if masks.has_blocks else table(layers, supernet.config.encoder))
    rows = [("mode", *selection["sizes"]["streaming"])]
    rows += [(mode, *(f"{n:,}" for n in found.values())) for mode, found in selection["sizes"].items()]
    print(aligned(rows))
    print(f"largest difference of an encoder output from the supernet's: {difference:.1e}")


def block_table(layers: List[Dict[str, int]], masks: Any) -> str:
    """Share of the blocks of each layer's matrices that is kept."""
    rows = [("layer", *masks.kept())]
    for layer in layers:
        shares = (layer[name] / mask[0].numel() for name, mask in masks.kept().items())
        rows.append((str(layer["layer"]), *(f"{100 * share:.0f} %" for share in shares)))
    return aligned(rows)


def table(layers: List[Dict[str, Any]], teacher: EncoderConfig) -> str:
    """What each layer is made of: the teacher's layer and heads by number, units of ff1 and ff2 counted."""
    rows = [("layer", "from layer", "heads", "units of ff1", "units of ff2")]
    for position, layer in enumerate(layers):
        heads = " ".join(map(str, layer["heads"])) + f" of {teacher.num_heads}"
        units = [f"{len(layer[name])} of {teacher.feedforward_dim}" for name in ("ff1", "ff2")]
        rows.append((str(position), f"{layer['layer']} of {teacher.num_layers}", heads, *units))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


if __name__ == "__main__":
    run_main(main)
