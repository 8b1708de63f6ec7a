#!/usr/bin/env python3
r"""Measure model folders in sherpa-onnx on one thread: speed, latency, memory, size.

The first is what the others are compared with:

  local/bench_export.py --export-dir EXP/teacher/export EXP/student/export --test-parts test-clean,test-other

Every folder is measured as float and as int8, all of them in one run in which they take turns, on speech of
the test parts, utterance by utterance. One that can stream does, in pieces of 0.1 s. Real-time factor (RTF):
processor seconds for a second of audio. It is given with and without the features, which cost the same for
every model. Latency of a chunk: processor time from the arrival of its last sample to its words. Memory is
that of a process of its own, which streams for --stream-s seconds and begins anew at the pauses between
utterances; it and the latency, in the first and in the last minute, show whether they grow.

Models of other recipes can be measured in the same run, so that their figures compare:

  local/bench_export.py --export-dir EXP/teacher/export EXP/student/export \
      --beside OTHER/phase/export --beside-json EXP/beside.json

They are named RECIPE/PHASE, as their model.json has it. One that is damaged, or has not passed its gate, is
left out with a warning.

Prints a table, and writes bench.json into each folder of --export-dir. What is measured of the --beside
folders goes to --beside-json.
"""

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any, Dict, List, Sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transducer_kd.arguments import number, split_list  # noqa: E402
from transducer_kd.log import UserError, read_json, run_main, setup_logging, write_json  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--export-dir", type=Path, nargs="+", required=True, help="model folders, the reference first")
    add("--beside", type=Path, nargs="+", default=[], metavar="DIR", help="model folders of other recipes")
    add("--beside-json", type=Path, metavar="FILE", help="where their figures go; needed with --beside")
    add("--test-parts", action="append", metavar="PART[,PART...]", help="default: test-clean,test-other")
    add("--fbank-dir", type=Path, help="folder with cuts_<part>.jsonl.gz (default: as the first was trained)")
    add("--audio-s", type=number(1), default=60, help="audio of a turn (default %(default)s)")
    add("--turns", type=number(1), default=25, help="turns of every model (default %(default)s)")
    add(
        "--stream-s", type=number(120), default=300, help="audio of a stream for memory (default %(default)s)"
    )
    add("--streams", type=number(1), default=3, help="such streams of every model (default %(default)s)")
    args = parser.parse_args()
    args.parts = split_list(args.test_parts or ["test-clean,test-other"])
    if not args.parts:
        parser.error("--test-parts names nothing")
    if bool(args.beside) != bool(args.beside_json):
        parser.error("--beside and --beside-json go together")
    return args


def main() -> int:
    args = parse_arguments()
    setup_logging()
    # Imported late: --help and a mistyped option should answer at once.
    from transducer_kd.export import bench
    from transducer_kd.export.folder import open_folder
    from transducer_kd.train.experiment import git_commit

    own: Dict[str, Any] = {}
    for path in args.export_dir:
        name = phase_of(path)
        if name in own:
            raise UserError(f"{own[name].path} and {path} are both of a phase {name}; name one of them")
        own[name] = open_folder(path)
    others = open_beside(args.beside)
    samples = speech(args.fbank_dir or trained_on(args.export_dir[0]), args.parts, args.stream_s)
    amounts = bench.Amounts(args.audio_s, args.turns, args.stream_s, args.streams)
    rows = bench.measure({**own, **others}, samples, amounts)
    about = {
        "reference": f"{rows[0].phase} {rows[0].precision}",
        "num_threads": 1,
        "runtime": bench.RUNTIME,
        "turns": args.turns,
        "audio_s": args.audio_s,
        "stream_s": args.stream_s,
        "commit": git_commit(),
        "command": shlex.join(sys.argv),
    }

    def measured(name: str, folder: Any) -> Dict[str, Any]:
        return {"checkpoint": folder.info["checkpoint"], "rows": bench.as_json(rows, name)}

    for name, folder in own.items():
        write_json(folder.path / "bench.json", {**about, **measured(name, folder)})
    if args.beside_json:
        # From where the file is, so that both may be moved together.
        base = args.beside_json.resolve().parent
        models = [
            {
                "name": name,
                "folder": os.path.relpath(folder.path.resolve(), base),
                "files": folder.info["files"],
                **measured(name, folder),
            }
            for name, folder in others.items()
        ]
        write_json(args.beside_json, {**about, "models": models})
    print(bench.table(rows))
    return 0


def open_beside(paths: Sequence[Path]) -> Dict[str, Any]:
    """{RECIPE/PHASE: model folder} of those that can be measured; a warning for each other one, because it is
    another recipe's and no reason not to measure these.
    """
    from transducer_kd.export.folder import open_folder

    found: Dict[str, Any] = {}
    for path in paths:
        try:
            folder = open_folder(path)
            if not has_passed(path / "gate.json"):
                raise UserError("it has not passed its gate (gate.json)")
            name = f"{folder.info.get('recipe')}/{folder.info['phase']}"
            if name in found:
                raise UserError(f"{found[name].path} is of {name}, too")
        except UserError as error:
            logging.warning("%s is not measured beside these: %s", path, error)
        else:
            found[name] = folder
    return found


def has_passed(gate: Path) -> bool:
    """Whether a gate was run and passed."""
    found = read_json(gate) if gate.is_file() else None
    return isinstance(found, dict) and found.get("passed") is True


def phase_of(export_dir: Path) -> str:
    """The phase of <phase>/export; a folder that was copied elsewhere has its own name."""
    path = export_dir.resolve()
    return path.parent.name if path.name == "export" else path.name


def trained_on(export_dir: Path) -> Path:
    """The folder of features that a phase was trained with. UserError where the phase is not there."""
    config = export_dir.resolve().parent / "config.json"
    if not config.is_file():
        raise UserError(
            f"{config} does not exist, so it is not known what {export_dir} was trained on: name a folder of "
            "features with --fbank-dir"
        )
    return Path(read_json(config)["data"]["fbank_dir"])


def speech(fbank_dir: Path, parts: List[str], seconds: float) -> List[Any]:
    """Utterances of the parts, samples (S,) of each, as many as `seconds` need."""
    from transducer_kd.data.datamodule import load_cuts
    from transducer_kd.data.dataset import load_audio

    found: List[Any] = []
    found_s = 0.0
    for part in parts:
        for cut in load_cuts(fbank_dir, part):
            if found_s >= seconds:
                break
            found.append(load_audio(cut))
            found_s += cut.duration
    if not found:
        raise UserError(f"no utterance in {', '.join(parts)} of {fbank_dir}; name other --test-parts")
    return found


if __name__ == "__main__":
    run_main(main)
