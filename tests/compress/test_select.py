"""Selecting a student from its teacher: what is kept still computes what it did."""

import dataclasses

import pytest
import torch

from transducer_kd.compress import select
from transducer_kd.config import DecoderConfig, EncoderConfig, ModelConfig
from transducer_kd.log import UserError
from transducer_kd.models.transducer import Transducer

VOCAB = 9
ENCODER = EncoderConfig(
    num_layers=4, encoder_dim=16, num_heads=4, feedforward_dim=12, cnn_module_kernel=3, dropout=0.0,
    subsampling_channels=2,
)  # fmt: skip
TEACHER = ModelConfig(ENCODER, DecoderConfig(decoder_dim=10), joiner_dim=11)


def smaller(**changes):
    return dataclasses.replace(TEACHER, encoder=dataclasses.replace(ENCODER, head_dim=4, **changes))


@pytest.fixture
def teacher():
    torch.manual_seed(3)
    model = Transducer(TEACHER, VOCAB, with_ctc=True).eval()
    for parameter in model.parameters():  # no parameter at a special value
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def select_student(teacher, config):
    selections = select.choose(teacher.state_dict(), TEACHER, config)
    student = Transducer(config, VOCAB, with_ctc=True).eval()
    student.load_state_dict(select.apply(teacher.state_dict(), selections, TEACHER))
    return student, selections


def encode(model):
    x = torch.randn(2, 47, 80, generator=torch.Generator().manual_seed(0)) - 8
    with torch.no_grad():
        return model.encode(x, torch.tensor([47, 40]))[0]


def test_all_of_it_is_the_teacher(teacher):
    student, selections = select_student(teacher, smaller())
    assert [s.layer for s in selections] == [0, 1, 2, 3] and selections[0].heads == [0, 1, 2, 3]
    assert torch.equal(encode(student), encode(teacher))
    for name, value in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], value), name


def test_what_writes_nothing_can_go_without_a_trace(teacher):
    """Two heads and five units of each kind, made dead by hand, are what selection leaves out."""
    dead_heads, dead_units = [1, 3], [0, 2, 5, 7, 11]
    with torch.no_grad():
        for layer in teacher.encoder.layers:
            for head in dead_heads:
                layer.attention.out.weight[:, 4 * head : 4 * head + 4] = 0
            layer.ff1.out.weight[:, dead_units] = 0
            layer.ff2.out.weight[:, dead_units] = 0
    student, selections = select_student(teacher, smaller(num_heads=2, feedforward_dim=7))
    for selection in selections:
        assert selection.heads == [0, 2]
        assert selection.ff1 == selection.ff2 == [1, 3, 4, 6, 8, 9, 10]
    torch.testing.assert_close(encode(student), encode(teacher), atol=1e-5, rtol=1e-5)


def test_layers_are_the_teachers_in_order(teacher):
    student, selections = select_student(teacher, smaller(num_layers=2))
    assert [s.layer for s in selections] == [0, 3]
    for own, of in zip(student.encoder.layers, (teacher.encoder.layers[0], teacher.encoder.layers[3])):
        for mine, theirs in zip(own.parameters(), of.parameters()):
            assert torch.equal(mine, theirs)
    dropped = Transducer(smaller(num_layers=2), VOCAB, with_ctc=True).eval()
    dropped.load_state_dict(student.state_dict())
    assert not torch.allclose(encode(student), encode(teacher), atol=1e-3)


@pytest.mark.parametrize(
    "kept, of, expected",
    [(1, 4, [3]), (2, 4, [0, 3]), (3, 4, [0, 2, 3]), (4, 4, [0, 1, 2, 3]), (6, 12, [0, 2, 4, 7, 9, 11])],
)
def test_layers_are_evenly_spaced(kept, of, expected):
    assert select.evenly_spaced(kept, of) == expected


@pytest.mark.parametrize(
    "config, message",
    [
        (smaller(num_layers=5), "num_layers is 5 in the student and only 4"),
        (smaller(feedforward_dim=13), "feedforward_dim is 13"),
        (smaller(cnn_module_kernel=5), "cnn_module_kernel is 3 in the teacher and 5"),
        (dataclasses.replace(TEACHER, joiner_dim=10), "joiner_dim is 11 in the teacher and 10"),
        (
            dataclasses.replace(TEACHER, encoder=dataclasses.replace(ENCODER, num_heads=2)),
            "head_dim is 4 in the teacher and 8",
        ),
    ],
)
def test_what_is_no_part_of_the_teacher_is_refused(teacher, config, message):
    with pytest.raises(UserError, match=message):
        select.choose(teacher.state_dict(), TEACHER, config)
