"""The metadata of ONNX files, read without a runtime, and what sherpa-onnx has to find there.

sherpa-onnx ends the process where a key is missing, without an exception. An ONNX file is a protobuf message
(ModelProto): its fields are walked over, and all but metadata_props are skipped unread, which costs nothing.
"""

from pathlib import Path
from typing import Dict, Iterator, Tuple

from transducer_kd.log import UserError

# Part of a model folder -> keys that sherpa-onnx cannot do without.
NEEDED = {
    "encoder-streaming": (
        "model_type", "num_encoder_layers", "T", "decode_chunk_len", "left_context", "encoder_dim",
        "pad_length", "cnn_module_kernel",
    ),
    "decoder": ("vocab_size", "context_size"),
}  # fmt: skip

_AGAIN = "export the phase again (local/export.py)"
_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2  # field numbers of ModelProto and of StringStringEntryProto
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5  # wire types of protobuf


def check_metadata(path: Path, part: str) -> None:
    """Raise UserError where an ONNX file lacks what sherpa-onnx looks for in this part of a model."""
    found = read_metadata(path)
    needed = NEEDED.get(part, ())
    missing = [key for key in needed if not found.get(key)]
    if missing:
        raise UserError(
            f"{path} has no metadata {', '.join(missing)}, without which sherpa-onnx ends the program; "
            f"{_AGAIN}"
        )
    for key in needed:
        if key != "model_type" and not found[key].isdigit():
            raise UserError(f"{path}: metadata {key} is {found[key]!r}, and no whole number; {_AGAIN}")


def read_metadata(path: Path) -> Dict[str, str]:
    """Key -> value of an ONNX file's metadata_props. UserError where the file is no protobuf message."""
    try:
        entries = [
            dict(_fields(entry)) for number, entry in _fields(path.read_bytes()) if number == _METADATA_PROPS
        ]
        return {e.get(_KEY, b"").decode(): e.get(_VALUE, b"").decode() for e in entries}
    except (IndexError, ValueError):
        raise UserError(f"{path} is no ONNX file, or damaged; {_AGAIN}") from None


def _fields(message: bytes) -> Iterator[Tuple[int, bytes]]:
    """Number and content of each field of a message; numbers, which are not wanted here, have no content.

    Raises IndexError or ValueError where the message is damaged.
    """
    view, position = memoryview(message), 0
    while position < len(view):
        tag, position = _varint(view, position)
        number, kind = tag >> 3, tag & 7
        length = {_FIXED_64: 8, _FIXED_32: 4}.get(kind, 0)
        if kind in (_VARINT, _BYTES):
            value, position = _varint(view, position)
            length = value if kind == _BYTES else 0
        elif not length:
            raise ValueError(f"wire type {kind}")
        if position + length > len(view):
            raise ValueError("a field is longer than the message")
        yield (
            number,
            bytes(view[position : position + length]) if number in (_KEY, _VALUE, _METADATA_PROPS) else b"",
        )
        position += length


def _varint(view: memoryview, position: int) -> Tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = view[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value, position
