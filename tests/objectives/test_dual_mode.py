"""Two modes of one model: both passes' losses and gradients are those of one backward of their sum."""

import copy

import pytest
import torch
from torch import nn

from transducer_kd.config import DistillConfig, LossConfig, SpecAugmentConfig
from transducer_kd.losses import distill as kd
from transducer_kd.losses import pruned_rnnt
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.objectives.dual_mode import DualModeObjective
from transducer_kd.objectives.shared import SharedTensor
from transducer_kd.objectives.transducer import TransducerObjective

LOSS = LossConfig(backend="torch", s_range=3, warm_step=0, ctc_weight=0.3)
CHUNK = 4


def dual(model, weight=0.0, **distill):
    augment = SpecAugment(SpecAugmentConfig(enabled=False))
    return DualModeObjective(model, LOSS, augment, DistillConfig(weight=weight, **distill))


def single(model):
    return TransducerObjective(model, LOSS, SpecAugment(SpecAugmentConfig(enabled=False)))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_of_mode(model, batch, chunk_size):
    """The slow twin: one mode alone, with its own subsampling and decoder."""
    objective = single(model).train()
    done = objective.transducer_pass(batch.features, batch, chunk_size=chunk_size)
    return objective.transducer_loss(done, batch, 0)[0]


@pytest.fixture
def model(make_model):
    return make_model(16, 0, with_ctc=True, chunk_size=CHUNK)


def test_shared_tensor_gives_the_gradient_of_the_sum():
    torch.manual_seed(0)
    layer, x = nn.Linear(3, 3), torch.randn(5, 3)
    y = layer(x)
    (y.square().sum() + y.tanh().sum() + (2 * y).sum()).backward()
    expected = gradients(layer)
    layer.zero_grad(set_to_none=True)
    shared = SharedTensor(layer(x))
    shared.leaf().square().sum().backward()
    shared.leaf().tanh().sum().backward()
    assert layer.weight.grad is None  # nothing has gone further yet
    (2 * shared.joined()).sum().backward()
    for name, gradient in gradients(layer).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6)


def test_two_backwards_are_one_backward_of_the_sum(model, batch):
    twin = copy.deepcopy(model)
    expected = loss_of_mode(twin, batch, 0) + loss_of_mode(twin, batch, CHUNK)
    expected.sum().backward()

    objective = dual(model).train()
    outputs = []
    for number in range(2):
        outputs.append(objective(batch, 0, number))
        outputs[-1].loss_sum.backward()
    assert torch.allclose(outputs[0].losses + outputs[1].losses, expected, atol=1e-4)
    found, wanted = gradients(model), gradients(twin)
    for name, gradient in wanted.items():
        assert torch.allclose(found[name], gradient, atol=1e-5 * (1 + float(gradient.abs().max()))), name


def test_the_first_backward_leaves_what_is_shared_to_the_last(model, batch):
    objective = dual(model).train()
    objective(batch, 0, 0).loss_sum.backward()
    assert model.encoder.subsampling.out.weight.grad is None
    assert all(p.grad is None for p in model.decoder.parameters())
    assert model.encoder.layers[0].ff1.hidden.weight.grad is not None
    objective(batch, 0, 1).loss_sum.backward()
    assert all(p.grad is not None for p in model.parameters())  # as DistributedDataParallel needs it


def test_metrics_are_named_by_mode_and_evaluation_adds_the_modes(model, batch):
    objective = dual(model).eval()
    with torch.no_grad():
        first, second, both = objective(batch, 0, 0), objective(batch, 0, 1), objective.evaluate(batch, 0)
    assert {"pruned_loss_offline", "ctc_loss_offline", "loss"} <= set(first.metrics)
    assert {"pruned_loss_streaming", "ctc_loss_streaming", "loss"} <= set(second.metrics)
    assert torch.allclose(both.losses, first.losses + second.losses)
    assert torch.equal(both.num_frames, first.num_frames)
    assert both.metrics["loss"] == pytest.approx(float(first.loss_sum + second.loss_sum), rel=1e-5)
    assert both.metrics["pruned_loss_offline"] != both.metrics["pruned_loss_streaming"]


