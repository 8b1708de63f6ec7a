"""The model folder: everything a device needs of a phase, described and checked.

    encoder-streaming.onnx   chunk by chunk; only of a phase that has a chunk size
    encoder-offline.onnx     whole utterances
    decoder.onnx joiner.onnx
    las.onnx                 the second pass, where there is one
    <part>.int8.onnx         the same, quantised
    tokens.txt bpe.model     what the tokens stand for
    model.safetensors        the weights in float32
    model.json               what the folder is: where it is from, sizes, and sha256 of every file
    README.md                the model card
    gate.json bench.json     that all implementations agree, and how fast they are

model.json names a file only when it is final, and is written after it: what it names is there, or is damaged.
A device may have a copy without the files of one precision, without an encoder that it does not use, without
the LAS, and without those that nothing here runs.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Set, Tuple

from transducer_kd.log import UserError, read_json, write_json

FORMAT = 1
MODES = ("streaming", "offline")
PARTS = ("encoder-streaming", "encoder-offline", "decoder", "joiner", "las")
PRECISIONS = ("float", "int8")
SCRATCH = ".int8-"  # how the folder in it begins in which int8 files are tried
_HASHED_AT_ONCE = 1 << 20  # bytes; a device need not hold a file of weights twice
_MAY_BE_LEFT_OUT = ("encoder-streaming", "encoder-offline", "las")
_NOT_RUN = {"bpe.model", "model.safetensors"}
_AGAIN = "export the phase again (local/export.py)"
_NEEDED = {
    "phase": str, "checkpoint": str, "chunk_size": int, "left_context": int, "context_size": int,
    "vocab_size": int, "files": dict,
}  # fmt: skip
_NEEDED_OF_LAS = {"beam_size": int, "rescore_nbest": int, "mu": float, "length_weight": float}
_KINDS = {str: "text", int: "a whole number", float: "a number", dict: "an object"}


@dataclass(frozen=True)
class ModelFolder:
    """A folder whose files are there."""

    path: Path
    info: Dict[str, Any]  # model.json

    @property
    def modes(self) -> Tuple[str, ...]:
        """Ways to run it: "streaming" where there is an encoder for it, "offline"."""
        return tuple(
            mode
            for mode in MODES
            if self.has(f"encoder-{mode}", "float") or self.has(f"encoder-{mode}", "int8")
        )

    @property
    def precisions(self) -> Tuple[str, ...]:
        """Those in which every part of a mode is there."""
        parts = [
            *(f"encoder-{mode}" for mode in self.modes),
            "decoder",
            "joiner",
            *(["las"] if self.has_las else []),
        ]
        return tuple(
            precision for precision in PRECISIONS if all(self.has(part, precision) for part in parts)
        )

    @property
    def has_las(self) -> bool:
        """Whether there is a second pass."""
        return any(self.has("las", precision) for precision in PRECISIONS)

    @property
    def rescore(self) -> Optional[Dict[str, Any]]:
        """How the second pass joins the first: method, mu, length_weight, beam_size, rescore_nbest. None
        without.
        """
        return self.info.get("rescore")

    def has(self, part: str, precision: str) -> bool:
        """Whether that file belongs to the folder."""
        return file_name(part, precision) in self.info["files"]

    def file(self, part: str, precision: str) -> Path:
        """Where that file is. UserError where the folder has none."""
        if not self.has(part, precision):
            there = ", ".join(sorted(name for name in self.info["files"] if name.endswith(".onnx")))
            raise UserError(f"{self.path} has no {file_name(part, precision)}; it has {there}")
        return self.path / file_name(part, precision)

    def bytes(self, mode: str, precision: str, with_las: bool = False) -> int:
        """What a device stores to run it so: encoder, decoder and joiner, and the second pass where it is
        asked for.
        """
        parts = (f"encoder-{mode}", "decoder", "joiner", *(["las"] if with_las else []))
        return sum(self.info["files"][self.file(part, precision).name]["bytes"] for part in parts)


def file_name(part: str, precision: str) -> str:
    """decoder, int8 -> decoder.int8.onnx"""
    return f"{part}.onnx" if precision == "float" else f"{part}.{precision}.onnx"


def open_folder(path: Path) -> ModelFolder:
    """The model folder `path`, every file compared with its sha256.

    Its info names the files that are there: those of one precision, of an encoder, of the LAS, and what
    nothing runs, may have been left out. UserError that names what else is missing or damaged. Nothing
    unchecked is handed to sherpa-onnx, which ends the process without an exception where a file lacks what it
    looks for.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no model folder {path}; local/export.py makes one, <phase>/export")
    if not (path / "model.json").is_file():
        raise UserError(
            f"{path} is no model folder: it has no model.json; name one that local/export.py has made"
        )
    info = read_json(path / "model.json", _AGAIN)
    if not isinstance(info, dict) or not isinstance(info.get("files"), dict):
        raise UserError(f"{path}/model.json does not describe a model; {_AGAIN}")
    if info.get("format") != FORMAT:
        raise UserError(
            f"{path}/model.json has format {info.get('format')}, and this program reads {FORMAT}; {_AGAIN}"
        )
    _check_fields(path, info, _NEEDED)
    if info.get("rescore") is not None:
        _check_fields(path, info["rescore"], _NEEDED_OF_LAS, "rescore.")
    left_out = _left_out(path, info["files"])
    files = {name: known for name, known in info["files"].items() if name not in left_out}
    for name, known in files.items():
        _check_file(path / name, known)
    folder = ModelFolder(path, {**info, "files": files})
    for part in ("decoder", "joiner"):
        if not any(folder.has(part, precision) for precision in PRECISIONS):
            raise UserError(f"{path} has no {part}.onnx; {_AGAIN}")
    if not folder.modes:
        raise UserError(f"{path} has no encoder; {_AGAIN}")
    return folder


