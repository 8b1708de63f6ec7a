"""Pretraining: two passes with one gradient, metrics that read as their names say, and that it learns."""

import math

import pytest
import torch

from transducer_kd.config import Wav2Vec2Config
from transducer_kd.data.batch import Batch
from transducer_kd.losses.contrastive import contrastive_loss
from transducer_kd.models.supernet import Supernet
from transducer_kd.models.wav2vec2 import Wav2Vec2
from transducer_kd.objectives import wav2vec2 as module
from transducer_kd.objectives.wav2vec2 import Wav2Vec2Objective

OPTIONS = dict(
    mask_prob=0.15, mask_length=3, num_codebooks=2, num_entries=6, codebook_dim=8, projection_dim=10,
    num_distractors=9,
)  # fmt: skip


@pytest.fixture
def objective(make_model):
    """Function: an objective on a tiny encoder; chunk_size 0 is one without streaming mode."""

    def make(chunk_size=4, pruned=False, max_steps=100, **options):
        model = make_model(chunk_size=chunk_size)
        if pruned:
            model.config.pruned_groups = "unit"
            torch.manual_seed(0)
            model = Supernet(model.config, 11)
            kept = {name: torch.rand(mask.shape) < 0.5 for name, mask in model.masks.kept().items()}
            model.masks.assign(kept)
        options = Wav2Vec2Config(**{**OPTIONS, **options})
        return Wav2Vec2Objective(Wav2Vec2(model, options), options, max_steps)

    return make


class Unshared:
    """A SharedTensor that shares its graph, for one backward of all passes."""

    def __init__(self, value):
        self.value = value

    def leaf(self):
        return self.value

    joined = leaf


def logged(output):
    """What the trainer makes of an output's metrics."""
    return {name: float(value) / float(output.num_frames) for name, value in output.metrics.items()}


def fix_masks(monkeypatch, every=3):
    """Hide frames 1, 1 + every, ... of each utterance, however wide the batch is padded."""

    def mask(lens, num_frames, *_):
        frame = torch.arange(num_frames)
        return (frame % every == 1) & (frame < lens.unsqueeze(1))

    monkeypatch.setattr(module, "span_mask", mask)


# ---------------------------------------------------------------- passes


def test_autocast_loses_no_gradient(objective, batch, check_autocast):
    """In eval nothing is drawn, so that both hide the same frames."""
    objective = objective(pruned=True).eval()
    passes = (lambda n=number: objective(batch, 7, n).loss_sum for number in range(2))
    check_autocast(objective.model, *passes)


@pytest.mark.parametrize("pruned", [False, True])
def test_two_backwards_give_the_gradient_of_the_sum(objective, batch, gradients, monkeypatch, pruned):
    """Two batches, as where gradients are accumulated, each with its own random draws."""
    objective = objective(pruned=pruned).train()
    found = {}
    for name in ("by pass", "at once"):
        objective.zero_grad()
        losses = []
        for seed in (3, 4):
            torch.manual_seed(seed)
            for number in range(2):
                losses.append(objective(batch, 7, number).loss_sum)
                if name == "by pass":
                    losses[-1].backward()
        if name == "at once":
            sum(losses).backward()
        parameters = dict(objective.model.named_parameters())
        assert all(p.grad is not None for p in parameters.values())  # or DistributedDataParallel waits
        found[name] = torch.stack(losses).detach(), {n: p.grad.clone() for n, p in parameters.items()}
        monkeypatch.setattr(module, "SharedTensor", Unshared)
    assert torch.equal(found["by pass"][0], found["at once"][0])
    for parameter, gradient in found["by pass"][1].items():
        torch.testing.assert_close(gradient, found["at once"][1][parameter], rtol=1e-4, atol=1e-4)
        assert gradient.abs().sum() > 0, parameter


