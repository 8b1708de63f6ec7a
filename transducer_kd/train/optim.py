"""AdamW, the learning-rate schedule as a pure function of the update, and the fp16 loss scaler."""

import math
from typing import Any, List

import torch
from torch import nn

from transducer_kd.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only: norms, biases and other vectors are left alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: List[dict] = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=tuple(config.betas), eps=config.eps
    )


def learning_rate(step: int, max_steps: int, config: OptimConfig) -> float:
    """Learning rate of update `step` (0-based): linear warm-up, then cosine, linear or constant.

    It depends on nothing but its arguments, so a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    span = max(1, max_steps - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * fall)


def build_grad_scaler(enabled: bool) -> Any:
    """Gradient scaler for fp16; passes everything through where it is not enabled."""
    if hasattr(torch, "amp") and hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler("cuda", enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)
