"""Distillation as an objective: which nodes, whose features, whose gradients, and what a weight means."""

import copy
import dataclasses
from itertools import product

import pytest
import torch

from transducer_kd.config import DistillConfig, LossConfig, SpecAugmentConfig
from transducer_kd.log import UserError
from transducer_kd.losses import distill as kd
from transducer_kd.losses import pruned_rnnt
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.objectives import distill as distill_module
from transducer_kd.objectives.distill import DistillObjective, teacher_pass
from transducer_kd.objectives.transducer import TransducerObjective

WIDE = 99  # an s_range that keeps every node


@pytest.fixture
def build(make_model):
    """Function: DistillObjective of a student (encoder 16 wide) and a teacher (24 wide, another seed)."""

    def make(student=None, teacher=None, s_range=3, augment=None, warm_step=0, **distill):
        student = make_model() if student is None else student
        teacher = make_model(24, seed=1) if teacher is None else teacher
        loss = LossConfig(backend="torch", s_range=s_range, warm_step=warm_step)
        augment = SpecAugment(augment or SpecAugmentConfig(enabled=False))
        options = DistillConfig(**{"weight": 2.0, **distill})
        return DistillObjective(student, loss, augment, options, Frozen(teacher))

    return make


def kd_of(objective, batch):
    """lattice_kd (N,), and the passes that it was computed from."""
    done, taught, _, _ = objective.first_pass(batch, 0)
    return objective.lattice_kd(done, taught, batch), done, taught


def every_node_of(model, encoder_out, decoder_out):
    return model.joiner(encoder_out[:, :, None], decoder_out[:, None])


