"""A tensor that several passes of one batch use, each with a backward of its own.

With `y = shared.leaf()` for all passes but the last and `y = shared.joined()` for the last, the parameters
behind the tensor get the gradient of the sum of all passes, while no pass keeps the graph of another: memory
is that of one pass, and what is behind the tensor is computed and differentiated once.
"""

from typing import List

import torch

MODES = ("offline", "streaming")  # pass 0, pass 1 of what trains both modes of a model


class SharedTensor:
    """value: with its graph."""

    def __init__(self, value: torch.Tensor):
        self.value = value
        self.leaves: List[torch.Tensor] = []

    def leaf(self) -> torch.Tensor:
        """The values for one pass, whose gradient is collected and goes no further yet."""
        self.leaves.append(self.value.detach().requires_grad_())
        return self.leaves[-1]

    def joined(self) -> torch.Tensor:
        """The values for the last pass; on the way back the gradients of the earlier passes are added.

        The loss of the last pass has to depend on them, or no gradient comes this way at all.
        """
        if self.value.requires_grad:
            self.value.register_hook(self._with_collected)
        return self.value

    def _with_collected(self, gradient: torch.Tensor) -> torch.Tensor:
        for leaf in self.leaves:
            if leaf.grad is not None:
                gradient = gradient + leaf.grad
        return gradient
