"""What the trainer knows of a task: an Objective turns a batch into a summed loss and a frame count.

Objectives return sums, never means. The trainer divides once, by the frames of all ranks and accumulated
batches together, so that a gradient does not depend on how a batch was cut into pieces.
"""

from dataclasses import dataclass, field
from typing import Any, Dict

import torch
from torch import nn


@dataclass
class LossOutput:
    """Result of one batch on one rank.

    loss_sum:    () float32 with graph, summed over the batch's utterances
    num_frames:  encoder frames (40 ms) in the batch; what every loss is divided by
    metrics:     named sums over the batch, without graph; logged divided by num_frames
    """

    loss_sum: torch.Tensor
    num_frames: torch.Tensor
    metrics: Dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Holds the model that is trained. `self.model` alone is checkpointed, averaged and exported.

    It is the Objective that DistributedDataParallel wraps: a forward that bypasses the wrapper would skip the
    synchronisation of gradients.
    """

    model: nn.Module

    def forward(self, batch: Any, step: int) -> LossOutput:
        """Loss of one batch at update `step` (0-based; loss weights may depend on it)."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each optimiser update: masks, schedules. Does nothing by default."""

    def images(self, batch: Any, step: int) -> Dict[str, torch.Tensor]:
        """Named (H, W) pictures in [0, 1] of how the loss sees the first utterance, for TensorBoard."""
        return {}