def test_the_first_pass_is_dense_and_offline_the_second_sparse_and_streaming(objective, batch, monkeypatch):
    objective, seen = objective(pruned=True), []
    encode, loss = objective.model._encode_frames, contrastive_loss

    def spy(frames, lens, chunk_size):
        seen.append((frames.detach().clone(), chunk_size))
        return encode(frames, lens, chunk_size)

    def loss_spy(context, *others):
        seen[-1] += (context.detach(), *others)
        return loss(context, *others)

    monkeypatch.setattr(objective.model, "_encode_frames", spy)
    monkeypatch.setattr(module, "contrastive_loss", loss_spy)
    objective(batch, 0)
    objective(batch, 0, 1)
    first, second = seen
    assert objective.num_passes == 2 and (first[1], second[1]) == (0, 4)
    assert not torch.equal(first[2], second[2])  # the contexts
    for before, after in zip((first[0], *first[3:7]), (second[0], *second[3:7])):
        assert torch.equal(before, after)  # hidden frames, targets, ids, lengths, distractors
    assert objective._shared is None  # no graph is kept behind the last pass


def test_an_encoder_without_chunks_has_one_pass(objective, batch):
    objective = objective(chunk_size=0)
    output = objective(batch, 0)
    output.loss_sum.backward()
    assert objective.num_passes == 1 and objective._shared is None
    assert {"contrastive_loss_offline", "diversity_loss", "perplexity_0", "chance"} < set(output.metrics)
    assert not any(name.endswith("_streaming") for name in output.metrics)
    assert all(p.grad is not None for p in objective.model.parameters())


# ---------------------------------------------------------------- losses and metrics


@torch.no_grad()
def test_loss_is_the_sum_of_its_terms_and_metrics_read_as_named(objective, batch):
    objective = objective(diversity_weight=0.3, penalty_weight=0.7).eval()
    output = objective.evaluate(batch, 0)
    metrics, frames = logged(output), output.encoder_out_lens
    generator = torch.Generator().manual_seed(module._VALIDATION_SEED)
    mask = module.span_mask(frames, int(frames.max()), 0.15, 3, generator)
    assert metrics["masked_share"] == pytest.approx(float(mask.sum() / frames.sum()))
    # Loss of utterance n by hand.
    z, projected = objective.model.frames(batch.features)
    _, probabilities, codes = objective.model.targets(z[mask], 1.0)
    entropy = -(probabilities.mean(0) * probabilities.mean(0).log()).sum(-1)
    diversity = (12 - entropy.exp().sum()) / 12
    assert metrics["diversity_loss"] == pytest.approx(float(diversity), rel=1e-4)
    added = []
    for n, length in enumerate(frames):
        penalty = projected[n, :length].square().mean()
        added.append(mask[n].sum() * (0.3 * diversity + 0.7 * penalty))
    assert (mask.sum(1) > 1).all()
    contrastive = metrics["contrastive_loss_offline"] + metrics["contrastive_loss_streaming"]
    expected = contrastive * float(mask.sum()) + float(sum(added))
    assert float(output.loss_sum) == pytest.approx(expected, rel=1e-4)
    assert metrics["loss"] == pytest.approx(float(output.loss_sum / frames.sum()))
    # An untrained context knows nothing: ln(1 + 9), but for draws that share the true frame's code.
    assert 0.5 * math.log(10) < metrics["contrastive_loss_offline"] < 2 * math.log(10)
    for g in range(2):
        share = torch.bincount(codes[:, g]) / len(codes)
        entropy = -sum(p * p.log() for p in share if p > 0)
        assert metrics[f"perplexity_{g}"] == pytest.approx(float(entropy.exp()), rel=1e-4)
    assert 0.1 <= metrics["chance"] < 0.5
    assert all(0 <= metrics[f"accuracy_{mode}"] <= 1 for mode in module.MODES)


def test_padding_has_no_influence(objective, make_batch, monkeypatch):
    fix_masks(monkeypatch)
    objective = objective().eval()
    short, long = (objective.evaluate(make_batch(extra_frames=extra), 0) for extra in (0, 13))
    torch.testing.assert_close(short.losses, long.losses)
    assert logged(short) == pytest.approx(logged(long), rel=1e-4)


def test_an_utterance_with_one_masked_frame_adds_nothing(objective, make_batch, monkeypatch):
    fix_masks(monkeypatch)
    batch = make_batch(lens=(61, 19, 7), token_lens=(1, 1, 1))  # 14, 4 and 1 frames: 5, 1 and 0 masked
    output = objective().eval().evaluate(batch, 0)
    assert output.encoder_out_lens.tolist() == [14, 4, 1]
    assert output.losses[0] > 0 and output.losses[1:].tolist() == [0.0, 0.0]


