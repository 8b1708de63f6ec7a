"""The teacher's encoder output of pseudo-labelled cuts, as it is kept on disk.

A soft file is rows, one for each encoder frame, those of a cut together; little-endian, D = encoder_dim:
    float16   D float16                          2 D bytes
    int8      D int8 q, then one float16 s       D + 2 bytes; the value is q s, s = the frame's largest / 127

T' encoder frames.
"""

from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut

from transducer_kd.log import UserError


def soft_row_bytes(dim: int, dtype: str) -> int:
    """Bytes of an encoder frame of `dim` channels."""
    return {"float16": 2 * dim, "int8": dim + 2}[dtype]


def pack_soft(matrix: np.ndarray, dtype: str) -> bytes:
    """(T',D) float32 -> rows of a soft file. The error of int8 is at most s/2, of float16 2^-11 of a value."""
    if dtype == "float16":
        return matrix.astype("<f2").tobytes()
    largest = np.abs(matrix).max(axis=1)
    scale = (largest / 127).astype("<f2")
    # Rounded up: the largest value has to fit.
    scale = np.where(127 * scale.astype(np.float32) < largest, np.nextafter(scale, np.float16(np.inf)), scale)
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
    q = np.rint(matrix / divisor).astype(np.int8)
    return np.hstack([q.view(np.uint8), scale.astype("<f2")[:, None].view(np.uint8)]).tobytes()


def unpack_soft(rows: bytes, dim: int, dtype: str) -> np.ndarray:
    """Rows of a soft file -> (T',D) float32."""
    if dtype == "float16":
        return np.frombuffer(rows, dtype="<f2").reshape(-1, dim).astype(np.float32)
    table = np.frombuffer(rows, dtype=np.uint8).reshape(-1, dim + 2)
    scale = np.ascontiguousarray(table[:, dim:]).view("<f2").astype(np.float32)
    return table[:, :dim].view(np.int8) * scale


def read_soft_targets(cut: Cut) -> np.ndarray:
    """The teacher's encoder_out (T',D) float32 of a cut from load_pseudo_labels. UserError where it has none
    or its file is damaged.
    """
    soft = (cut.custom or {}).get("soft")
    if soft is None:
        raise UserError(
            f"cut {cut.id} has no stored teacher; label again with local/pseudo_label.py --soft int8"
        )
    size = soft["frames"] * soft_row_bytes(soft["dim"], soft["dtype"])
    try:
        with open(soft["path"], "rb") as f:
            f.seek(soft["offset"])
            rows = f.read(size)
    except OSError as e:
        raise UserError(f"cut {cut.id}: {soft['path']}: {e.strerror}; {label_again(soft['path'])}") from None
    if len(rows) < size:
        raise UserError(f"cut {cut.id}: {soft['path']} is cut short; {label_again(soft['path'])}")
    return unpack_soft(rows, soft["dim"], soft["dtype"])


def label_again(path: Any) -> str:
    """What to do about a damaged soft file."""
    return f"delete {Path(path).with_suffix('.jsonl')} and run local/pseudo_label.py again"
