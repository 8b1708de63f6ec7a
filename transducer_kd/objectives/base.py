"""What the trainer knows of a task: an Objective turns a batch into losses and frame counts.

Objectives return sums, never means. The trainer divides once, by the frames of all ranks and accumulated
batches together, so that a gradient does not depend on how a batch was cut into pieces.
"""

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Optional, Tuple

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
    # Forwards of one batch, each followed by its own backward: memory is that of one.
    num_passes: int = 1
    # What validation calls a WER, and the chunk size that it decodes with (None: the encoder's own).
    wer_chunk_sizes: Tuple[Tuple[str, Optional[int]], ...] = (("wer", None),)
    # Chooses the masks of a supernet after update `step`; returns scalars, none where it did nothing.
    pruner: Optional[Callable[[int], Dict[str, float]]] = None

    def forward(self, batch: Any, step: int, number: int = 0) -> LossOutput:
        """Loss of one batch at update `step` (0-based; loss weights may depend on it).

        number: of the pass, 0 to num_passes - 1, in this order for each batch; given where there are several.
        Of the passes' lengths those of number 0 count. What several passes log under one name is added.
        """
        raise NotImplementedError

    def evaluate(self, batch: Any, step: int) -> LossOutput:
        """All passes together, for validation."""
        output = self(batch, step)
        for number in range(1, self.num_passes):
            more = self(batch, step, number)
            output.losses = output.losses + more.losses
            for name, value in more.metrics.items():
                output.metrics[name] = output.metrics[name] + value if name in output.metrics else value
        return output

    def after_step(self, step: int) -> Dict[str, float]:
        """Called after each optimiser update. Where it changed the model, as new masks do, it returns scalars
        of that for TensorBoard, else nothing."""
        return self.pruner(step) if self.pruner is not None else {}

    def images(self, batch: Any, step: int) -> Dict[str, torch.Tensor]:
        """Named (H, W) pictures in [0, 1] of how the loss sees the first utterance, for TensorBoard."""
        return {}

    def of_validation(self) -> Dict[str, float]:
        """Metrics of all that was evaluated since the last call of histograms(), which are no sums."""
        return {}

    def histograms(self) -> Dict[str, torch.Tensor]:
        """Named counts (n,) of the numbers 0 to n - 1 since the last call, for TensorBoard."""
        return {}
