"""What a deployed model weighs in one of its modes: parameters, and bytes with the index of sparse matrices.

Counted are encoder, decoder and joiner, with values in float32. A matrix of the encoder's layers is stored as
blocks of 8x1 where that takes fewer bytes than all of it: of every kept block (one with a value that is not
zero) 8 values and its column, a uint16; of every block row where its blocks begin, a uint32, and one more for
where the last one ends. So dense matrices have no index, and those of `unit`, which are smaller, neither.
"""

from dataclasses import dataclass
from typing import Optional, Tuple

from torch import Tensor

from transducer_kd.compress.extract import extract
from transducer_kd.models.supernet import BLOCK_ROWS, MATRICES
from transducer_kd.models.transducer import Transducer

_VALUE, _COLUMN, _ROW_POINTER = 4, 2, 4  # bytes
_DEPLOYED = ("encoder.", "decoder.", "joiner.")
_PRUNED = tuple(f".{matrix}.weight" for matrix in MATRICES)


@dataclass
class Size:
    """Numbers and bytes; value_bytes + index_bytes is what the mode takes, dense_bytes what the whole model
    would."""

    parameters: int  # of the mode's matrices, zeros of block8x1 included
    nonzero_parameters: int
    value_bytes: int
    index_bytes: int
    dense_bytes: int


def count(model: Transducer, chunk_size: Optional[int] = None) -> Size:
    """What the mode of `chunk_size` takes (None: the configured one). It is the whole model for chunk_size 0
    and for a model without masks, or else what extract() makes of it.
    """
    chunk_size = model.config.encoder.chunk_size if chunk_size is None else chunk_size
    is_sparse = chunk_size > 0 and model.config.pruned_groups != "none"
    state = extract(model)[1] if is_sparse else model.state_dict()
    size = Size(0, 0, 0, 0, 4 * model.first_pass_parameters())
    for name, value in state.items():
        if not name.startswith(_DEPLOYED):
            continue
        size.parameters += value.numel()
        size.nonzero_parameters += int(value.count_nonzero())
        values, index = _VALUE * value.numel(), 0
        may_be_sparse = name.startswith("encoder.layers.") and name.endswith(_PRUNED)
        if may_be_sparse and value.size(0) % BLOCK_ROWS == 0:
            values, index = min((values, index), _as_blocks(value), key=sum)
        size.value_bytes += values
        size.index_bytes += index
    return size


def _as_blocks(weight: Tensor) -> Tuple[int, int]:
    """Bytes of values and index of a matrix (R, C) as blocks."""
    blocks = weight.view(-1, BLOCK_ROWS, weight.size(1))
    kept = int(blocks.count_nonzero(dim=1).bool().sum())
    return kept * BLOCK_ROWS * _VALUE, kept * _COLUMN + (blocks.size(0) + 1) * _ROW_POINTER