def test_streaming_learns_from_the_full_context_pass_without_a_gradient_to_it(model, batch):
    """gamma changes the gradient as a teacher that is a frozen copy of the model would."""
    frame_shift, weight = 1, 2.0
    teacher = copy.deepcopy(model).eval()
    twin = copy.deepcopy(model)
    objective = single(twin).train()
    done = objective.transducer_pass(batch.features, batch, chunk_size=CHUNK)
    with torch.no_grad():
        encoder_out, _ = teacher.encode(batch.features, batch.feature_lens, 0)
        ranges = kd.shift_ranges(done.ranges, frame_shift)
        am, lm = pruned_rnnt.gather_pruned(
            teacher.joiner.encoder_proj(encoder_out),
            teacher.joiner.decoder_proj(teacher.decode_labels(batch.y)),
            ranges,
        )
        logits = teacher.joiner(am, lm, project_input=False)
    options = kd.LatticeDistillOptions("full", 1.0, frame_shift, "uniform", "nodes")
    losses, counts = kd.lattice_kd_loss(done.logits, logits, batch.y, done.ranges, done.boundary, options)
    distance = losses / counts.clamp(min=1) * done.encoder_out_lens
    (weight * distance).sum().backward()
    wanted = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}

    found = []
    for gamma in (0.0, weight):
        model.zero_grad(set_to_none=True)
        objective = dual(model, gamma, frame_shift=frame_shift, ranges_from="student").train()
        for number in range(2):
            output = objective(batch, 0, number)
            output.loss_sum.backward()
        found.append(gradients(model))
    assert output.metrics["kd_loss_streaming"] == pytest.approx(float(distance.detach().sum()), rel=1e-4)
    for name, gradient in wanted.items():
        assert torch.allclose(found[1][name] - found[0][name], gradient, atol=1e-3), name


def test_the_full_context_pass_teaches_from_an_update_on(model, batch):
    objective, plain = dual(model, 2.0, begin_step=5).train(), dual(model).train()

    def streaming_pass(objective, step):
        objective(batch, step, 0)
        return objective(batch, step, 1)

    expected = streaming_pass(plain, 4)
    for step, has_begun in ((4, False), (5, True)):
        output = streaming_pass(objective, step)
        assert (output.metrics["kd_loss_streaming"] > 0) == has_begun
        assert torch.equal(output.losses, expected.losses) != has_begun
    # One loss for all validations, so that they can be compared.
    objective.eval()
    with torch.no_grad():
        losses = [streaming_pass(objective, step) for step in (4, 5)]
    assert torch.equal(losses[0].losses, losses[1].losses)


def test_what_is_taught_grows_evenly_and_is_whole_in_validation(model, batch):
    plain, ramped = dual(model), dual(model, 2.0, begin_step=5, ramp_steps=4)

    def streaming_losses(objective, step):
        objective(batch, step, 0)
        return objective(batch, step, 1).losses.sum()

    shares = []
    with torch.no_grad():
        whole = streaming_losses(ramped.eval(), 0) - streaming_losses(plain.eval(), 0)
        for step in (4, 5, 6, 8, 9):
            taught = streaming_losses(ramped.train(), step) - streaming_losses(plain.train(), step)
            shares.append(float(taught / whole))
    assert shares == pytest.approx([0.0, 0.25, 0.5, 1.0, 1.0], abs=1e-3)


def test_the_streaming_pass_may_be_pruned_by_the_full_context_pass(model, batch, monkeypatch):
    """From begin_step on; what is drawn is pruned so, too."""
    objective = dual(model, 1.0, ranges_from="teacher", begin_step=1).train()
    seen = []
    real = objective.lattice_pass
    monkeypatch.setattr(objective, "lattice_pass", lambda *args: seen.append(real(*args)) or seen[-1])
    with torch.no_grad():
        for step in (0, 1):
            for number in range(2):
                objective(batch, step, number)
        full, alone, _, guided = (done.ranges for done in seen)
        drawn = objective.clean_pass(batch).ranges
    assert not torch.equal(alone, full)
    assert torch.equal(guided, full) and torch.equal(drawn, full)
    assert objective._taught is None


def test_one_mode_is_the_encoder_without_chunks(make_model, batch):
    """Where all of an utterance fits into a chunk and convolutions see one frame only, the modes agree."""
    model = make_model(16, 0, with_ctc=True, chunk_size=1000)
    for layer in model.encoder.layers:  # the causal convolution drops the taps of the future
        layer.conv.depthwise.weight.data[..., layer.conv.kernel // 2 + 1 :] = 0.0
    objective = dual(model).eval()
    with torch.no_grad():
        first, second = objective(batch, 0, 0), objective(batch, 0, 1)
    assert torch.allclose(first.losses, second.losses, atol=1e-4)


def test_autocast_loses_no_gradient(model, batch, check_autocast):
    """The second pass joins what the first has computed under an autocast of its own."""
    objective = dual(model, weight=1.0).train()
    check_autocast(model, *(lambda n=number: objective(batch, 0, n).loss_sum for number in range(2)))
