"""The transducer objective: its terms, its weights, and that padding is worth nothing."""

import pytest
import torch

from transducer_kd.config import DecoderConfig, EncoderConfig, LossConfig, ModelConfig, SpecAugmentConfig
from transducer_kd.losses.rnnt_reference import rnnt_loss_reference
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.models.transducer import Transducer
from transducer_kd.objectives.transducer import TransducerObjective, warm_up_scales

VOCAB = 11


def build(loss, chunk_size=0, augment=False):
    torch.manual_seed(3)
    encoder = EncoderConfig(
        num_layers=2, encoder_dim=16, num_heads=2, feedforward_dim=32, cnn_module_kernel=5, dropout=0.0,
        subsampling_channels=4, chunk_size=chunk_size, left_context=6,
    )  # fmt: skip
    config = ModelConfig(encoder, DecoderConfig(decoder_dim=12), joiner_dim=10)
    model = Transducer(config, VOCAB, with_ctc=loss.ctc_weight > 0)
    return TransducerObjective(model, loss, SpecAugment(SpecAugmentConfig(enabled=augment)))


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_padding_a_batch_never_changes_an_utterance(chunk_size, make_batch):
    objective = build(LossConfig(ctc_weight=0.5, am_scale=0.0), chunk_size).eval()
    together, padded = make_batch(), make_batch(extra_frames=37, extra_tokens=5)
    alone = [make_batch((61,), (4,))]
    for other, rows in ((padded, slice(0, 3)), (alone[0], slice(0, 1))):
        a = objective.transducer_pass(together.features, together)
        b = objective.transducer_pass(other.features, other)
        torch.testing.assert_close(a.simple_loss[rows], b.simple_loss, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.pruned_loss[rows], b.pruned_loss, atol=1e-4, rtol=0)
    for name, value in objective(together, 0).metrics.items():
        torch.testing.assert_close(value, objective(padded, 0).metrics[name], atol=1e-4, rtol=0)


def test_whole_lattice_equals_the_reference(make_batch):
    """With s_range = U+1 nothing is pruned: the value is the plain transducer loss of the joiner's logits."""
    objective = build(LossConfig(s_range=8)).eval()
    batch = make_batch()
    done = objective.transducer_pass(batch.features, batch)
    logits = objective.model.joiner(done.encoder_out[:, :, None], done.decoder_out[:, None])
    expected = rnnt_loss_reference(logits, batch.y, done.boundary)
    torch.testing.assert_close(done.pruned_loss, expected, atol=1e-3, rtol=1e-5)


def test_loss_is_the_weighted_sum_of_its_terms(make_batch):
    loss = LossConfig(warm_step=10, simple_loss_scale=0.4, ctc_weight=0.3)
    objective, batch = build(loss).train(), make_batch()
    out = objective(batch, step=5)
    m = out.metrics
    expected = 0.7 * m["simple_loss"] + 0.55 * m["pruned_loss"] + 0.3 * m["ctc_loss"]
    torch.testing.assert_close(out.loss_sum.detach(), expected)
    assert int(out.num_frames) == sum(((t - 1) // 2 - 1) // 2 for t in (61, 90, 47))
    assert not any(v.requires_grad for v in m.values())


@pytest.mark.parametrize("weight", [0.0, 0.25, 3.0])
def test_pseudo_labelled_utterances_weigh_what_they_are_told_to(make_batch, gradients, rows_of, weight):
    loss = LossConfig(ctc_weight=0.3, pseudo_weight=weight)
    objective, batch = build(loss).train(), make_batch()
    expected = objective(batch, 500)  # all are labelled
    batch.is_pseudo[1] = True
    out = objective(batch, 500)
    torch.testing.assert_close(out.losses, expected.losses * torch.tensor([1.0, weight, 1.0]))
    assert out.num_frames == expected.num_frames
    assert all(torch.equal(out.metrics[k], v) for k, v in expected.metrics.items() if k != "loss")
    found = gradients(objective.model, out.loss_sum)
    alone = [objective(rows_of(batch, slice(n, n + 1)), 500).loss_sum for n in range(3)]
    for name, value in gradients(objective.model, sum(alone)).items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)
    # Without a weight the parameters still get a gradient, which data-parallel training waits for.
    batch.is_pseudo[:] = True
    gradients(objective.model, objective(batch, 500).loss_sum)
    norms = [p.grad.abs().max() for p in objective.model.parameters()]
    assert (max(norms) > 0) == (weight > 0)


@pytest.mark.parametrize(
    "step, expected", [(0, (1.0, 0.1)), (50, (0.75, 0.55)), (100, (0.5, 1.0)), (10**6, (0.5, 1.0))]
)
def test_warm_up(step, expected):
    assert warm_up_scales(step, 100, 0.5) == pytest.approx(expected)


def test_every_parameter_is_trained(make_batch):
    objective, batch = build(LossConfig(ctc_weight=0.5)).train(), make_batch()
    objective(batch, 0).loss_sum.backward()
    untouched = [
        n for n, p in objective.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert untouched == []


def test_augmentation_is_for_training_only(make_batch):
    objective, batch = build(LossConfig(), augment=True), make_batch()
    before = batch.features.clone()
    torch.manual_seed(0)
    losses = [float(objective.train()(batch, 0).loss_sum.detach()) for _ in range(2)]
    assert losses[0] != losses[1] and torch.equal(batch.features, before)
    assert float(objective.eval()(batch, 0).loss_sum.detach()) == float(
        objective.eval()(batch, 9).loss_sum.detach()
    )


def test_picture_of_the_pruning_ranges(make_batch):
    objective, batch = build(LossConfig(s_range=3)).eval(), make_batch()
    picture = objective.images(batch, 0)["pruning_ranges"]
    assert picture.shape == (5, ((61 - 1) // 2 - 1) // 2)
    assert picture.sum(0).tolist() == [3.0] * picture.shape[1]
    assert picture[-1, 0] == 1 and picture[0, -1] == 1  # begins at u=0 (bottom), ends at u=U (top)