def spy(monkeypatch, name):
    """Arguments of all calls of kd.<name>, which still does what it does."""
    calls, original = [], getattr(kd, name)

    def wrapped(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(kd, name, wrapped)
    return calls


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("lattice", ["pruned", "full"])
@pytest.mark.parametrize("form", ["full", "collapsed"])
def test_a_teacher_equal_to_the_student_teaches_nothing(build, batch, gradients, make_model, lattice, form):
    student = make_model()
    for teacher, is_same in ((copy.deepcopy(student), True), (make_model(seed=5), False)):
        objective = build(student, teacher, lattice=lattice, form=form).train()
        loss = kd_of(objective, batch)[0]
        gradient = max(float(g.abs().max()) for g in gradients(student, loss.sum()).values())
        assert (loss.abs() < 1e-4).all() == is_same and (gradient < 1e-4) == is_same
        assert is_same or ((loss > 0.1).all() and gradient > 0.1)
        total = objective(batch, 0).metrics
        expected = total["simple_loss"] * 0.5 + total["pruned_loss"] + 2.0 * loss.sum().detach()
        torch.testing.assert_close(total["loss"], expected)


@pytest.mark.parametrize("utterances_at_once", [1, 4])
@pytest.mark.parametrize(
    "options, more",
    [
        ({"form": "full"}, 0),
        ({"form": "collapsed", "normalise_by": "frames", "frame_shift": 2}, 0),
        ({"form": "full", "weighting": "occupancy", "temperature": 2.0}, 1),
        ({"form": "collapsed", "weighting": "occupancy", "frame_shift": 3}, -1),
    ],
)
def test_pruned_is_the_full_lattice_where_nothing_is_pruned(
    build, batch, gradients, make_model, other_length, utterances_at_once, options, more
):
    found = []
    teacher = other_length(make_model(24, seed=1), more)
    for lattice in ("pruned", "full"):
        objective = build(
            None, teacher, WIDE, lattice=lattice, utterances_at_once=utterances_at_once, **options
        ).train()
        loss = kd_of(objective, batch)[0]
        found.append((loss.detach(), gradients(objective.model, loss.sum() / 50)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], atol=1e-5, rtol=1e-4, msg=name)
    assert (found[0][0] > 0.1).all() and found[0][1]["joiner.output_linear.weight"].abs().max() > 0.01


def test_value_on_every_node_written_out(build, batch):
    """Mean over an utterance's nodes of KL(teacher || student), once for each of its frames."""
    objective = build(lattice="full").eval()
    loss, done, taught = kd_of(objective, batch)
    log_p = every_node_of(objective.model, done.encoder_out, done.decoder_out).log_softmax(-1)
    log_q = every_node_of(objective.teacher, taught.encoder_out, taught.decoder_out).log_softmax(-1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    for n, (t, u) in enumerate(zip(done.encoder_out_lens, batch.y_lens)):
        torch.testing.assert_close(loss[n], divergence[n, :t, : u + 1].mean() * t, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("ranges_from", ["student", "teacher"])
@pytest.mark.parametrize("frame_shift, more", [(0, 0), (2, -1)])
def test_value_on_the_pruned_nodes_written_out(
    build, batch, make_model, other_length, ranges_from, frame_shift, more
):
    """Node (t, u) of the student beside (t - d, u) of the teacher, for the nodes that the student has."""
    teacher = other_length(make_model(24, seed=1), more)
    objective = build(None, teacher, ranges_from=ranges_from, frame_shift=frame_shift).eval()
    loss, done, taught = kd_of(objective, batch)
    log_p = every_node_of(objective.model, done.encoder_out, done.decoder_out).log_softmax(-1)
    log_q = every_node_of(teacher, taught.encoder_out, taught.decoder_out).log_softmax(-1)
    for n, frames in enumerate(done.encoder_out_lens.tolist()):
        nodes = [
            (t, u)
            for t in range(frame_shift, frames + more)
            for u in done.ranges[n, t].tolist()
            if u <= batch.y_lens[n]
        ]
        divergences = []
        for t, u in nodes:
            p, q = log_p[n, t, u], log_q[n, t - frame_shift, u]
            divergences.append((q.exp() * (q - p)).sum())
        expected = torch.stack(divergences).mean() * frames
        torch.testing.assert_close(loss[n], expected, atol=1e-4, rtol=1e-5)


# ---------------------------------------------------------------- nodes


@pytest.mark.parametrize("frame_shift", [0, 3])
@pytest.mark.parametrize("more", [-2, 0, 1])
def test_both_losses_are_on_the_teachers_bounds(
    build, batch, make_model, other_length, monkeypatch, frame_shift, more
):
    teacher = other_length(make_model(24, seed=1), more)
    objective = build(None, teacher, ranges_from="teacher", frame_shift=frame_shift).eval()
    calls = spy(monkeypatch, "lattice_kd_loss")
    loss, done, taught = kd_of(objective, batch)
    boundary = pruned_rnnt.make_boundary(batch.y_lens, taught.encoder_out_lens)
    am, lm = teacher.simple_am_proj(taught.encoder_out), teacher.simple_lm_proj(taught.decoder_out)
    _, own = pruned_rnnt.simple_loss(lm, am, batch.y, boundary, 0.25, 0.0, "torch")
    expected = pruned_rnnt.prune_ranges(*own, boundary, 3)
    student_own = build().eval().transducer_pass(batch.features, batch).ranges
    assert not torch.equal(done.ranges, student_own)
    for n, t in enumerate(done.encoder_out_lens.tolist()):
        u = int(batch.y_lens[n])
        if frame_shift == 0:
            assert torch.equal(done.ranges[n, : t - 3], expected[n, : t - 3])
        # The teacher's window of a frame is the student's `frame_shift` later, but where paths begin and end.
        inside = slice(u // 2 + frame_shift, t - 3)
        moved = expected[n, inside.start - frame_shift : inside.stop - frame_shift]
        assert (done.ranges[n, inside] - moved).abs().float().mean() < 0.5
        assert done.ranges[n, 0, 0] == 0 and done.ranges[n, t - 1, -1] == max(u, 2)
    assert torch.isfinite(done.pruned_loss).all() and torch.isfinite(loss).all()
    assert torch.equal(calls[-1][3], done.ranges[:, : calls[-1][3].shape[1]])


@pytest.mark.parametrize("lattice", ["pruned", "full"])
@pytest.mark.parametrize("frame_shift, more", [(0, 0), (2, 0), (0, -1), (0, 1), (3, -1)])
def test_occupancy_is_the_teachers_posterior(
    build, batch, make_model, other_length, monkeypatch, lattice, frame_shift, more
):
    teacher = other_length(make_model(24, seed=1), more)
    objective = build(
        None, teacher, WIDE, lattice=lattice, weighting="occupancy", frame_shift=frame_shift,
        utterances_at_once=4,
    ).eval()  # fmt: skip
    calls = spy(monkeypatch, "lattice_kd_loss")
    _, done, taught = kd_of(objective, batch)
    lens = torch.minimum(done.encoder_out_lens, taught.encoder_out_lens)
    t, u = int(lens.max()), batch.y.shape[1]
    logits = every_node_of(teacher, taught.encoder_out[:, :t], taught.decoder_out)
    boundary = pruned_rnnt.make_boundary(batch.y_lens, lens)
    expected = kd.node_occupancy(logits, batch.y, kd.full_ranges(3, t, u), boundary)
    torch.testing.assert_close(calls[-1][-1], expected, atol=1e-5, rtol=1e-4)
    valid = expected[1, : lens[1], : batch.y_lens[1] + 1]
    assert valid.max() > 5 * valid.mean()  # a posterior with something to say


@pytest.mark.parametrize("frame_shift, more", [(0, -1), (3, 0), (3, -2)])
def test_occupancy_follows_the_pruned_windows_to_the_end(
    build, batch, make_model, other_length, monkeypatch, frame_shift, more
):
    """Windows for the teacher's posterior are the student's, `frame_shift` earlier, and legal paths."""
    teacher = other_length(make_model(24, seed=1), more)
    objective = build(None, teacher, weighting="occupancy", frame_shift=frame_shift).eval()
    calls = spy(monkeypatch, "node_occupancy")
    _, done, _ = kd_of(objective, batch)
    _, _, kept, boundary = calls[-1]
    passed = kd.node_occupancy(*calls[-1])
    for n, t in enumerate(boundary[:, 3].tolist()):
        u = int(batch.y_lens[n])
        inside = slice(u // 2, t - frame_shift - u // 2)
        moved = done.ranges[n, inside.start + frame_shift : inside.stop + frame_shift]
        assert (kept[n, inside] - moved).abs().float().mean() < 0.5
        torch.testing.assert_close(passed[n].sum(), torch.tensor(float(t + u)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"lattice": "full"}, {"ranges_from": "teacher"}])
@pytest.mark.parametrize("weighting", ["uniform", "occupancy"])
def test_a_batch_shorter_than_the_shift_teaches_nothing(build, make_batch, options, weighting):
    batch = make_batch((31, 27), (2, 1))
    objective = build(frame_shift=9, weighting=weighting, **options).train()
    loss, done, _ = kd_of(objective, batch)
    assert done.encoder_out_lens.tolist() == [7, 6] and loss.tolist() == [0.0, 0.0]
    assert torch.isfinite(objective(batch, 0).loss_sum)


@pytest.mark.parametrize("lattice", ["pruned", "full"])
@pytest.mark.parametrize("weighting", ["uniform", "occupancy"])
def test_a_teacher_that_cannot_emit_so_many_tokens_does_no_harm(
    build, make_batch, make_model, other_length, lattice, weighting
):
    """T' = U for the student, and a frame fewer for the teacher: no path is left in the common lattice.

    Also alone in a batch, where no padding hides it.
    """
    for ranges_from, lens in product(("student", "teacher"), ((61, 31), (31,))):
        batch = make_batch(lens, (4, 7)[-len(lens) :])
        teacher = other_length(make_model(24, seed=1), -1)
        objective = build(
            None, teacher, lattice=lattice, weighting=weighting, ranges_from=ranges_from
        ).train()
        out = objective(batch, 0)
        assert out.encoder_out_lens.tolist() == [14, 7][-len(lens) :] and torch.isfinite(out.losses).all()
        out.loss_sum.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in objective.model.parameters())


@pytest.mark.parametrize("lattice", ["pruned", "full"])
def test_another_subsampling_is_an_error(build, batch, make_model, other_length, lattice):
    objective = build(None, other_length(make_model(24, seed=1), -3), lattice=lattice)
    with pytest.raises(UserError, match="student's subsampling gives 21 .* the teacher's gives 18"):
        objective(batch, 0)


def test_bounds_of_a_teacher_without_simple_projections_are_refused(build, make_model):
    teacher = make_model(24, seed=1)
    teacher.simple_am_proj = teacher.simple_lm_proj = None
    assert build(None, teacher, ranges_from="student")
    with pytest.raises(UserError, match="no simple_am_proj and simple_lm_proj .*ranges_from=student"):
        build(None, teacher, ranges_from="teacher")


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "options",
    [
        {"lattice": "pruned", "weighting": "occupancy", "frame_shift": 1},
        {"lattice": "full", "form": "collapsed"},
        {"ranges_from": "teacher", "frame_shift": 2},
    ],
)
def test_padding_changes_nothing(build, make_batch, rows_of, options):
    objective = build(**options).eval()
    batch = make_batch()
    padded = make_batch(extra_frames=37, extra_tokens=5)
    padded.y[padded.y == 0] = 7
    got, expected = objective(padded, 0), objective(batch, 0)
    torch.testing.assert_close(got.losses, expected.losses, atol=1e-4, rtol=1e-5)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(got.metrics[name], value, atol=2e-4, rtol=1e-5)
    for n in range(3):
        alone = objective(rows_of(batch, slice(n, n + 1)), 0)
        torch.testing.assert_close(alone.losses, expected.losses[n : n + 1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("lattice", ["pruned", "full"])
@pytest.mark.parametrize("normalise_by", ["nodes", "frames"])
@pytest.mark.parametrize("weighting", ["uniform", "occupancy"])
def test_beta_means_the_same_however_utterances_are_batched(
    build, make_batch, rows_of, gradients, lattice, normalise_by, weighting
):
    """The trainer's division by all frames, of one batch or of several accumulated ones."""
    objective = build(lattice=lattice, normalise_by=normalise_by, weighting=weighting).train()
    batch = make_batch()
    together = objective(batch, 0)
    expected = gradients(objective.model, together.loss_sum / together.num_frames)
    pieces = [objective(rows_of(batch, rows), 0) for rows in (slice(0, 1), slice(1, 3))]
    frames = sum(piece.num_frames for piece in pieces)
    assert frames == together.num_frames
    got = gradients(objective.model, sum(piece.loss_sum for piece in pieces) / frames)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=2e-5, rtol=1e-3, msg=name)
    # Twice the same utterances are the same means.
    twice = dataclasses.replace(
        batch,
        **{f: torch.cat([getattr(batch, f)] * 2) for f in ("features", "feature_lens", "y", "y_lens")},
    )
    doubled = objective(twice, 0)
    kd_mean, expected_mean = (o.metrics["kd_loss"] / o.num_frames for o in (doubled, together))
    torch.testing.assert_close(kd_mean, expected_mean, atol=1e-5, rtol=1e-5)


def test_normalise_by_says_what_a_frame_is_worth(build, batch):
    """By frames, the nodes of a frame are summed: s_range times the mean over nodes."""
    by_nodes, by_frames = (
        kd_of(build(s_range=2, normalise_by=by).eval(), batch)[0] for by in ("nodes", "frames")
    )
    torch.testing.assert_close(by_frames, 2 * by_nodes, atol=1e-4, rtol=1e-4)


def test_an_utterance_without_tokens(build, make_batch, rows_of):
    batch = make_batch((61, 47), (3, 0))
    for lattice in ("pruned", "full"):
        objective = build(lattice=lattice, weighting="occupancy", utterances_at_once=1).train()
        losses = objective(batch, 0).losses
        assert torch.isfinite(losses).all() and (losses > 0).all()


# ---------------------------------------------------------------- teacher and student


@pytest.mark.parametrize("lattice", ["pruned", "full"])
@pytest.mark.parametrize("form", ["full", "collapsed"])
def test_gradient_reaches_the_whole_student_and_not_the_teacher(build, batch, gradients, lattice, form):
    objective = build(lattice=lattice, form=form, ranges_from="teacher").train()
    teacher = copy.deepcopy(objective.teacher.state_dict())
    found = gradients(objective.model, kd_of(objective, batch)[0].sum())
    without = {n.split(".")[0] for n, g in found.items() if not g.abs().sum() > 0}
    assert without == {"simple_am_proj", "simple_lm_proj"}  # these have their own loss
    objective(batch, 0).loss_sum.backward()
    for name, p in objective.teacher.named_parameters():
        assert p.grad is None and not p.requires_grad and torch.equal(p, teacher[name])
    assert {n.split(".")[0] for n, _ in objective.named_parameters()} == {"model"}
    assert {n.split(".")[0] for n in objective.state_dict()} == {"model"}


def test_the_teacher_is_never_in_train_mode(build, batch, make_model):
    objective = build(make_model(dropout=0.5), make_model(24, seed=1, dropout=0.5)).train()
    assert objective.model.training and not any(m.training for m in objective.teacher.modules())
    a, b = (teacher_pass(objective.teacher, batch) for _ in range(2))
    assert torch.equal(a.encoder_out, b.encoder_out) and torch.equal(a.decoder_out, b.decoder_out)
    students = [objective.transducer_pass(batch.features, batch).encoder_out for _ in range(2)]
    assert not torch.equal(*students)  # the dropout is there


def test_only_the_student_sees_augmented_features_of_the_same_length(build, batch, monkeypatch):
    augment = SpecAugmentConfig(max_time_mask_fraction=0.5)
    objective = build(augment=augment).train()
    seen = {}

    def record(who, model):
        original = model.encode
        monkeypatch.setattr(
            model,
            "encode",
            lambda x, *rest, **kw: (seen.update({who: x.clone()}), original(x, *rest, **kw))[1],
        )

    record("student", objective.model)
    record("teacher", objective.teacher)
    clean = batch.features.clone()
    _, done, taught = kd_of(objective, batch)
    assert torch.equal(seen["teacher"], clean) and torch.equal(batch.features, clean)
    assert seen["student"].shape == clean.shape and not torch.equal(seen["student"], clean)
    assert torch.equal(done.encoder_out_lens, taught.encoder_out_lens)
    objective.eval()(batch, 0)
    assert torch.equal(seen["student"], clean)


def test_a_control_without_teacher_is_the_plain_objective(make_model, batch):
    model, loss = make_model(with_ctc=True), LossConfig(backend="torch", s_range=3, ctc_weight=0.5)
    augment = SpecAugment(SpecAugmentConfig(enabled=False))
    control = DistillObjective(model, loss, augment, DistillConfig(ranges_from="teacher"), None).train()
    plain = TransducerObjective(model, loss, augment).train()
    got, expected = control(batch, 3), plain(batch, 3)
    assert torch.equal(got.losses, expected.losses) and got.metrics.keys() == expected.metrics.keys()


def test_shifted_occupancies_repeat_the_ends_of_each_utterance():
    px = torch.arange(1.0, 6.0).repeat(2, 1, 1)
    py = torch.stack([px[0], 10 * px[0]])[None].reshape(2, 1, 5).repeat(1, 2, 1)
    lens = torch.tensor([5, 3])
    later = distill_module._shifted((px, py), 2, 6, lens)
    assert later[0].tolist() == [[[1, 1, 1, 2, 3, 4]], [[1, 1, 1, 2, 3, 3]]]
    earlier = distill_module._shifted((px, py), -2, 4, lens)
    assert earlier[0].tolist() == [[[3, 4, 5, 5]], [[3, 3, 3, 3]]]
    assert earlier[1][1].tolist() == [[30, 30, 30, 30]] * 2


# ---------------------------------------------------------------- pseudo-labelled utterances

PSEUDO = {"utterances": "pseudo"}
MIXED_OPTIONS = [
    {"lattice": "full", "form": "collapsed"},
    {"ranges_from": "teacher", "frame_shift": 2},
    {"weighting": "occupancy", "frame_shift": 3},
]


def mark(batch, *rows):
    """The batch with the utterances `rows` pseudo-labelled."""
    is_pseudo = torch.zeros(len(batch.y_lens), dtype=torch.bool)
    is_pseudo[list(rows)] = True
    return dataclasses.replace(batch, is_pseudo=is_pseudo)


def store(batch, teacher):
    """The batch with what the teacher's encoder gives for its pseudo-labelled utterances."""
    rows = batch.is_pseudo.nonzero()[:, 0]
    taught = teacher_pass(teacher, batch.select(rows))
    teacher_out = torch.zeros(len(batch.y_lens), *taught.encoder_out.shape[1:])
    lens = torch.zeros_like(batch.feature_lens)
    teacher_out[rows], lens[rows] = taught.encoder_out, taught.encoder_out_lens
    return dataclasses.replace(batch, teacher_out=teacher_out, teacher_out_lens=lens)


def refuse(*_, **__):
    raise AssertionError("the teacher was run")


@pytest.mark.parametrize("more", [-1, 0, 1])
@pytest.mark.parametrize("rows", [(2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("options", MIXED_OPTIONS)
def test_a_stored_teacher_is_the_teacher(
    build, batch, make_model, other_length, gradients, monkeypatch, rows, more, options
):
    teacher = other_length(make_model(24, seed=1), more).eval()
    batch = mark(batch, *rows)
    run = build(None, teacher, **PSEUDO, **options).train()
    expected = run(batch, 0)
    expected_gradients = gradients(run.model, expected.loss_sum)
    stored = build(None, teacher, stored=True, **PSEUDO, **options).train()
    batch = store(batch, teacher)
    monkeypatch.setattr(teacher, "encode", refuse)
    got = stored(batch, 0)
    torch.testing.assert_close(got.losses, expected.losses)
    for name, value in gradients(stored.model, got.loss_sum).items():
        torch.testing.assert_close(value, expected_gradients[name], msg=name)
    assert (expected.metrics["kd_loss"] > 1).all()


@pytest.mark.parametrize("pseudo_weight", [0.0, 0.5])
@pytest.mark.parametrize("is_stored", [False, True])
@pytest.mark.parametrize("options", MIXED_OPTIONS)
def test_a_mixed_batch_is_the_sum_of_its_utterances(
    build, make_batch, rows_of, gradients, options, is_stored, pseudo_weight
):
    """The longest is labelled: what is distilled has padding that it does not need."""
    objective = build(**PSEUDO, **options, stored=is_stored).train()
    objective.loss.pseudo_weight = pseudo_weight
    batch = mark(make_batch((61, 90, 47, 72), (4, 7, 2, 5)), 0, 2)
    alone = [rows_of(batch, slice(n, n + 1)) for n in range(4)]
    if is_stored:
        batch = store(batch, objective.teacher)
        alone = [store(one, objective.teacher) if one.is_pseudo[0] else one for one in alone]
    together, pieces = objective(batch, 0), [objective(one, 0) for one in alone]
    torch.testing.assert_close(
        together.losses, torch.cat([piece.losses for piece in pieces]), atol=1e-4, rtol=1e-5
    )
    expected = gradients(objective.model, sum(piece.loss_sum for piece in pieces))
    for name, value in gradients(objective.model, together.loss_sum).items():
        torch.testing.assert_close(value, expected[name], atol=1e-3, rtol=1e-3, msg=name)
    for name, value in together.metrics.items():
        expected_sum = sum(piece.metrics[name] for piece in pieces)
        torch.testing.assert_close(value, expected_sum, atol=1e-3, rtol=1e-5, msg=name)
    # kd_loss / kd_share is the mean over the frames that are distilled on.
    frames = together.encoder_out_lens[[0, 2]].sum()
    assert together.metrics["kd_share"] == frames < together.num_frames


@pytest.mark.parametrize("options", MIXED_OPTIONS)
def test_soft_targets_alone_teach_on_pseudo_labels(build, batch, gradients, rows_of, options):
    """Transducer loss on the labelled utterances, distillation on the others, and nothing else."""
    objective = build(**PSEUDO, **options).train()
    objective.loss.pseudo_weight = 0.0
    model = objective.model
    found = gradients(model, objective(mark(batch, 0), 0).loss_sum)
    augment = SpecAugment(SpecAugmentConfig(enabled=False))
    plain = TransducerObjective(model, objective.loss, augment).train()
    everywhere = build(model, objective.teacher, **options).train()
    labelled = plain(rows_of(batch, slice(1, 3)), 0).loss_sum
    expected = gradients(model, labelled + 2.0 * kd_of(everywhere, rows_of(batch, slice(0, 1)))[0].sum())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=1e-3, msg=name)
    of_distillation = gradients(model, kd_of(objective, mark(batch, 0))[0][1:].sum())
    assert all((g == 0).all() for g in of_distillation.values())


@pytest.mark.parametrize("options", [*MIXED_OPTIONS, {"stored": True, "ranges_from": "teacher"}])
def test_without_pseudo_labels_the_teacher_is_left_alone(build, batch, monkeypatch, options):
    objective = build(**PSEUDO, **options).train()
    expected = build(objective.model, weight=0.0).train()(batch, 0)
    for name in ("encode", "decode_labels"):
        monkeypatch.setattr(objective.teacher, name, refuse)
    out = objective(batch, 0)
    assert torch.equal(out.losses, expected.losses)
    # Another rank may have some in its batch: the names of the metrics have to be the same.
    assert out.metrics["kd_loss"] == out.metrics["kd_share"] == 0
    validation = objective.eval()(batch, 0)
    assert validation.metrics.keys() == {"loss", "simple_loss", "pruned_loss"}
    assert objective.images(batch, 0)["pruning_ranges"].shape[0] == 5
