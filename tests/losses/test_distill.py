"""Lattice distillation: against its slow twin, its gradients in closed form, masking, shift and weights."""

import sys
from pathlib import Path

import pytest
import torch

from transducer_kd.log import UserError
from transducer_kd.losses.distill import (
    LatticeDistillOptions,
    align_frames,
    full_ranges,
    lattice_kd_loss,
    node_occupancy,
    occupancy_of_arcs,
    shift_ranges,
)
from transducer_kd.losses.distill_reference import lattice_kd_reference
from transducer_kd.losses.pruned_rnnt import make_boundary, prune_ranges, simple_loss
from transducer_kd.losses.rnnt_reference import occupancy as occupancy_reference

sys.path.insert(0, str(Path(__file__).parent))
from loss_problems import assert_close, leaf, make_problem  # noqa: E402

SHAPES = [([1], [0]), ([2], [1]), ([6, 4, 9], [5, 4, 0]), ([8, 5], [2, 4])]
FORMS = ["full", "collapsed"]
Options = LatticeDistillOptions


class Pair:
    """Student and teacher logits (N,T',U+1,V) over the full lattice of a random problem."""

    def __init__(self, frames, tokens, vocab=7, dtype=torch.float64, scale=2.0):
        self.problem = make_problem(frames, tokens, vocab, seed=3, dtype=dtype)
        other = make_problem(frames, tokens, vocab, seed=4, dtype=dtype)
        self.student, self.teacher = scale * self.problem.logits(), scale * other.logits()
        self.symbols, self.boundary = self.problem.symbols, self.problem.boundary
        self.weights = self.problem.weights

    def full(self):
        n, frames, nodes = self.student.shape[:3]
        return full_ranges(n, frames, nodes - 1)

    def pruned(self, s_range):
        p = self.problem
        _, arcs = simple_loss(p.lm, p.am, p.symbols, p.boundary, 0.25, 0.0, "torch")
        return prune_ranges(*arcs, p.boundary, s_range)


def keep(logits, ranges):
    """(N,T',U+1,V) -> (N,T',S,V)."""
    return logits.gather(2, ranges[..., None].expand(*ranges.shape, logits.shape[-1]))


def kd(pair, ranges, options, occupancy=None, **replaced):
    """(losses, counts, gradient of the full lattice's student logits), by the module under test."""
    student, teacher = leaf(replaced.get("student", pair.student)), replaced.get("teacher", pair.teacher)
    losses, counts = lattice_kd_loss(
        keep(student, ranges),
        keep(teacher, shift_ranges(ranges, options.frame_shift)),
        replaced.get("symbols", pair.symbols),
        ranges,
        pair.boundary,
        options,
        occupancy,
    )
    (losses * pair.weights).sum().backward()
    return losses.detach(), counts, student.grad


def kd_reference(pair, ranges, options, occupancy=None):
    student = leaf(pair.student)
    losses, counts = lattice_kd_reference(
        student, pair.teacher, pair.symbols, ranges, pair.boundary, options, occupancy
    )
    (losses * pair.weights).sum().backward()
    return losses.detach(), counts, student.grad


def assert_same(got, expected, tolerance=1e-9):
    for a, b in zip(got, expected):
        assert_close(a, b, tolerance)


def of_nodes(form, student, teacher, token, temperature=1.0):
    """Loss and gradient (V,) of one node: the first of two, where `token` follows, or the only one."""
    tokens = 0 if token is None else 1
    symbols = torch.tensor([[token]] if tokens else [[]], dtype=torch.int64)
    ranges = torch.zeros(1, 1, 1, dtype=torch.int64)
    x = leaf(student)
    losses, counts = lattice_kd_loss(
        x[None, None, None],
        teacher[None, None, None],
        symbols,
        ranges,
        torch.tensor([[0, 0, tokens, 1]]),
        Options(form=form, temperature=temperature),
    )
    assert counts.tolist() == [1]
    losses.sum().backward()
    return losses.detach()[0], x.grad


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    return torch.randn(2, 9, generator=g) * 2


