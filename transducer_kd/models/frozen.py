"""A teacher inside a student's module tree that training cannot touch."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn


class Frozen(nn.Module):
    """Holds `module` without registering it.

    So it has no part in parameters(), state_dict(), DDP or train(): the teacher gets no gradients, stays in
    eval, and is in no checkpoint. It still moves with .to(), .cuda() and the like.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        module.eval().requires_grad_(False)
        # A list, because nn.Module registers every module that is assigned to an attribute.
        self._held = [module]

    @property
    def module(self) -> nn.Module:
        return self._held[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> Frozen:
        self.module._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)
