"""The batch that every objective and every decoder sees; made once, here, from features and token lists.

N batch, T feature frames (10 ms), C mel bins (80), T' encoder frames (40 ms), D channels, U tokens.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

# log(1e-10): below the floor of any real frame (log of float32's epsilon, -15.9), and what sherpa-onnx pads
# with.
PADDING_VALUE = math.log(1e-10)
FRAME_SHIFT_S = 0.01


@dataclass
class Batch:
    """Some utterances of similar length.

    features      (N,T,C) float32 log-mel; frames beyond an utterance's length are PADDING_VALUE
    feature_lens  (N,) int64, at least one of them is T
    y             (N,U) int64 token ids without blank, padded with 0; U is at least 1
    y_lens        (N,) int64, may be 0: a test utterance without a transcript, silence in training
    cut_ids       N names of utterances
    texts         N normalised transcripts
    is_pseudo     (N,) bool: the transcript is a teacher's; none is, where it is left out
    teacher_out       (N,T',D) float32, a teacher's encoder output that was stored; None where none is read
    teacher_out_lens  (N,) int64, 0 for utterances without
    """

    features: torch.Tensor
    feature_lens: torch.Tensor
    y: torch.Tensor
    y_lens: torch.Tensor
    cut_ids: List[str]
    texts: List[str]
    is_pseudo: Optional[torch.Tensor] = None
    teacher_out: Optional[torch.Tensor] = None
    teacher_out_lens: Optional[torch.Tensor] = None

    def __post_init__(self) -> None:
        if self.is_pseudo is None:
            self.is_pseudo = torch.zeros_like(self.y_lens, dtype=torch.bool)

    @property
    def audio_s(self) -> float:
        """Seconds of audio in the batch, without the padding."""
        return float(self.feature_lens.sum()) * FRAME_SHIFT_S

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {name: value.to(device, non_blocking=True) for name, value in self._tensors().items()}
        return dataclasses.replace(self, **moved)

    def select(self, rows: torch.Tensor) -> Batch:
        """The utterances `rows` (n,) int64, without the frames of padding that only others needed.

        y keeps its width: what was computed for the nodes of the whole batch's lattice still fits.
        """
        chosen = {name: value[rows] for name, value in self._tensors().items()}
        chosen["features"] = chosen["features"][:, : int(chosen["feature_lens"].max())]
        if self.teacher_out is not None:
            chosen["teacher_out"] = chosen["teacher_out"][:, : int(chosen["teacher_out_lens"].max())]
        names = {name: [getattr(self, name)[i] for i in rows.tolist()] for name in ("cut_ids", "texts")}
        return Batch(**chosen, **names)

    def _tensors(self) -> Dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


def collate(
    features: Sequence[np.ndarray],
    tokens: Sequence[Sequence[int]],
    cut_ids: Sequence[str],
    texts: Sequence[str],
    is_pseudo: Optional[Sequence[bool]] = None,
    teacher_out: Optional[Sequence[Optional[np.ndarray]]] = None,
) -> Batch:
    """Pad N matrices (T_n,C), N token lists and, where given, N matrices (T'_n,D) or None into a Batch."""
    padded, feature_lens = _pad(features, PADDING_VALUE)
    y_lens = torch.tensor([len(t) for t in tokens], dtype=torch.int64)
    # The loss kernels want at least one column, also when no utterance has a transcript.
    y = torch.zeros((len(tokens), max(1, int(y_lens.max()))), dtype=torch.int64)
    for row, ids in zip(y, tokens):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    batch = Batch(padded, feature_lens, y, y_lens, list(cut_ids), list(texts))
    if is_pseudo is not None:
        batch.is_pseudo = torch.tensor(is_pseudo, dtype=torch.bool)
    stored = [matrix for matrix in teacher_out or () if matrix is not None]
    if stored:
        none = stored[0][:0]
        batch.teacher_out, batch.teacher_out_lens = _pad(
            [none if matrix is None else matrix for matrix in teacher_out], 0.0
        )
    return batch


def _pad(matrices: Sequence[np.ndarray], value: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """N matrices (T_n,C) -> (N,T,C) float32 and their lengths (N,)."""
    lens = torch.tensor([len(matrix) for matrix in matrices], dtype=torch.int64)
    padded = torch.full((len(matrices), int(lens.max()), matrices[0].shape[1]), value)
    for row, matrix in zip(padded, matrices):
        row[: len(matrix)] = torch.from_numpy(matrix)
    return padded, lens