@pytest.mark.parametrize("frames,tokens", SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature,shift", [(1.0, 0), (2.5, 0), (1.0, 2), (0.5, 1)])
@pytest.mark.parametrize("weighting,by", [("uniform", "nodes"), ("occupancy", "frames")])
def test_equals_the_twin(frames, tokens, form, temperature, shift, weighting, by):
    pair = Pair(frames, tokens)
    options = Options(form, temperature, shift, weighting, by)
    passed = None
    if weighting == "occupancy":
        passed = occupancy_reference(pair.teacher, pair.symbols, pair.boundary)
    for ranges in (pair.full(), pair.pruned(2), pair.pruned(3)):
        assert_same(kd(pair, ranges, options, passed), kd_reference(pair, ranges, options, passed))


@pytest.mark.parametrize("by,expected", [("nodes", [36, 20, 9]), ("frames", [6, 4, 9])])
def test_counts(by, expected):
    pair = Pair([6, 4, 9], [5, 4, 0])
    assert kd(pair, pair.full(), Options(normalise_by=by))[1].tolist() == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_models_have_no_loss_and_no_gradient(form, temperature):
    pair = Pair([6, 4], [3, 2], dtype=torch.float32)
    losses, _, gradient = kd(
        pair, pair.full(), Options(form=form, temperature=temperature), teacher=pair.student
    )
    assert losses.tolist() == [0.0, 0.0]
    assert torch.count_nonzero(gradient) == 0


def test_full_gradient_in_closed_form(logits):
    tau = 2.0
    p, q = (logits / tau).softmax(-1)
    _, gradient = of_nodes("full", logits[0], logits[1], token=4, temperature=tau)
    assert_close(gradient, (p - q) / tau * tau**2, 1e-5)


@pytest.mark.parametrize("token", [4, None])
def test_collapsed_gradient_in_closed_form(logits, token):
    p, q = logits.softmax(-1)
    single = [0] if token is None else [0, token]
    p_rest, q_rest = 1 - p[single].sum(), 1 - q[single].sum()
    expected = p * (1 - q_rest / p_rest)
    expected[single] = (p - q)[single]
    _, gradient = of_nodes("collapsed", logits[0], logits[1], token)
    assert_close(gradient, expected, 1e-5)


def test_collapsed_values_by_hand():
    # p = (1/2, 1/4, 1/8, 1/8), q = (1/4, 1/4, 1/2, 0), blank first.
    p = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    q = torch.tensor([0.25, 0.25, 0.5, 1e-30]).log()
    # Token 2: classes (1/8, 1/2, 3/8) against (1/2, 1/4, 1/4).
    expected = torch.tensor([0.5, 0.25, 0.25]) @ torch.tensor([4.0, 0.5, 2 / 3]).log()
    assert_close(of_nodes("collapsed", p, q, token=2)[0], expected, 1e-6)
    # At u = U token 2 is one of the rest: (1/2, 1/2) against (1/4, 3/4).
    expected = torch.tensor([0.25, 0.75]) @ torch.tensor([0.5, 1.5]).log()
    assert_close(of_nodes("collapsed", p, q, token=None)[0], expected, 1e-6)


def test_collapsed_forgets_what_the_rest_is(logits):
    moved = logits[1].clone()
    moved[[1, 2, 3, 5, 6, 7, 8]] = logits[1][[8, 3, 2, 7, 1, 5, 6]]
    expected = of_nodes("collapsed", logits[0], logits[1], token=4)
    assert_same(of_nodes("collapsed", logits[0], moved, token=4), expected, 1e-6)
    assert not torch.allclose(of_nodes("full", logits[0], moved, token=4)[0], expected[0])


@pytest.mark.parametrize("form", FORMS)
def test_temperature_divides_both_logits_and_squares(form, logits):
    tau = 2.0
    soft, soft_gradient = of_nodes(form, logits[0], logits[1], 4, temperature=tau)
    plain, plain_gradient = of_nodes(form, logits[0] / tau, logits[1] / tau, 4)
    assert_close(soft, tau**2 * plain, 1e-6)
    assert_close(soft_gradient, tau * plain_gradient, 1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighting", ["uniform", "occupancy"])
@pytest.mark.parametrize("garbage", [1e4, float("inf"), float("nan")])
def test_padding_changes_nothing(form, weighting, garbage):
    options = Options(form=form, weighting=weighting, frame_shift=1)
    pair = Pair([7, 4], [4, 2])
    # The rows without a partner, student t < 1 and each teacher's last frame, are no padding but equal to it.
    mask = torch.zeros(pair.student.shape[:3], dtype=torch.bool)
    mask[0], mask[1, :4, :3] = True, True
    symbols = pair.symbols.clone()
    symbols[1, 2:] = 5
    teacher = pair.teacher.masked_fill(~mask[..., None], garbage)
    student = pair.student.masked_fill(~mask[..., None], -garbage)
    passed = dirty = None
    if weighting == "occupancy":
        passed = node_occupancy(pair.teacher, pair.symbols, pair.full(), pair.boundary)
        dirty = node_occupancy(teacher, symbols, pair.full(), pair.boundary)
        assert_close(dirty, passed, 1e-12)
    expected = kd(pair, pair.full(), options, passed)
    got = kd(pair, pair.full(), options, dirty, student=student, teacher=teacher, symbols=symbols)
    assert_same(got, expected, 1e-12)
    assert torch.count_nonzero(got[2][~mask]) == 0
    assert torch.count_nonzero(got[2][:, 0]) == 0  # t < frame_shift

    # The short utterance alone, without the padding.
    alone = Pair([4], [2])
    alone.student, alone.teacher = pair.student[1:, :4, :3], pair.teacher[1:, :4, :3]
    alone.symbols, alone.weights = pair.symbols[1:, :2], pair.weights[1:]
    passed = None if passed is None else passed[1:, :4, :3]
    losses, counts, gradient = kd(alone, alone.full(), options, passed)
    assert_same((losses, counts, gradient), (got[0][1:], got[1][1:], got[2][1:, :4, :3]), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_pruned_equals_full_when_all_nodes_are_kept(form):
    pair = Pair([7, 5], [3, 2])
    ranges = pair.pruned(9)
    assert ranges.shape == (2, 7, 4)
    assert_same(kd(pair, ranges, Options(form=form)), kd(pair, pair.full(), Options(form=form)))


@pytest.mark.parametrize("form", FORMS)
def test_a_late_copy_of_the_teacher_has_no_loss_at_its_shift(form):
    pair = Pair([9, 6], [4, 2])
    late = torch.cat([pair.student[:, :2], pair.teacher[:, :-2]], dim=1)
    ranges = pair.pruned(3)
    losses, counts, gradient = kd(pair, ranges, Options(form=form, frame_shift=2), student=late)
    assert losses.tolist() == [0.0, 0.0] and counts.tolist() == [7 * 3, 4 * 3]
    assert torch.count_nonzero(gradient) == 0
    assert (kd(pair, ranges, Options(form=form, frame_shift=1), student=late)[0] > 0.1).all()


@pytest.mark.parametrize("shift", [3, 4, 9])
def test_an_utterance_shorter_than_the_shift_counts_for_nothing(shift):
    pair = Pair([3, 3], [2, 1])
    passed = occupancy_reference(pair.teacher, pair.symbols, pair.boundary)
    for weighting, given in (("uniform", None), ("occupancy", passed)):
        options = Options(frame_shift=shift, weighting=weighting, normalise_by="frames")
        losses, counts, gradient = kd(pair, pair.full(), options, given)
        assert losses.tolist() == [0.0, 0.0] and counts.tolist() == [0.0, 0.0]
        assert torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("frames,tokens", SHAPES)
def test_occupancy_equals_the_reference(frames, tokens):
    pair = Pair(frames, tokens)
    expected = occupancy_reference(pair.teacher, pair.symbols, pair.boundary)
    assert_close(node_occupancy(pair.teacher, pair.symbols, pair.full(), pair.boundary), expected, 1e-9)


def test_occupancy_of_a_pruned_lattice_and_of_arcs():
    pair = Pair([8, 5], [5, 3])
    ranges = pair.pruned(3)
    kept = torch.zeros(pair.student.shape[:3], dtype=torch.bool).scatter(2, ranges, True)
    passed = node_occupancy(keep(pair.teacher, ranges), pair.symbols, ranges, pair.boundary)
    assert torch.count_nonzero(passed[~kept]) == 0
    # Each of the T' + U diagonals of nodes is crossed once.
    assert_close(passed.sum((1, 2)), torch.tensor([8.0 + 5, 5.0 + 3]), 1e-9)
    p = pair.problem
    _, arcs = simple_loss(p.lm, p.am, p.symbols, p.boundary, 0.0, 0.0, "torch")
    expected = occupancy_reference(p.logits(), p.symbols, p.boundary)
    assert_close(occupancy_of_arcs(*arcs), expected, 1e-9)


@pytest.mark.parametrize("by", ["nodes", "frames"])
def test_occupancy_weights_sum_to_the_count(by):
    # A divergence that is the same at every node: then the loss is that, times the sum of the weights.
    pair = Pair([6, 4], [3, 2])
    pair.student, pair.teacher = (
        x[:1, :1, :1].expand(pair.student.shape) for x in (pair.student, pair.teacher)
    )
    passed = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(0)) + 0.01
    options = Options(form="full", weighting="occupancy", normalise_by=by)
    losses, counts, _ = kd(pair, pair.full(), options, passed)
    one, _ = of_nodes("full", pair.student[0, 0, 0], pair.teacher[0, 0, 0], token=1)
    assert_close(losses / counts, one.expand(2), 1e-9)


def test_without_occupancy_on_the_compared_nodes_weights_are_equal():
    pair = Pair([6, 4], [3, 2])
    got = kd(pair, pair.full(), Options(weighting="occupancy"), torch.zeros(2, 6, 4))
    assert_same(got, kd(pair, pair.full(), Options()))


@pytest.mark.parametrize("form", FORMS)
def test_teacher_and_occupancy_get_no_gradient(form):
    pair = Pair([5, 4], [3, 2])
    student, teacher = leaf(pair.student), leaf(pair.teacher)
    ranges = pair.full()
    passed = leaf(node_occupancy(teacher, pair.symbols, ranges, pair.boundary))
    losses, counts = lattice_kd_loss(
        student, teacher, pair.symbols, ranges, pair.boundary, Options(form, weighting="occupancy"), passed
    )
    assert not counts.requires_grad
    losses.sum().backward()
    assert teacher.grad is None and passed.grad is None and torch.count_nonzero(student.grad) > 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_extreme_logits_stay_finite(form, scale):
    pair = Pair([6, 4], [3, 2], dtype=torch.float32, scale=scale)
    passed = node_occupancy(pair.teacher, pair.symbols, pair.full(), pair.boundary)
    losses, _, gradient = kd(pair, pair.full(), Options(form=form, weighting="occupancy"), passed)
    assert torch.isfinite(losses).all() and torch.isfinite(gradient).all() and (losses >= 0).all()


def test_a_vanishing_rest_does_not_cancel():
    # The rest has about 1e-11 of the mass, far below what 1 - p_token - p_blank resolves in float32.
    student, teacher = torch.tensor([[0.0, 1.0, -25.0, -26.0], [0.0, 1.0, -27.0, -24.0]])
    _, gradient = of_nodes("collapsed", student, teacher, token=1)
    _, exact = of_nodes("collapsed", student.double(), teacher.double(), token=1)
    torch.testing.assert_close(gradient[2:].double(), exact[2:], rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_under_autocast_is_computed_in_float32(form):
    pair = Pair([6, 4], [3, 2], dtype=torch.float32)
    student, teacher = leaf(pair.student.bfloat16()), pair.teacher.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = lattice_kd_loss(
            student, teacher, pair.symbols, pair.full(), pair.boundary, Options(form=form)
        )
    assert losses.dtype == torch.float32
    (losses * pair.weights).sum().backward()
    assert student.grad.dtype == torch.bfloat16
    expected = kd(pair, pair.full(), Options(form=form), student=student.float(), teacher=teacher.float())
    assert_close(losses.detach(), expected[0], 1e-5)
    assert_close(student.grad.float(), expected[2], 1e-2)


def test_align_frames_trims_up_to_two():
    student, teacher = torch.randn(2, 8, 3), torch.randn(2, 6, 5)
    lens = torch.tensor([8, 5]), torch.tensor([6, 5])
    got_student, got_teacher, got_lens = align_frames(student, teacher, *lens)
    assert torch.equal(got_student, student[:, :6]) and torch.equal(got_teacher, teacher)
    assert got_lens.tolist() == [6, 5]
    got_teacher, got_student, got_lens = align_frames(teacher, student, *reversed(lens))
    assert got_student.shape == (2, 6, 3) and got_teacher.shape == (2, 6, 5) and got_lens.tolist() == [6, 5]


@pytest.mark.parametrize(
    "frames,lens,named",
    [((9, 6), ([9, 5], [6, 5]), ("9", "6")), ((8, 8), ([8, 7], [8, 4]), ("7", "4"))],
)
def test_frames_that_differ_by_more_than_two_name_both_results(frames, lens, named):
    student, teacher = torch.zeros(2, frames[0], 1), torch.zeros(2, frames[1], 1)
    with pytest.raises(UserError, match=rf"student's subsampling.*{named[0]}.*teacher's.*{named[1]}"):
        align_frames(student, teacher, torch.tensor(lens[0]), torch.tensor(lens[1]))


def test_loss_of_trimmed_outputs():
    pair = Pair([8, 5], [3, 2])
    student, teacher, lens = align_frames(
        pair.student, pair.teacher[:, :7], pair.boundary[:, 3], torch.tensor([7, 5])
    )
    boundary = make_boundary(pair.boundary[:, 2], lens)
    losses, counts = lattice_kd_loss(
        student, teacher, pair.symbols, full_ranges(2, 7, 3), boundary, Options(normalise_by="frames")
    )
    pair.boundary = boundary
    assert counts.tolist() == [7, 5]
    assert_close(losses, kd(pair, pair.full(), Options())[0], 1e-9)


@pytest.mark.parametrize(
    "values,named",
    [
        ({"form": "half"}, "form='half'"),
        ({"weighting": "path"}, "weighting='path'"),
        ({"normalise_by": "batch"}, "normalise_by='batch'"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"frame_shift": -1}, "frame_shift=-1"),
    ],
)
def test_senseless_options_are_errors_that_name_the_key(values, named):
    with pytest.raises(UserError, match=named):
        Options(**values)


def test_what_does_not_fit_is_refused():
    pair = Pair([5, 4], [3, 2])
    rest = pair.symbols, pair.full(), pair.boundary
    with pytest.raises(ValueError, match="same nodes and vocabulary"):
        lattice_kd_loss(pair.student, pair.teacher[:, :4], *rest, Options())
    with pytest.raises(ValueError, match="do not fit ranges"):
        lattice_kd_loss(pair.student[:, :4], pair.teacher[:, :4], *rest, Options())
    with pytest.raises(ValueError, match="at least 3"):
        lattice_kd_loss(pair.student[..., :2], pair.teacher[..., :2], *rest, Options())
    with pytest.raises(ValueError, match="occupancy"):
        lattice_kd_loss(pair.student, pair.teacher, *rest, Options(weighting="occupancy"))
