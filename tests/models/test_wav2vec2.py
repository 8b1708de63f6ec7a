"""Quantiser and span masks against loops and statistics; the encoder inside stays a transducer's."""

import copy

import pytest
import torch
import torch.nn.functional as F

from transducer_kd.config import EncoderConfig, ModelConfig, Wav2Vec2Config
from transducer_kd.models.subsampling import LOG_MEL_MEAN, LOG_MEL_SCALE, ConvSubsampling
from transducer_kd.models.supernet import Supernet
from transducer_kd.models.transducer import Transducer
from transducer_kd.models.wav2vec2 import GumbelQuantizer, Wav2Vec2, span_mask

OPTIONS = Wav2Vec2Config(num_codebooks=2, num_entries=5, codebook_dim=6, projection_dim=7)


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return GumbelQuantizer(4, 2, 5, 6).double()


def make_source(groups):
    encoder = EncoderConfig(
        num_layers=2, encoder_dim=16, num_heads=2, feedforward_dim=24, cnn_module_kernel=5, dropout=0.0,
        subsampling_channels=2, chunk_size=4, left_context=6,
    )  # fmt: skip
    torch.manual_seed(1)
    model_class = Transducer if groups == "none" else Supernet
    return model_class(ModelConfig(encoder=encoder, pruned_groups=groups), 9)


# ---------------------------------------------------------------- quantiser


def test_in_eval_each_codebook_gives_its_likeliest_entry(quantizer):
    x = torch.randn(11, 4, dtype=torch.float64)
    quantised, probabilities, codes = quantizer.eval()(x, 0.7)
    for f in range(11):
        logits = (quantizer.logits.weight @ x[f] + quantizer.logits.bias).view(2, 5)
        for g in range(2):
            best = max(range(5), key=lambda v: logits[g, v])
            assert codes[f, g] == best
            assert torch.equal(quantised[f, 3 * g : 3 * g + 3], quantizer.codebooks[g, best])
            torch.testing.assert_close(probabilities[f, g], logits[g].softmax(0))
    assert all(torch.equal(a, b) for a, b in zip(quantizer(x, 2.0), (quantised, probabilities, codes)))


def test_in_training_entries_are_drawn_as_often_as_they_are_likely(quantizer):
    x = torch.tensor([[0.1, -0.4, 0.3, 0.2]], dtype=torch.float64).expand(6000, 4)
    for temperature in (0.3, 2.0):
        _, probabilities, codes = quantizer(x, temperature)
        for g in range(2):
            found = torch.bincount(codes[:, g], minlength=5) / 6000
            p = probabilities[0, g]
            assert ((found - p).abs() < 4 * (p * (1 - p) / 6000).sqrt()).all()


def test_the_gradient_goes_straight_through(quantizer):
    """The vectors are those of hard choices, the logits' gradient is that of a soft mixture."""
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(9, 6, dtype=torch.float64)
    torch.manual_seed(5)
    quantised, _, codes = quantizer(x, 0.8)
    expected = torch.cat([quantizer.codebooks[g][codes[:, g]] for g in range(2)], dim=1)
    assert torch.equal(quantised, expected)  # equal codes: equal to the bit
    ours = torch.autograd.grad((quantised * weights).sum(), (x, quantizer.codebooks))

    torch.manual_seed(5)
    logits = quantizer.logits(x).view(9, 2, 5)
    noise = -(-torch.rand_like(logits).log()).log()
    soft = ((logits + noise) / 0.8).softmax(-1)
    assert torch.equal(soft.argmax(-1), codes)
    mixture = torch.cat([soft[:, g] @ quantizer.codebooks[g] for g in range(2)], dim=1)
    torch.testing.assert_close(ours[0], torch.autograd.grad((mixture * weights).sum(), x)[0])
    assert ours[0].abs().sum() > 0
    torch.testing.assert_close(
        ours[1], torch.autograd.grad((expected * weights).sum(), quantizer.codebooks)[0]
    )


def test_a_new_quantiser_uses_many_entries_and_its_codes_follow_the_frame_not_the_noise():
    torch.manual_seed(0)
    quantizer, x = GumbelQuantizer(64, 2, 40, 8), torch.randn(400, 64)
    first, second = (quantizer(x, 2.0)[2] for _ in range(2))
    assert min(len(first[:, g].unique()) for g in range(2)) > 30
    assert (first == second).float().mean() > 0.6
    with torch.no_grad():
        quantizer.logits.weight.mul_(0.01)  # with weights of a usual size it would be the noise
    assert (quantizer(x, 2.0)[2] == quantizer(x, 2.0)[2]).float().mean() < 0.1


def test_quantiser_of_no_frames_and_under_autocast(quantizer):
    quantised, probabilities, codes = quantizer(torch.zeros(0, 4, dtype=torch.float64), 1.0)
    assert quantised.shape == (0, 6) and probabilities.shape == (0, 2, 5) and codes.shape == (0, 2)
    quantizer, x = quantizer.float().eval(), torch.randn(9, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(x, 1.0)
    assert found[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, quantizer(x.float(), 1.0)))


# ---------------------------------------------------------------- span masks


def span_mask_reference(lens, num_frames, prob, length, draws):
    """Frame by frame, from the same draws: the first of an utterance's is for the span it may need."""
    mask = torch.zeros(len(lens), num_frames, dtype=torch.bool)
    for n, end in enumerate(lens):
        starts = [t for t in range(end) if draws[n, t + 1] < prob]
        if not [t for t in starts if t < end - 1] and end > 1:
            starts.append(int(draws[n, 0] * (end - 1)))
        for start in starts:
            mask[n, start : min(start + length, end)] = True
    return mask


