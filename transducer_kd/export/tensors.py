"""The gate's first part, by tensor: every ONNX file, float and int8, and PyTorch chunk by chunk.

Shapes: T feature frames, C mel bins, T' encoder frames, D encoder_dim.
"""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from transducer_kd.decode.streaming import chunks
from transducer_kd.export.compare import MAX_DIFFERENCE, compare, difference, layer_outputs
from transducer_kd.export.folder import PRECISIONS, ModelFolder
from transducer_kd.export.onnx_files import Part
from transducer_kd.models.conformer import Conformer
from transducer_kd.models.subsampling import LOOKAHEAD_FRAMES, SUBSAMPLING_FACTOR

_NUM_CHUNKS = 6

Row = Dict[str, Any]


def check_tensors(folder: ModelFolder, parts: Sequence[Part], model: Any) -> List[Row]:
    """Rows {"part", "output", "max_difference", "limit", "starts_at", "passed"}.

    model: PyTorch's, as it streams. int8 rounds, so its differences are told and have no limit: its words are
    what counts.
    """
    rows = chunk_rows(model.encoder) if "streaming" in folder.modes else []
    for precision in PRECISIONS:
        for part in parts:
            path = folder.file(part.name, precision)
            limit = MAX_DIFFERENCE if precision == "float" else math.inf
            for found in compare(part, path, limit):
                rows.append(_row(path.name, found.output, found.max_difference, found.limit, found.starts_at))
    return rows


def chunk_rows(encoder: Conformer) -> List[Row]:
    """PyTorch chunk by chunk against PyTorch on the whole utterance, whose last chunk is not full."""
    chunk = SUBSAMPLING_FACTOR * encoder.cfg.chunk_size
    num_frames = _NUM_CHUNKS * chunk + LOOKAHEAD_FRAMES - chunk // 2
    x = (
        3 * torch.randn(1, num_frames, encoder.cfg.feature_dim, generator=torch.Generator().manual_seed(7))
        - 8
    )
    found = {
        maker: difference(by_chunks, whole)
        for maker, (whole, by_chunks) in _whole_and_by_chunks(encoder, x).items()
    }
    of_output = found["encoder.norm"]
    starts_at = None
    if of_output > MAX_DIFFERENCE:
        starts_at = next(maker for maker, off in found.items() if off > MAX_DIFFERENCE)
    return [_row("PyTorch by chunks", "encoder_out", of_output, MAX_DIFFERENCE, starts_at)]


def _row(part: str, output: str, largest: float, limit: float, starts_at: Optional[str]) -> Row:
    return {
        "part": part,
        "output": output,
        # JSON knows no infinity.
        "max_difference": largest if math.isfinite(largest) else None,
        "limit": limit if math.isfinite(limit) else None,
        "starts_at": starts_at,
        "passed": largest <= limit and math.isfinite(largest),
    }


@torch.inference_mode()
def _whole_and_by_chunks(encoder: Conformer, x: Tensor) -> Dict[str, Tuple[Tensor, Tensor]]:
    """{subsampling, layer or last norm: (T',D) that it gives, at once and by chunks}, of x (1,T,C)."""
    lens = torch.tensor([x.size(1)])
    with layer_outputs(encoder) as given:
        whole, whole_lens = encoder(x, lens)
        at_once = [kept.pop()[0] for kept in given.values()]
        state, pieces = encoder.streaming_init(1, x.device), []
        for piece, piece_lens in chunks(x, lens, encoder.cfg.chunk_size):
            out, _, state = encoder.streaming_forward(piece, piece_lens, state)
            pieces.append(out)
    valid = slice(int(whole_lens))
    by_chunks = [torch.cat(kept, dim=1)[0, valid] for kept in [*given.values(), pieces]]
    return dict(zip([*given, "encoder.norm"], zip([*at_once, whole[0]], by_chunks)))
