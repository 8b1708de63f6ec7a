"""The batch that every objective and every decoder sees; made once, here, from features and token lists.

N batch, T feature frames (10 ms), C mel bins (80), U tokens.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import List, Sequence

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
    y_lens        (N,) int64, may be 0 where a test utterance has no transcript
    cut_ids       N names of utterances
    texts         N normalised transcripts
    """

    features: torch.Tensor
    feature_lens: torch.Tensor
    y: torch.Tensor
    y_lens: torch.Tensor
    cut_ids: List[str]
    texts: List[str]

    @property
    def audio_s(self) -> float:
        """Seconds of audio in the batch, without the padding."""
        return float(self.feature_lens.sum()) * FRAME_SHIFT_S

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


def collate(
    features: Sequence[np.ndarray],
    tokens: Sequence[Sequence[int]],
    cut_ids: Sequence[str],
    texts: Sequence[str],
) -> Batch:
    """Pad N matrices (T_n,C) and N token lists into a Batch."""
    feature_lens = torch.tensor([len(f) for f in features], dtype=torch.int64)
    y_lens = torch.tensor([len(t) for t in tokens], dtype=torch.int64)
    padded = torch.full((len(features), int(feature_lens.max()), features[0].shape[1]), PADDING_VALUE)
    # The loss kernels want at least one column, also when no utterance has a transcript.
    y = torch.zeros((len(tokens), max(1, int(y_lens.max()))), dtype=torch.int64)
    for i, (matrix, ids) in enumerate(zip(features, tokens)):
        padded[i, : len(matrix)] = torch.from_numpy(matrix)
        y[i, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return Batch(padded, feature_lens, y, y_lens, list(cut_ids), list(texts))
