"""Feature frames (10 ms) to encoder frames (40 ms): two 3x3 convolutions of stride 2 without padding.

Without padding, encoder frame t depends on the feature frames 4t .. 4t+6 and on nothing else. That makes a
streaming chunk of c encoder frames a plain window of 4c+3 feature frames, with no state to carry.

Shapes: N batch, T feature frames, C mel bins, S channels, T' encoder frames, D encoder_dim.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Lens = TypeVar("Lens", int, Tensor)

SUBSAMPLING_FACTOR = 4  # feature frames from one encoder frame to the next
LOOKAHEAD_FRAMES = 3  # feature frames that c encoder frames need besides their own 4c
MIN_FEATURE_FRAMES = 7  # the fewest feature frames that give one encoder frame

# Natural-log mel energies of samples in [-1, 1] lie between about -16 (silence) and 0. A fixed map to zero
# mean and unit scale needs no statistics, so it is the same for a whole file and for its first 100 ms.
LOG_MEL_MEAN = -8.0
LOG_MEL_SCALE = 0.25


def subsampled_lens(x_lens: Lens) -> Lens:
    """Number of encoder frames T' for `x_lens` feature frames, an int or an integer tensor; 0 if there are
    too few.
    """
    if isinstance(x_lens, Tensor):
        halved = torch.div(x_lens - 1, 2, rounding_mode="floor")
        return torch.div(halved - 1, 2, rounding_mode="floor").clamp(min=0)
    return max(0, ((x_lens - 1) // 2 - 1) // 2)


class ConvSubsampling(nn.Module):
    """(N, T, C) log-mel features -> (N, T', D)."""

    def __init__(self, feature_dim: int, channels: int, encoder_dim: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv1 = nn.Conv2d(1, channels, 3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2)
        self.out = nn.Linear(channels * subsampled_lens(feature_dim), encoder_dim)
        self.norm = nn.LayerNorm(encoder_dim)
        for layer in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.project(x))

    def project(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T', D), the frames before the norm: their scale is still that of the weights."""
        x = (x - LOG_MEL_MEAN) * LOG_MEL_SCALE
        x = F.silu(self._first(x))
        x = F.silu(self.conv2(x))
        # Channels last, so that flattening (F', S) is a view.
        return self.out(x.permute(0, 2, 3, 1).flatten(2))

    def _first(self, x: Tensor) -> Tensor:
        """conv1 as one matrix product over 3x3 patches: (N, T, C) -> (N, S, T1, C1) in channels-last memory.

        With a single input channel this is faster on a CPU than the convolution (which would compute a
        gradient for the features, too), and it leaves the memory format that the second convolution is
        fastest in.
        """
        if torch.onnx.is_in_onnx_export():  # ONNX knows no unfold of an unknown length
            return self.conv1(x.unsqueeze(1))
        patches = x.unfold(1, 3, 2).unfold(2, 3, 2).flatten(3)
        return F.linear(patches, self.conv1.weight.view(self.channels, 9), self.conv1.bias).permute(
            0, 3, 1, 2
        )
