"""Learning-rate schedule and weight-decay groups."""

import pytest
import torch

from transducer_kd.config import OptimConfig
from transducer_kd.train.optim import build_optimizer, learning_rate


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 60, 0.5 * (1 + 0.1)),
        ("cosine", 110, 0.1),
        ("linear", 60, 0.55),
        ("linear", 500, 0.1),
        ("constant", 500, 1.0),
    ],
)
def test_schedule_values(schedule, step, expected):
    config = OptimConfig(lr=1.0, warmup_steps=10, schedule=schedule, final_lr_ratio=0.1)
    assert learning_rate(step, 110, config) == pytest.approx(expected)


def test_vectors_are_not_decayed():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[id(model[0].weight)] == 0.3
    assert decay[id(model[0].bias)] == decay[id(model[1].weight)] == 0.0
    assert len(decay) == len(list(model.parameters()))
