"""What the trainer knows of a task: an Objective turns a batch into losses and frame counts.

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

    losses:            (N,) float32 with graph, one an utterance
    encoder_out_lens:  (N,) encoder frames (40 ms); every loss is divided by their sum
    metrics:           named sums over the batch, without graph; logged divided by the frames
    """

    losses: torch.Tensor
    encoder_out_lens: torch.Tensor
    metrics: Dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_terms(
        cls, losses: torch.Tensor, encoder_out_lens: torch.Tensor, terms: Dict[str, torch.Tensor]
    ) -> "LossOutput":
        """With the batch's sum of each term (N,), and of the losses themselves, as metrics."""
        sums = {name: value.detach().sum() for name, value in {**terms, "loss": losses}.items()}
        return cls(losses, encoder_out_lens, sums)

    @property
    def loss_sum(self) -> torch.Tensor:
        """() with graph: what is backpropagated."""
        return self.losses.sum()

    @property
    def num_frames(self) -> torch.Tensor:
        """Encoder frames of the batch."""
        return self.encoder_out_lens.sum()


class Objective(nn.Module):
    """Holds the model that is trained. `self.model` alone is checkpointed, averaged and exported.

    It is the Objective that DistributedDataParallel wraps: a forward that bypasses the wrapper would skip the
    synchronisation of gradients.
    """

    model: nn.Module
    backend: str = "none"  # kernel of the transducer loss, for the record
    trains_first_pass: bool = True  # otherwise decoding during validation would say the same each time

    def forward(self, batch: Any, step: int) -> LossOutput:
        """Loss of one batch at update `step` (0-based; loss weights may depend on it)."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called after each optimiser update: masks, schedules. Does nothing by default."""

    def images(self, batch: Any, step: int) -> Dict[str, torch.Tensor]:
        """Named (H, W) pictures in [0, 1] of how the loss sees the first utterance, for TensorBoard."""
        return {}