def test_a_batch_without_masked_frames_has_no_loss_and_finite_gradients(objective, make_batch):
    objective = objective().train()
    batch = make_batch(lens=(7, 9), token_lens=(1, 1))  # of one frame each
    objective.options.mask_prob = 0.0
    for number in range(2):
        output = objective(batch, 0, number)
        assert output.losses.tolist() == [0.0, 0.0]
        output.loss_sum.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.model.parameters())
    assert all(math.isfinite(value) for value in logged(output).values())


def test_a_collapsed_quantiser_is_seen(objective, batch):
    objective = objective().eval()
    with torch.no_grad():
        objective.model.quantizer.logits.bias.view(2, 6)[:, 2] = 1e4
    metrics = logged(objective.evaluate(batch, 0))
    assert (metrics["perplexity_0"], metrics["perplexity_1"]) == pytest.approx((1, 1))
    assert metrics["diversity_loss"] == pytest.approx((12 - 2) / 12)
    assert metrics["chance"] == pytest.approx(1)  # nothing is left to be told apart


# ---------------------------------------------------------------- over a training


def test_validation_is_deterministic_and_training_is_not(objective, batch):
    objective = objective().eval()
    with torch.no_grad():
        first, second = (objective.evaluate(batch, step) for step in (0, 99))
        assert torch.equal(first.losses, second.losses)
        objective.train()
        assert not torch.equal(objective(batch, 0).losses, objective(batch, 0).losses)
        torch.manual_seed(2)
        first = objective(batch, 0).losses
        torch.manual_seed(2)
        assert torch.equal(objective(batch, 0).losses, first)  # the trainer seeds each update


def test_gumbel_temperature_falls_geometrically(objective):
    objective = objective(max_steps=100, gumbel_start=2.0, gumbel_end=0.5)
    found = [objective.gumbel_temperature(step) for step in (0, 50, 100, 1000)]
    assert found == pytest.approx([2.0, 1.0, 0.5, 0.5])


def test_histograms_are_of_the_codes_that_validation_used(objective, batch):
    objective = objective()
    objective.train()(batch, 0)
    assert objective.histograms() == {}
    with torch.no_grad():
        masked = [logged(objective.eval().evaluate(batch, 0))["masked_share"] for _ in range(2)]
        frames = float(objective.evaluate(batch, 0).num_frames)
    found = objective.histograms()
    assert set(found) == {"codes_0", "codes_1"}
    assert int(found["codes_0"].sum()) == round(frames * (sum(masked) + masked[0]))
    assert len(found["codes_1"]) == 6 and int((found["codes_1"] > 0).sum()) > 1
    assert objective.histograms() == {}


def spoken(generator):
    """Six utterances of the same six sounds in a circle, two encoder frames each, from a random one on."""
    sounds = torch.randn(6, 80, generator=torch.Generator().manual_seed(8)) * 4
    first = torch.randint(6, (6, 1), generator=generator)
    features = sounds[(first + torch.arange(99) // 8) % 6] - 8
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    lens = torch.full((6,), 99)
    return Batch(features, lens, torch.zeros(6, 1, dtype=torch.int64), torch.zeros(6), ["c"] * 6, [""] * 6)


def test_a_few_updates_find_hidden_frames_far_more_often_than_chance(objective):
    objective = objective(max_steps=80, num_distractors=20, mask_length=2)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(objective.model.parameters(), lr=0.01)
    held_out = spoken(torch.Generator().manual_seed(1))

    def validate():
        with torch.no_grad():
            return logged(objective.eval().evaluate(held_out, 0))

    before = validate()
    objective.train()
    for step in range(80):
        batch = spoken(generator)
        optimizer.zero_grad()
        for number in range(2):
            output = objective(batch, step, number)
            (output.loss_sum / output.num_frames).backward()
        optimizer.step()
    after = validate()
    for mode in module.MODES:
        assert abs(before[f"accuracy_{mode}"] - before["chance"]) < 0.2
        assert after[f"accuracy_{mode}"] > after["chance"] + 0.4
        assert after[f"contrastive_loss_{mode}"] < before[f"contrastive_loss_{mode}"] - 1
    assert min(after["perplexity_0"], after["perplexity_1"]) > 3