def _check_fields(path: Path, found: Any, wanted: Dict[str, type], prefix: str = "") -> None:
    """Raise UserError where what model.json holds lacks a field, or has it of another type."""
    for key, kind in wanted.items():
        if not isinstance(found, dict) or key not in found:
            raise UserError(f"{path}/model.json has no {prefix}{key}; {_AGAIN}")
        if not isinstance(found[key], (int, float) if kind is float else kind):
            wrong = f"{prefix}{key} is {found[key]!r}, and {_KINDS[kind]} belongs there"
            raise UserError(f"{path}/model.json: {wrong}; {_AGAIN}")


def describe(path: Path, about: Dict[str, Any], names: List[str]) -> ModelFolder:
    """Write model.json: what is known `about` the model, and the files `names` of the folder, with sizes and
    sha256.
    """
    info = {"format": FORMAT, **about, "files": {name: _described(path / name) for name in names}}
    write_json(path / "model.json", info)
    return ModelFolder(path, info)


def _described(file: Path) -> Dict[str, Any]:
    return {"sha256": _sha256(file), "bytes": file.stat().st_size}


def _left_out(path: Path, names: Iterable[str]) -> Set[str]:
    """Of the files `names` those that somebody left out when the folder was copied."""
    gone = {name for name in names if not (path / name).exists()}
    left_out = gone & _NOT_RUN
    groups = [{file_name(part, precision) for part in PARTS} for precision in PRECISIONS]
    groups += [{file_name(part, precision) for precision in PRECISIONS} for part in _MAY_BE_LEFT_OUT]
    for group in groups:
        own = group & set(names)
        if own <= gone:
            left_out |= own
    return left_out


def _check_file(file: Path, known: Any) -> None:
    if not file.is_file():
        raise UserError(f"{file} is missing, but model.json names it; copy the whole folder, or {_AGAIN}")
    if not isinstance(known, dict) or {"sha256", "bytes"} - known.keys():
        raise UserError(f"{file.parent}/model.json does not say how large {file.name} is; {_AGAIN}")
    if file.stat().st_size != known["bytes"] or _sha256(file) != known["sha256"]:
        raise UserError(
            f"{file} is not the file that was exported (it is damaged, or of another export); {_AGAIN}"
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while piece := f.read(_HASHED_AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()
