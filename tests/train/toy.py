"""A task small enough to check the trainer by hand: fit w to y = 2 x, one number a "frame"."""

from dataclasses import dataclass
from typing import List

import pytest
import torch

from transducer_kd.config import load_config
from transducer_kd.objectives.base import LossOutput, Objective
from transducer_kd.train.trainer import Trainer, Validation


@dataclass
class ToyBatch:
    features: torch.Tensor  # (N, 3)
    feature_lens: torch.Tensor
    y_lens: torch.Tensor
    cut_ids: List[str]

    @property
    def audio_s(self):
        return float(len(self.features))

    def to(self, device):
        return self


def toy_batches(epoch, start_batch, num_batches=5, poison=()):
    generator = torch.Generator().manual_seed(epoch)
    for i in range(num_batches):
        size = 2 + (i + epoch) % 3
        x = torch.randn(size, 3, generator=generator)
        if (epoch, i) in poison:
            x[0, 0] = float("nan")
        if i >= start_batch:
            lens = torch.full((size,), 3)
            yield ToyBatch(x, lens, lens, [f"cut-{epoch}-{i}-{n}" for n in range(size)])


class ToyObjective(Objective):
    def __init__(self, dropout=0.2):
        super().__init__()
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(3, 1))

    def forward(self, batch, step):
        error = self.model(batch.features) - 2 * batch.features.sum(1, keepdim=True)
        losses = error.square().sum(1)
        return LossOutput(losses, torch.ones(len(batch.features)), {"loss": losses.detach().sum()})


def run_killed_after(trainer, step):
    """Run until `step` updates are made, and end without a chance to save."""
    update = trainer._update

    def killing(*args):
        update(*args)
        if trainer.progress.step == step:
            raise KeyboardInterrupt

    trainer._update = killing
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def toy_validate(objective, step):
    metrics = {"loss": float(objective.model[1].weight.sub(2).square().sum())}
    return Validation(metrics, texts=[("cut", "A B", "A")], images={"square": torch.eye(4)})


def toy_trainer(exp_dir, *overrides, poison=(), dropout=0.2, batches=None):
    defaults = ["train.max_steps=18", "train.log_every=4", "train.valid_every=6", "train.save_every=3",
                "train.average_period=2", "optim.warmup_steps=3", "optim.lr=0.05"]  # fmt: skip
    config = load_config(None, defaults + list(overrides))
    source = batches or (lambda epoch, start: toy_batches(epoch, start, poison=poison))
    return Trainer(ToyObjective(dropout), config, exp_dir, torch.device("cpu"), source, toy_validate, "sha")