@pytest.mark.parametrize("prob, length", [(0.0, 3), (0.1, 1), (0.2, 4), (0.05, 50), (1.0, 2)])
def test_span_mask_equals_its_slow_twin(prob, length):
    lens = [20, 1, 2, 13, 0, 7, 3, 19]
    for seed in range(20):
        mask = span_mask(torch.tensor(lens), 20, prob, length, torch.Generator().manual_seed(seed))
        draws = torch.rand(8, 21, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(mask, span_mask_reference(lens, 20, prob, length, draws))
        counts = mask.sum(1).tolist()
        assert all(count >= min(2, length) for count, end in zip(counts, lens) if end > 1)


def test_share_that_is_masked_in_long_utterances():
    torch.manual_seed(0)
    mask = span_mask(torch.tensor([20000, 15000]), 20000, 0.065, 10)
    expected = 1 - (1 - 0.065) ** 10
    assert mask[0].float().mean().item() == pytest.approx(expected, abs=0.02)
    assert mask[1, :15000].float().mean().item() == pytest.approx(expected, abs=0.02)
    assert not mask[1, 15000:].any()


def test_span_mask_draws_anew_unless_a_generator_says_otherwise():
    lens = torch.tensor([300])
    assert not torch.equal(span_mask(lens, 300, 0.1, 5), span_mask(lens, 300, 0.1, 5))
    same = (span_mask(lens, 300, 0.1, 5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(*same)


# ---------------------------------------------------------------- the model


def test_frames_before_the_norm_are_those_that_forward_normalises():
    torch.manual_seed(0)
    subsampling, x = ConvSubsampling(20, 4, 8), torch.randn(2, 31, 20)
    h = F.silu(subsampling._first((x - LOG_MEL_MEAN) * LOG_MEL_SCALE))
    projected = subsampling.out(F.silu(subsampling.conv2(h)).permute(0, 2, 3, 1).flatten(2))
    assert torch.equal(subsampling.project(x), projected)
    assert torch.equal(subsampling(x), subsampling.norm(projected))


@pytest.mark.parametrize("groups", ["none", "unit", "block8x1"])
def test_its_encoder_is_the_transducers(groups):
    source = make_source(groups)
    model = Wav2Vec2(source, OPTIONS)
    kept = {name for name in source.state_dict() if name.split(".")[0] in ("encoder", "masks")}
    added = {name.split(".")[0] for name in model.state_dict().keys() - kept}
    assert kept < set(model.state_dict())
    assert added == {"mask_embedding", "quantizer", "context_proj", "target_proj"}
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == added | {"encoder"}
    with torch.no_grad():
        for p in model.encoder.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    other = make_source(groups)
    missing, unknown = other.load_state_dict(model.state_dict(), strict=False)
    assert {name.split(".")[0] for name in unknown} == added
    assert not {name.split(".")[0] for name in missing} & {"encoder", "masks"}
    x, lens = torch.randn(2, 47, 80) - 8, torch.tensor([47, 30])
    for chunk_size in (0, 4):
        assert torch.equal(other.encode(x, lens, chunk_size)[0], source.encode(x, lens, chunk_size)[0])


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_context_is_what_the_encoder_says_of_the_hidden_frames(chunk_size):
    source = make_source("unit")
    source.masks.assign({name: torch.rand(mask.shape) < 0.5 for name, mask in source.masks.kept().items()})
    model = Wav2Vec2(source, OPTIONS)
    x, lens = torch.randn(2, 47, 80) - 8, torch.tensor([11, 6])
    frames, projected = model.frames(x)
    assert torch.equal(frames, model.encoder.subsampling(x)) and projected.shape == frames.shape
    mask = span_mask(lens, 11, 0.2, 2)
    hidden = model.hide(frames, mask)
    assert (hidden[mask] == model.mask_embedding).all() and torch.equal(hidden[~mask], frames[~mask])
    context = model.context(hidden, lens, mask.nonzero(as_tuple=True), chunk_size)
    encoder_out, _ = source.encode_frames(hidden, lens, chunk_size)
    assert torch.equal(context, model.context_proj(encoder_out)[mask])
    targets, _, codes = model.eval().targets(frames[mask], 1.0)
    assert targets.shape == (int(mask.sum()), 7) and codes.shape == (int(mask.sum()), 2)


def test_moving_and_copying_take_along_the_encoder_that_is_used():
    model = Wav2Vec2(make_source("unit"), OPTIONS)
    hidden, lens = torch.randn(1, 8, 16, dtype=torch.float64), torch.tensor([8])
    places = torch.tensor([0, 0]), torch.tensor([2, 5])
    before = model.double().context(hidden, lens, places, 4)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.encoder.norm.weight.mul_(2.0)
    assert torch.equal(model.context(hidden, lens, places, 4), before)
    assert not torch.equal(twin.context(hidden, lens, places, 4), before)


def test_sizes_are_logged():
    source = make_source("none")
    model = Wav2Vec2(source, OPTIONS)
    encoder = sum(p.numel() for p in source.encoder.parameters())
    assert model.deployed_parameters() == encoder and model.vocab_size == 9 and model.config is source.config
    rows = dict(line.rsplit(maxsplit=1) for line in model.parameter_table().splitlines())
    assert rows.pop("encoder") == f"{encoder:,}" and rows["mask_embedding"] == "16"
    assert rows["quantizer"] == str(17 * 10 + 2 * 5 * 3)
    total = encoder + sum(int(number.replace(",", "")) for number in rows.values())
    assert total == sum(p.numel() for p in model.parameters())
