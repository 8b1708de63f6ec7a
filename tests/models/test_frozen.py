"""Frozen: nothing about training reaches the teacher."""

import copy

import torch
from torch import nn

from transducer_kd.models.frozen import Frozen


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(3, 3)
        self.teacher = Frozen(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))


def test_is_invisible_to_training():
    student = Student()
    assert [name for name, _ in student.named_parameters()] == ["own.weight", "own.bias"]
    assert set(student.state_dict()) == {"own.weight", "own.bias"}
    student.load_state_dict(Student().state_dict())
    student.train()
    assert student.training and not student.teacher.module.training and not student.teacher.module[1].training


def test_gives_no_gradient():
    student = Student().train()
    x = torch.randn(2, 3, requires_grad=True)
    y = student.teacher(x)
    assert not y.requires_grad and torch.equal(y, student.teacher(x))
    assert not student.teacher.module[0].weight.requires_grad


def test_moves_and_copies_with_its_owner():
    student = Student().to(torch.float64)
    assert student.teacher.module[0].weight.dtype == torch.float64
    assert student.teacher(torch.zeros(1, 3, dtype=torch.float64)).dtype == torch.float64
    other = copy.deepcopy(student)
    assert other.teacher.module is not student.teacher.module
