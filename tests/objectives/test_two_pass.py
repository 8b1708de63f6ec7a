"""The second pass: trained alone it leaves the first one as it was; trained together all is trained."""

import copy
import functools

import pytest
import torch

from transducer_kd.config import (
    DistillConfig,
    LossConfig,
    OptimConfig,
    SpecAugmentConfig,
    TwoPassConfig,
)
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.greedy import greedy_search
from transducer_kd.log import UserError
from transducer_kd.losses.attention import label_smoothed_ce, las_kd_loss, las_targets
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.objectives import two_pass as two_pass_module
from transducer_kd.objectives.distill import DistillObjective
from transducer_kd.objectives.two_pass import LasObjective, TwoPassObjective
from transducer_kd.train.checkpoint import average_of_span, start_running_average, update_running_average
from transducer_kd.train.optim import build_optimizer

FIRST_PASS = {"encoder", "decoder", "joiner", "simple_am_proj", "simple_lm_proj"}
LOSS = LossConfig(backend="torch", s_range=3, warm_step=0)


def to_words(tokens):
    return [f"w{token}" for token in tokens]


@pytest.fixture
def student(make_model):
    """Function: a model with a LAS, 16 wide."""
    return functools.partial(make_model, 16, 0, with_las=True)


@pytest.fixture
def teacher(make_model):
    """Function: a wider model with a LAS."""
    return functools.partial(make_model, 24, 1, with_las=True)


@pytest.fixture
def words_batch(batch):
    """`batch` with the texts of its tokens."""
    batch.texts = [" ".join(to_words(row[:n])) for row, n in zip(batch.y.tolist(), batch.y_lens.tolist())]
    return batch


def las_objective(model, teacher=None, augment=False, **options):
    augment = SpecAugment(SpecAugmentConfig(enabled=augment))
    return LasObjective(model, augment, TwoPassConfig(**options), Frozen(teacher) if teacher else None)


def two_pass_objective(model, teacher=None, weight=0.0, **options):
    augment = SpecAugment(SpecAugmentConfig(enabled=False))
    frozen = Frozen(teacher) if teacher is not None else None
    distill, two_pass = DistillConfig(weight=weight), TwoPassConfig(**options)
    return TwoPassObjective(model, LOSS, augment, distill, two_pass, frozen, to_words)


# ---------------------------------------------------------------- the LAS alone


@pytest.mark.parametrize("las_kd_weight", [0.0, 0.5])
def test_training_the_las_leaves_the_first_pass_bit_identical(student, teacher, batch, las_kd_weight):
    model = student(dropout=0.3, with_ctc=True)
    kept = copy.deepcopy(model).eval()
    taught = teacher() if las_kd_weight else None
    objective = las_objective(model, taught, augment=True, las_kd_weight=las_kd_weight).train()
    optimizer = build_optimizer(model, OptimConfig(lr=0.05, weight_decay=0.1))
    average, start = start_running_average(model), start_running_average(model)
    for step in range(1, 7):
        optimizer.zero_grad()
        objective(batch, step).loss_sum.backward()
        optimizer.step()
        update_running_average(average, model, step, 2)
    averaged = average_of_span(start, average, 1, 4)
    for name, value in kept.state_dict().items():
        same = torch.equal(model.state_dict()[name], value), torch.equal(averaged[name].float(), value)
        assert same == ((False, False) if name.startswith("las.") else (True, True)), name
    found = []
    with torch.no_grad():
        for m in (kept, model.eval()):
            encoded = m.encode(batch.features, batch.feature_lens)
            found.append((encoded[0], greedy_search(m, *encoded), modified_beam_search(m, *encoded)))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    assert any(hyp.tokens for hyp in found[0][1])


def test_only_the_las_is_in_train_mode_and_trained(student, batch, gradients):
    model = student(dropout=0.3)
    objective = las_objective(model).train()
    # DistributedDataParallel waits for the gradient of whatever asks for one.
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        n for n, _ in model.named_parameters() if not n.startswith("las.")
    }
    assert not any(
        m.training for part in (model.encoder, model.decoder, model.joiner) for m in part.modules()
    )
    assert objective.training and all(m.training for m in model.las.modules())
    found = gradients(model, objective(batch, 0).loss_sum)
    trained = {name for name, g in found.items() if g.abs().sum() > 0}
    assert trained == {name for name in found if name.startswith("las.")}
    assert not any(m.training for m in objective.eval().modules())


