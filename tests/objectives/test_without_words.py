"""An utterance without words (data.silence_prob) in the batch: every objective learns from it to say nothing.

With the torch kernel, and with k2 or fast_rnnt, whichever the environment has.
"""

import pytest
import torch

from transducer_kd.config import DistillConfig, LossConfig, SpecAugmentConfig, TwoPassConfig
from transducer_kd.losses.attention import label_smoothed_ce
from transducer_kd.models.frozen import Frozen
from transducer_kd.models.spec_augment import SpecAugment
from transducer_kd.objectives.distill import DistillObjective
from transducer_kd.objectives.dual_mode import DualModeObjective
from transducer_kd.objectives.transducer import TransducerObjective
from transducer_kd.objectives.two_pass import LasObjective, TwoPassObjective

CHUNK = 4
LENS, TOKENS = (61, 90, 30), (4, 7, 0)  # the last one: 0.3 s, the shortest that training makes
TAUGHT = {
    "pruned": DistillConfig(weight=2.0, ranges_from="teacher"),
    "occupancy": DistillConfig(weight=2.0, weighting="occupancy", frame_shift=2),
    "collapsed": DistillConfig(weight=2.0, form="collapsed", normalise_by="frames"),
    "full": DistillConfig(weight=2.0, lattice="full"),
}
NAMES = ["transducer", *TAUGHT, "las", "two_pass", "dual_mode"]


def to_words(tokens):
    return [str(token) for token in tokens]


@pytest.fixture(params=["torch", "auto"])
def build(request, make_model):
    """Function: an objective by its name, whose student and teacher stream; alike at each call."""
    options = TwoPassConfig(las_kd_weight=0.5, mwer_weight=0.1)

    def make(name, augmented=False):
        loss = LossConfig(request.param, s_range=3, warm_step=0, ctc_weight=0.5)
        augment = SpecAugment(SpecAugmentConfig(enabled=augmented))
        with_las = name in ("las", "two_pass")
        model = make_model(with_ctc=True, with_las=with_las, chunk_size=CHUNK)
        teacher = Frozen(make_model(24, seed=1, with_las=with_las, chunk_size=CHUNK))
        if name == "transducer":
            return TransducerObjective(model, loss, augment)
        if name == "las":
            return LasObjective(model, augment, options, teacher)
        if name == "two_pass":
            return TwoPassObjective(model, loss, augment, TAUGHT["pruned"], options, teacher, to_words)
        if name == "dual_mode":
            return DualModeObjective(model, loss, augment, TAUGHT["pruned"])
        return DistillObjective(model, loss, augment, TAUGHT[name], teacher)

    return make


@pytest.fixture
def batch(make_batch):
    made = make_batch(LENS, TOKENS)
    made.texts = [" ".join(to_words(row[:n])) for row, n in zip(made.y.tolist(), TOKENS)]
    return made


def losses_of(objective, batch, backward=False):
    """The losses (N,) of all passes, each after the backward of the one before."""
    total = 0.0
    for number in range(objective.num_passes):
        output = objective(batch, 0, *([number] if number else []))
        if backward:
            output.loss_sum.backward()
        total = total + output.losses.detach()
    return total


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_finite(build, batch, name, augmented):
    objective = build(name, augmented).train()
    losses = losses_of(objective, batch, backward=True)
    assert torch.isfinite(losses).all() and losses[2] > 0
    trained = {n: p.grad for n, p in objective.model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_utterances_beside_it_have_the_losses_that_they_have_without_it(build, batch, rows_of, name):
    objective = build(name).eval()
    with torch.no_grad():
        losses = losses_of(objective, batch)
        for rows in (slice(0, 2), slice(2, 3)):
            alone = losses_of(objective, rows_of(batch, rows))
            torch.testing.assert_close(losses[rows], alone, atol=1e-3, rtol=1e-4)


def first_node(model, encoder_out, decoder_out, frames):
    """Log-probabilities (T',V) of each frame before any token, where the last utterance has nothing else."""
    logits = model.joiner(encoder_out[2, :frames], decoder_out[2, :1].expand(frames, -1))
    return logits.log_softmax(-1)


@torch.no_grad()
def test_what_is_learnt_is_blank_throughout(build, batch):
    objective = build("transducer").eval()
    done = objective.transducer_pass(batch.features, batch)
    frames = int(done.encoder_out_lens[2])
    log_p = first_node(objective.model, done.encoder_out, done.decoder_out, frames)
    torch.testing.assert_close(done.pruned_loss[2], -log_p[:, 0].sum(), atol=1e-4, rtol=1e-5)
    ctc = objective.ctc_loss(done.encoder_out, done.encoder_out_lens, batch)[2]
    log_p = objective.model.ctc_output(done.encoder_out[2, :frames]).log_softmax(-1)
    torch.testing.assert_close(ctc, -log_p[:, 0].sum(), atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["pruned", "full"])
def test_what_is_distilled_are_the_nodes_before_any_token(build, batch, name):
    objective = build(name).eval()
    done, taught, _, _ = objective.first_pass(batch, 0)
    frames = int(done.encoder_out_lens[2])
    log_p = first_node(objective.model, done.encoder_out, done.decoder_out, frames)
    log_q = first_node(objective.teacher, taught.encoder_out, taught.decoder_out, frames)
    expected = (log_q.exp() * (log_q - log_p)).sum()
    found = objective.lattice_kd(done, taught, batch)[2]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert expected > 0.1


@torch.no_grad()
def test_what_the_las_learns_is_to_close_at_once(build, batch):
    objective = build("two_pass").eval()
    model, sos_eos = objective.model, 1
    encoder_out, lens = model.encode(batch.features[2:, : LENS[2]], batch.feature_lens[2:])
    logits = model.las(encoder_out, lens, batch.y[2:, :0], batch.y_lens[2:])
    assert logits.shape[:2] == (1, 1)
    expected = label_smoothed_ce(logits, torch.tensor([[sos_eos]]), torch.ones(1, 1, dtype=torch.bool), 0.1)
    objective.two_pass.rnnt_weight, objective.two_pass.las_kd_weight = 0.0, 0.0
    torch.testing.assert_close(objective(batch, 0).losses[2:], expected, atol=1e-4, rtol=1e-4)
