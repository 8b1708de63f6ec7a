"""A scripted transducer of our own with icefall's interface, in its variants, as a teacher."""

import copy
import warnings
from typing import Tuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transducer_kd.log import UserError
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.scripted import load_scripted
from transducer_kd.models.subsampling import subsampled_lens

C, E, D, J, V = 80, 6, 5, 4, 11


class Encoder(nn.Module):
    """Zipformer's frame count: one fewer than ours for 100 frames."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, E)
        self.dropout = nn.Dropout(0.5)

    def forward(self, features: Tensor, feature_lengths: Tensor) -> Tuple[Tensor, Tensor]:
        lens = ((feature_lengths - 7) // 2 + 1) // 2
        y = self.dropout(self.linear(features))[:, 3::4]
        return y[:, : lens.max().item()], lens.to(torch.int32)


class EncoderWithStates(nn.Module):
    """Returns a third value and has a further argument with a default, as the older recipes."""

    def __init__(self):
        super().__init__()
        self.plain = Encoder()

    def forward(self, x: Tensor, x_lens: Tensor, warmup: float = 1.0) -> Tuple[Tensor, Tensor, Tensor]:
        out, lens = self.plain(x, x_lens)
        return out * warmup, lens, out


class StreamingEncoder(nn.Module):
    def forward(self, features: Tensor, feature_lengths: Tensor, states: Tensor) -> Tuple[Tensor, Tensor]:
        return features + states, feature_lengths


class HalvingEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, E)

    def forward(self, x: Tensor, x_lens: Tensor) -> Tuple[Tensor, Tensor]:
        return self.linear(x[:, ::2]), x_lens // 2


class Context(nn.Module):
    """Embedding and a convolution over two tokens; the blank embeds to zero."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=0)
        self.conv = nn.Conv1d(D, D, 2)

    def forward(self, y: Tensor, pad: int) -> Tensor:
        return self.conv(F.pad(self.embedding(y).transpose(1, 2), (pad, 0))).transpose(1, 2)


class BoolPad(nn.Module):
    def __init__(self):
        super().__init__()
        self.context = Context()
        self.blank_id = 0

    def forward(self, y: Tensor, need_pad: bool = True) -> Tensor:
        return self.context(y, 1 if need_pad else 0)


class OffByDefault(BoolPad):
    def forward(self, y: Tensor, need_pad: bool = False) -> Tensor:
        return self.context(y, 1 if need_pad else 0)


class TensorPad(BoolPad):
    def forward(self, y: Tensor, need_pad: Tensor) -> Tensor:
        return self.context(y, 1 if bool(need_pad) else 0)


class PadsItself(BoolPad):
    def forward(self, y: Tensor) -> Tensor:
        return self.context(y, 1)


class NeverPads(BoolPad):
    def forward(self, y: Tensor) -> Tensor:
        return self.context(y, 0)


class OtherBlank(BoolPad):
    def __init__(self):
        super().__init__()
        self.blank_id = V - 1


class TwoRowsEach(BoolPad):
    def forward(self, y: Tensor) -> Tensor:
        return self.context(torch.cat([y, y], dim=1), 1)


class Joiner(nn.Module):
    def __init__(self, encoder_dim: int = E):
        super().__init__()
        self.encoder_proj = nn.Linear(encoder_dim, J)
        self.decoder_proj = nn.Linear(D, J)
        self.output_linear = nn.Linear(J, V)

    def forward(self, encoder_out: Tensor, decoder_out: Tensor, project_input: bool = True) -> Tensor:
        assert encoder_out.ndim in (2, 4)
        assert encoder_out.shape == decoder_out.shape or project_input
        if project_input:
            encoder_out, decoder_out = self.encoder_proj(encoder_out), self.decoder_proj(decoder_out)
        return self.output_linear(torch.tanh(encoder_out + decoder_out))


class ProjectedJoiner(Joiner):
    """The least there may be: projections, and a forward of what they give."""

    def forward(self, am: Tensor, lm: Tensor) -> Tensor:
        return self.output_linear(torch.tanh(am + lm))


class ProjectingJoiner(Joiner):
    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.output_linear(torch.tanh(self.encoder_proj(encoder_out) + self.decoder_proj(decoder_out)))


class Teacher(nn.Module):
    def __init__(self, encoder, decoder, joiner, with_simple=True):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.joiner = joiner
        if with_simple:
            self.simple_am_proj = nn.Linear(E, V)
            self.simple_lm_proj = nn.Linear(D, V)