def test_each_las_attends_to_its_own_encoder(student, teacher, batch, gradients):
    """The teacher's logits are its LAS's on its own encoder, which is wider than the student's."""
    model, taught_by = student(), teacher(dropout=0.3)
    objective = las_objective(model, taught_by, las_kd_weight=0.25, las_kd_temperature=2.0).train()
    assert not any(m.training for m in taught_by.modules())
    with torch.no_grad():
        encoded, taught = (m.encode(batch.features, batch.feature_lens) for m in (model, taught_by))
        targets, mask = las_targets(batch.y, batch.y_lens)
        logits = model.las(*encoded, batch.y, batch.y_lens)
        teacher_logits = taught_by.las(*taught, batch.y, batch.y_lens)
    assert taught[0].shape[2] == 24 and encoded[0].shape[2] == 16
    ce, distance = (
        label_smoothed_ce(logits, targets, mask, 0.1),
        las_kd_loss(logits, teacher_logits, mask, 2.0),
    )
    out = objective(batch, 0)
    torch.testing.assert_close(out.losses.detach(), 0.75 * ce + 0.25 * distance)
    assert out.metrics.keys() == {"loss", "las_loss", "las_kd_loss"}
    torch.testing.assert_close(out.metrics["las_kd_loss"], distance.sum())
    torch.testing.assert_close(out.encoder_out_lens, encoded[1])
    assert (distance > 0.1).all()
    out.loss_sum.backward()
    assert all(p.grad is None for p in taught_by.parameters())


def test_a_teacher_equal_to_the_student_teaches_the_las_nothing(student, batch, gradients):
    model = student()
    objective = las_objective(model, copy.deepcopy(model), las_kd_weight=1.0).train()
    out = objective(batch, 0)
    assert (out.losses.abs() < 1e-5).all()
    assert max(g.abs().max() for g in gradients(model, out.loss_sum).values()) < 1e-5


def test_the_teacher_of_the_las_sees_clean_features(student, batch, monkeypatch):
    taught_by = copy.deepcopy(student())
    objective = las_objective(student(), taught_by, augment=True, las_kd_weight=1.0).train()
    with torch.no_grad():
        expected = taught_by.encode(batch.features, batch.feature_lens)[0]
    seen, original = [], taught_by.las.forward
    monkeypatch.setattr(taught_by.las, "forward", lambda *a: (seen.append(a[0]), original(*a))[1])
    assert (objective(batch, 0).losses > 1e-3).all()  # the student sees others
    assert torch.equal(seen[0], expected)


def test_padding_changes_no_las_loss(student, teacher, make_batch):
    objective = las_objective(student(), teacher(), las_kd_weight=0.5).eval()
    padded = make_batch(extra_frames=37, extra_tokens=5)
    padded.y[padded.y == 0] = 7
    got, expected = objective(padded, 0), objective(make_batch(), 0)
    torch.testing.assert_close(got.losses, expected.losses, atol=1e-4, rtol=1e-5)


def test_a_teacher_without_las_is_refused(student, make_model):
    for make in (las_objective, two_pass_objective):
        with pytest.raises(UserError, match=r"las_kd_weight=0\.5, but the teacher has no LAS"):
            make(student(), make_model(24), las_kd_weight=0.5)
    assert two_pass_objective(student(), make_model(24), weight=1.0)


# ---------------------------------------------------------------- both passes


def test_lambda_divides_between_the_objectives_of_the_passes(student, teacher, batch):
    model, taught_by = student(), teacher()
    plain = SpecAugment(SpecAugmentConfig(enabled=False))

    def both(share):
        options = dict(rnnt_weight=share, las_kd_weight=0.5)
        return two_pass_objective(model, taught_by, 2.0, **options).eval()(batch, 0)

    first = DistillObjective(model, LOSS, plain, DistillConfig(weight=2.0), Frozen(taught_by)).eval()(
        batch, 0
    )
    torch.testing.assert_close(both(1.0).losses, first.losses)
    torch.testing.assert_close(
        both(0.25).losses, 0.25 * both(1.0).losses + 0.75 * both(0.0).losses, atol=1e-4, rtol=1e-5
    )
    # It freezes the model's first pass: last.
    second = las_objective(model, taught_by, las_kd_weight=0.5).eval()(batch, 0)
    torch.testing.assert_close(both(0.0).losses, second.losses)
    metrics = both(0.5).metrics
    assert metrics.keys() == first.metrics.keys() | second.metrics.keys()
    for name in metrics.keys() - {"loss"}:
        torch.testing.assert_close(metrics[name], {**first.metrics, **second.metrics}[name])


def test_everything_is_trained_together(student, teacher, words_batch, gradients):
    model = student(with_ctc=False)
    objective = two_pass_objective(model, teacher(), 2.0, las_kd_weight=0.5, mwer_weight=0.3).train()
    found = gradients(model, objective(words_batch, 0).loss_sum)
    assert [name for name, g in found.items() if not g.abs().sum() > 0] == []


