#!/usr/bin/env python3
"""Select a smaller student's first weights from a trained phase: layers, attention heads, feed-forward units.

  local/compress.py --exp-dir EXP/teacher --config egs/librispeech/progressive/conf/mini/step1.yaml \\
      --set data.lang_dir=DIR --output-dir EXP/init/step1
  local/train.py ... --set init.exp_dir=EXP/init/step1 --set init.use_averaged_model=false

The YAML's model section says what is to be left. Of the trained phase those weights are taken that its
teacher section would teach with (teacher.epoch, teacher.avg, teacher.use_averaged_model). Written are

    epoch-1.pt       a checkpoint that init.exp_dir can name. A CTC head that the trained phase has not, and
                     any LAS, are not in it and begin fresh
    selection.json   what each layer was made of, and the numbers of parameters before and after
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any, Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.config import EncoderConfig, load_config, to_dict  # noqa: E402
from transducer_kd.log import run_main, setup_logging, write_json  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--exp-dir", type=Path, required=True, help="the trained phase to select from")
    add("--config", type=Path, required=True, help="phase YAML of the student")
    add("--output-dir", type=Path, required=True, help="where epoch-1.pt and selection.json go")
    add(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override a setting of the student, as for local/train.py; data.lang_dir is needed",
    )  # fmt: skip
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    setup_logging()
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
    # What the student does without stays behind: the teacher's CTC head, its LAS.
    state = {name: value for name, value in selected.items() if name in own and not name.startswith("las.")}
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
    return 0


def table(layers: List[Dict[str, Any]], teacher: EncoderConfig) -> str:
    """What each layer is made of: the teacher's layer and heads by number, units of ff1 and ff2 counted."""
    rows = [("layer", "from layer", "heads", "units of ff1", "units of ff2")]
    for number, layer in enumerate(layers):
        heads = " ".join(map(str, layer["heads"])) + f" of {teacher.num_heads}"
        units = [f"{len(layer[name])} of {teacher.feedforward_dim}" for name in ("ff1", "ff2")]
        rows.append((str(number), f"{layer['layer']} of {teacher.num_layers}", heads, *units))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


if __name__ == "__main__":
    run_main(main)
