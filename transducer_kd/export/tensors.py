"""The gate's first part, by tensor: every ONNX file, float and int8, and PyTorch chunk by chunk.

Shapes: T feature frames, C mel bins, T' encoder frames, D encoder_dim.
"""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from transducer_kd.decode.streaming import chunks
from transducer_kd.export.compare import MAX_DIFFERENCE, compare, difference
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
    whole, by_chunks = _layer_outputs(encoder, x)
    differences = [difference(one, other) for one, other in zip(by_chunks, whole)]
    makers = ["encoder.subsampling", *(f"encoder.layers.{i}" for i in range(len(encoder.layers)))]
    starts_at = None
    if differences[-1] > MAX_DIFFERENCE:
        off = [maker for maker, found in zip(makers, differences) if found > MAX_DIFFERENCE]
        starts_at = off[0] if off else "encoder.norm"
    return [_row("PyTorch by chunks", "encoder_out", differences[-1], MAX_DIFFERENCE, starts_at)]


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
def _layer_outputs(encoder: Conformer, x: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
    """Of an utterance x (1,T,C), at once and by chunks: what the subsampling and every layer give, (T',D)
    each, and last the output of the encoder. A layer's output is what the first norm of the next is given.
    """
    lens = torch.tensor([x.size(1)])
    norms = [*(layer.ff1_norm for layer in encoder.layers), encoder.norm]
    given: List[List[Tensor]] = [[] for _ in norms]
    hooks = [
        norm.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0][0]))
        for norm, kept in zip(norms, given)
    ]
    whole, whole_lens = encoder(x, lens)
    at_once = [kept.pop() for kept in given]
    state, pieces = encoder.streaming_init(1, x.device), []
    for piece, piece_lens in chunks(x, lens, encoder.cfg.chunk_size):
        out, _, state = encoder.streaming_forward(piece, piece_lens, state)
        pieces.append(out[0])
    for hook in hooks:
        hook.remove()
    valid = slice(int(whole_lens))
    return [*at_once, whole[0]], [torch.cat(kept)[valid] for kept in [*given, pieces]]