@pytest.mark.parametrize("share, parts", [(0.0, {"encoder", "las"}), (1.0, FIRST_PASS)])
def test_each_pass_alone_trains_what_it_uses(student, batch, gradients, share, parts):
    """The second pass reaches the shared encoder."""
    model = student()
    found = gradients(model, two_pass_objective(model, rnnt_weight=share).train()(batch, 0).loss_sum)
    assert {name.split(".")[0] for name, g in found.items() if g.abs().sum() > 0} == parts


@pytest.mark.parametrize("options", [{}, {"mwer_weight": 0.5}])
def test_the_control_needs_no_teacher(student, words_batch, options):
    objective = two_pass_objective(student(), **options).train()
    out = objective(words_batch, 0)
    m = {name: float(value) for name, value in out.metrics.items()}
    assert m.keys() == {"simple_loss", "pruned_loss", "las_loss", "loss"} | (
        {"mwer_loss"} if options else set()
    )
    expected = 0.5 * (0.5 * m["simple_loss"] + m["pruned_loss"]) + 0.5 * m["las_loss"]
    assert m["loss"] == pytest.approx(expected + 0.5 * m.get("mwer_loss", 0.0), rel=1e-5)


# ---------------------------------------------------------------- MWER


def test_mwer_written_out(student, words_batch, monkeypatch):
    """Expected errors of the beam's hypotheses under the LAS, one at a time, less their mean."""
    model = student()
    objective = two_pass_objective(model, mwer_weight=1.0, mwer_nbest=3).train()
    encoded = model.encode(words_batch.features, words_batch.feature_lens)
    nbests = modified_beam_search(model, encoded[0].detach(), encoded[1], 3)
    nbests[0] = nbests[0][:2]  # lists need not be of one length
    assert [len(nbest) for nbest in nbests] == [2, 3, 3]
    beams = []
    monkeypatch.setattr(
        two_pass_module, "modified_beam_search", lambda *args: (beams.append(args[3]), nbests)[1]
    )
    got = objective.expected_errors(encoded, words_batch)
    assert beams == [3]
    for n, nbest in enumerate(nbests):
        one = slice(n, n + 1)
        scores = torch.stack(
            [model.las.score(encoded[0][one], encoded[1][one], [[h.tokens]])[0][0] for h in nbest]
        )
        errors = torch.tensor(
            [float(edit_distance(words_batch.texts[n].split(), to_words(h.tokens))) for h in nbest]
        )
        expected = (scores.softmax(0) * (errors - errors.mean())).sum()
        torch.testing.assert_close(got[n], expected, atol=1e-4, rtol=1e-4)


def edit_distance(ref, hyp):
    row = list(range(len(hyp) + 1))
    for i, r in enumerate(ref, 1):
        new = [i]
        for j, h in enumerate(hyp, 1):
            new.append(min(new[-1] + 1, row[j] + 1, row[j - 1] + (r != h)))
        row = new
    return row[-1]


def test_mwer_searches_without_dropout_and_trains_with_it(student, words_batch, gradients, monkeypatch):
    model = student(dropout=0.3)
    objective = two_pass_objective(model, mwer_weight=1.0).train()
    seen = []

    def search(model, *args):
        seen.append(any(m.training for m in model.modules()))
        return modified_beam_search(model, *args)

    monkeypatch.setattr(two_pass_module, "modified_beam_search", search)
    encoded = model.encode(words_batch.features, words_batch.feature_lens)
    loss = objective.expected_errors(encoded, words_batch).sum()
    assert seen == [False] and all(m.training for m in model.modules())
    found = gradients(model, loss)
    for part, is_trained in (("las.", True), ("encoder.", True), ("joiner.", False), ("decoder.", False)):
        total = sum(float(g.abs().sum()) for name, g in found.items() if name.startswith(part))
        assert (total > 0) == is_trained, part


def test_mwer_is_for_training_only(student, words_batch):
    objective = two_pass_objective(student(), mwer_weight=1.0).eval()
    assert "mwer_loss" not in objective(words_batch, 0).metrics


@pytest.mark.parametrize("lattice", ["pruned", "full"])
def test_autocast_loses_no_gradient(student, teacher, words_batch, check_autocast, lattice):
    """Autocast keeps the weights that it has cast: one cast without a graph would get no gradient."""
    model = student()
    objective = two_pass_objective(model, teacher(), 2.0, las_kd_weight=0.5, mwer_weight=0.3).train()
    objective.distill.lattice = lattice
    check_autocast(model, lambda: objective(words_batch, 0).loss_sum)
