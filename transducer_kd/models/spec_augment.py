"""SpecAugment (arXiv:1904.08779): masks bands of frames and of mel bins, for a whole batch at once.

Shapes: N batch, T feature frames, C mel bins, M masks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transducer_kd.config import SpecAugmentConfig
from transducer_kd.models.masks import valid_mask


class SpecAugment(nn.Module):
    """Returns an augmented copy in training mode from update begin_step on, otherwise its input."""

    def __init__(self, cfg: SpecAugmentConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def forward(self, x: Tensor, x_lens: Tensor, step: int) -> Tensor:
        """x (N, T, C), x_lens (N,), step: updates so far -> (N, T, C). Masked values become the utterance's
        mean; padding stays as it is.
        """
        if not (self.training and self.cfg.enabled and step >= self.cfg.begin_step):
            return x
        valid = valid_mask(x_lens, x.size(1)).unsqueeze(-1)
        masked = (self._time_masks(x, x_lens) | self._feature_masks(x)) & valid
        mean = x.masked_fill(~valid, 0.0).sum(dim=(1, 2)) / (x_lens * x.size(2))
        return torch.where(masked, mean[:, None, None].to(x.dtype), x)

    def _time_masks(self, x: Tensor, x_lens: Tensor) -> Tensor:
        """(N, T, 1) bool. All masks of an utterance together cover at most max_time_mask_fraction of it.

        A short utterance gets few masks of a useful width, not many of a frame or two.
        """
        cfg = self.cfg
        budget = (x_lens * cfg.max_time_mask_fraction).floor()
        wanted = (budget / max(cfg.max_time_mask_frames, 1)).ceil().clamp(1, max(cfg.num_time_masks, 1))
        widest = (budget / wanted).floor().clamp(max=cfg.max_time_mask_frames)
        used = torch.arange(cfg.num_time_masks, device=x.device) < wanted.unsqueeze(1)
        return _bands(widest.unsqueeze(1) * used, x_lens.unsqueeze(1), x.size(1)).unsqueeze(-1)

    def _feature_masks(self, x: Tensor) -> Tensor:
        """(N, 1, C) bool."""
        bins = x.size(2)
        widest = min(self.cfg.max_feature_mask_bins, bins)
        shape = (x.size(0), self.cfg.num_feature_masks)
        return _bands(torch.full(shape, float(widest), device=x.device), bins, bins).unsqueeze(1)


def _bands(widest: Tensor, length: "int | Tensor", size: int) -> Tensor:
    """(N, size) bool, True inside any of M bands with widths uniform in 0..widest (N, M), placed within
    `length`.
    """
    width = (torch.rand_like(widest) * (widest + 1)).floor()
    start = (torch.rand_like(widest) * (length - width + 1)).floor()
    position = torch.arange(size, device=widest.device)
    inside = (position >= start.unsqueeze(-1)) & (position < (start + width).unsqueeze(-1))
    return inside.any(dim=1)