def save(path, module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(str(path))
    return path


@pytest.fixture
def saved(tmp_path):
    """Make a teacher of the given parts -> (the eager modules, the path of their file)."""

    def make(encoder=Encoder, decoder=BoolPad, joiner=Joiner, with_simple=True):
        torch.manual_seed(1)
        eager = Teacher(encoder(), decoder(), joiner(), with_simple).eval()
        return eager, save(tmp_path / "jit_script.pt", eager)

    return make


@pytest.fixture
def batch():
    torch.manual_seed(2)
    y = torch.tensor([[3, 4, 5], [6, 7, 0]])
    return torch.randn(2, 100, C), torch.tensor([100, 61]), y


@pytest.mark.parametrize("encoder", [Encoder, EncoderWithStates])
@pytest.mark.parametrize("joiner", [Joiner, ProjectedJoiner])
def test_gives_what_the_eager_modules_give(saved, batch, encoder, joiner):
    eager, path = saved(encoder=encoder, joiner=joiner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = load_scripted(path)
    x, x_lens, y = batch
    encoder_out, lens = teacher.encode(x, x_lens)
    assert encoder_out.shape == (2, 23, E) and subsampled_lens(100) == 24
    assert lens.dtype == torch.int64 and lens.tolist() == [23, 14]
    torch.testing.assert_close(encoder_out, eager.encoder(x, x_lens)[0])
    decoder_out = teacher.decode_labels(y)
    assert decoder_out.shape == (2, 4, D)
    am, lm = teacher.joiner.encoder_proj(encoder_out), teacher.joiner.decoder_proj(decoder_out)
    logits = teacher.joiner(am.unsqueeze(2), lm.unsqueeze(1), project_input=False)
    expected = eager.joiner.output_linear(
        torch.tanh(
            eager.joiner.encoder_proj(eager.encoder(x, x_lens)[0]).unsqueeze(2)
            + eager.joiner.decoder_proj(decoder_out).unsqueeze(1)
        )
    )
    assert logits.shape == (2, 23, 4, V) and teacher.vocab_size == V
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(teacher.joiner(encoder_out.unsqueeze(2), decoder_out.unsqueeze(1)), expected)
    torch.testing.assert_close(teacher.simple_am_proj(encoder_out), eager.simple_am_proj(encoder_out))
    torch.testing.assert_close(teacher.simple_lm_proj(decoder_out), eager.simple_lm_proj(decoder_out))


@pytest.mark.parametrize("decoder", [BoolPad, OffByDefault, TensorPad, PadsItself, NeverPads])
def test_every_row_has_seen_its_labels_however_the_decoder_pads(saved, batch, decoder):
    eager, path = saved(decoder=decoder)
    teacher, y = load_scripted(path), batch[2]
    out = teacher.decode_labels(y)
    context = eager.decoder.context
    for u, (before, last) in enumerate([(0, 0), (0, 3), (3, 4), (4, 5)]):
        torch.testing.assert_close(out[0, u], context(torch.tensor([[before, last]]), 0)[0, 0])


def test_frozen_it_has_no_gradient_and_no_dropout_and_moves_and_copies(saved, batch):
    _, path = saved()
    student = nn.Module()
    student.teacher = Frozen(load_scripted(path))
    student.train()
    teacher = student.teacher.module
    assert not teacher.training and not teacher.encoder.training
    assert not any(p.requires_grad for p in teacher.parameters()) and list(student.parameters()) == []
    x, x_lens, _ = batch
    assert torch.equal(teacher.encode(x, x_lens)[0], teacher.encode(x, x_lens)[0])
    other = copy.deepcopy(student)
    student.to(torch.float64)
    assert teacher.encode(x.double(), x_lens)[0].dtype == torch.float64
    assert other.teacher.module.encode(x, x_lens)[0].dtype == torch.float32
    assert len(list(teacher.parameters())) == 2 + 3 + 6 + 4


def test_a_file_without_simple_heads_has_none_and_no_las(saved):
    teacher = load_scripted(saved(with_simple=False)[1])
    assert teacher.simple_am_proj is None and teacher.simple_lm_proj is None and teacher.las is None


def test_a_chunk_size_is_refused(saved, batch):
    teacher = load_scripted(saved()[1])
    with pytest.raises(ValueError, match="got 8"):
        teacher.encode(batch[0], batch[1], chunk_size=8)


@pytest.mark.parametrize(
    "parts, words",
    [
        ({"encoder": StreamingEncoder}, "features, feature_lengths, states.*streaming"),
        ({"encoder": HalvingEncoder}, "50 frames of 100, ours makes 24"),
        ({"decoder": OtherBlank}, f"blank is token {V - 1}"),
        ({"decoder": TwoRowsEach}, "10 rows for 5 tokens"),
        ({"joiner": ProjectingJoiner}, "project_input"),
        ({"joiner": lambda: Joiner(E + 1)}, "do not go through.*shapes cannot be multiplied"),
    ],
)
def test_unsuitable_parts(saved, parts, words):
    _, path = saved(**parts)
    with pytest.raises(UserError, match=words) as error:
        load_scripted(path)
    assert str(path) in str(error.value)


class NoProjection(nn.Module):
    def forward(self, am: Tensor, lm: Tensor) -> Tensor:
        return am + lm


@pytest.mark.parametrize("missing", ["encoder", "decoder", "joiner", "encoder_proj, decoder_proj"])
def test_a_missing_part_is_named(tmp_path, missing):
    teacher = Teacher(Encoder(), BoolPad(), Joiner())
    if missing in ("encoder", "decoder", "joiner"):
        delattr(teacher, missing)
    else:
        teacher.joiner = NoProjection()
    path = save(tmp_path / "cpu_jit.pt", teacher)
    with pytest.raises(UserError, match=f"cpu_jit.pt has no {missing}[,;]"):
        load_scripted(path)


def test_wrong_files(saved, tmp_path):
    with pytest.raises(UserError, match="nowhere.pt is not there"):
        load_scripted(tmp_path / "nowhere.pt")
    checkpoint, text, half = tmp_path / "pretrained.pt", tmp_path / "tokens.txt", tmp_path / "half.pt"
    torch.save({"model": Encoder().state_dict()}, checkpoint)
    text.write_text("<blk> 0\n")
    content = saved()[1].read_bytes()
    half.write_bytes(content[: len(content) // 2])
    for path in (checkpoint, text, half):
        with pytest.raises(UserError, match=f"{path.name} is no TorchScript file"):
            load_scripted(path)
