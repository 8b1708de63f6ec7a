"""A supernet's promises: offline knows no masks, streaming has m*theta, what is left out goes on learning."""

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from transducer_kd.log import UserError
from transducer_kd.models.supernet import MATRICES, GroupMasks, Supernet
from transducer_kd.models.transducer import Transducer
from transducer_kd.train import checkpoint as ckpt

sys.path.insert(0, str(Path(__file__).parents[1]))

import small_supernet  # noqa: E402
from small_supernet import CHUNK, VOCAB, make_config, make_features  # noqa: E402

KINDS = ("unit", "block8x1")


def make_supernet(kind, seed=0, with_masks=True, **changes):
    supernet = small_supernet.make_supernet(kind, seed, **changes)
    if with_masks:
        assign_random(supernet.masks, seed + 1)
    return supernet


def assign_random(masks, seed):
    generator = torch.Generator().manual_seed(seed)
    chosen = {name: torch.rand(m.shape, generator=generator) < 0.6 for name, m in masks.kept().items()}
    for mask in chosen.values():  # in every layer something is left out, and something is kept
        mask[..., 0], mask[..., -1] = False, True
    masks.assign(chosen)


def dense_twin(supernet):
    """A plain transducer with the same weights."""
    twin = Transducer(dataclasses.replace(supernet.config, pruned_groups="none"), VOCAB, with_ctc=True)
    twin.load_state_dict({k: v for k, v in supernet.state_dict().items() if not k.startswith("masks.")})
    return twin.train(supernet.training)


def loss_of(model, chunk_size):
    return model.encode(*make_features(), chunk_size)[0].square().sum()


def masked_by_loops(supernet):
    """Readable twin of masked_weights."""
    masks, out = supernet.masks, {}
    for number, layer in enumerate(supernet.encoder.layers):
        for matrix in MATRICES:
            weight = layer.get_submodule(matrix).weight.detach().clone()
            if supernet.config.pruned_groups == "block8x1":
                kept = getattr(masks, matrix.replace(".", "_"))[number]
                for row in range(weight.size(0)):
                    for column in range(weight.size(1)):
                        if not kept[row // 8, column]:
                            weight[row, column] = 0
            elif matrix.startswith("ff"):
                for unit, is_kept in enumerate(getattr(masks, matrix[:3])[number].tolist()):
                    if not is_kept and matrix.endswith("hidden"):
                        weight[unit] = 0
                    elif not is_kept:
                        weight[:, unit] = 0
            elif matrix.startswith("attention"):
                for head, is_kept in enumerate(masks.heads[number].tolist()):
                    channels = slice(6 * head, 6 * head + 6)
                    if not is_kept and matrix.endswith("out"):
                        weight[:, channels] = 0
                    elif not is_kept:
                        weight.unflatten(0, (3, 24))[:, channels] = 0
            else:
                continue
            out[f"layers.{number}.{matrix}.weight"] = weight
    return out


@pytest.mark.parametrize("kind, number", [("unit", 12), ("block8x1", 16)])
def test_masked_weights_and_sparsity_equal_loops(kind, number):
    supernet = make_supernet(kind)
    expected, found = masked_by_loops(supernet), supernet.masks.masked_weights(supernet.encoder)
    assert len(expected) == number and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    layers = []
    for layer in range(2):
        own = [weight for name, weight in expected.items() if name.startswith(f"layers.{layer}.")]
        layers.append(sum(int((w == 0).sum()) for w in own) / sum(w.numel() for w in own))
    assert supernet.masks.layer_sparsities() == pytest.approx(layers, abs=1e-12)
    assert supernet.masks.sparsity() == pytest.approx(sum(layers) / 2, abs=1e-12) and min(layers) > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_of_the_masks(kind):
    masks = GroupMasks(make_config(kind))
    shapes = {name: tuple(mask.shape) for name, mask in masks.kept().items()}
    if kind == "unit":
        assert shapes == {"ff1": (2, 24), "heads": (2, 4), "ff2": (2, 24)}
    else:
        assert shapes == {
            "ff1_hidden": (2, 3, 16), "ff1_out": (2, 2, 24), "attention_qkv": (2, 9, 16),
            "attention_out": (2, 2, 24), "conv_gate": (2, 4, 16), "conv_out": (2, 2, 16),
            "ff2_hidden": (2, 3, 16), "ff2_out": (2, 2, 24),
        }  # fmt: skip
    assert all(mask.dtype == torch.bool and mask.all() for mask in masks.kept().values())
    assert masks.refreshes.dtype == torch.int64 and int(masks.refreshes) == 0 and masks.sparsity() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_weights_are_those_of_a_transducer(kind):
    torch.manual_seed(3)
    plain = Transducer(make_config("none"), VOCAB).state_dict()
    torch.manual_seed(3)
    supernet = Supernet(make_config(kind), VOCAB)
    state = supernet.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.items())
    assert all(name.startswith("masks.") for name in state.keys() - plain.keys())
    twin = dense_twin(Supernet(make_config(kind), VOCAB, with_ctc=True))
    assert supernet.first_pass_parameters() == twin.first_pass_parameters()


@pytest.mark.parametrize("kind", KINDS)
def test_full_context_is_bit_identical_whatever_the_masks(kind):
    supernet = make_supernet(kind, dropout=0.2).train()
    twin = dense_twin(supernet)
    results = []
    for model in (twin, supernet):
        torch.manual_seed(8)
        loss = loss_of(model, 0)
        loss.backward()
        results.append([loss, *(p.grad for p in model.encoder.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", KINDS)
def test_streaming_with_all_groups_kept_is_a_transducers(kind):
    supernet = make_supernet(kind, with_masks=False)
    assert torch.equal(loss_of(supernet, CHUNK), loss_of(dense_twin(supernet), CHUNK))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_streaming_are_masked_and_those_of_full_context_are_not(kind):
    supernet = make_supernet(kind)
    masked = make_supernet(kind).plain(CHUNK)
    loss_of(masked, CHUNK).backward()
    loss_of(supernet, CHUNK).backward()
    pruned = {name: weight != 0 for name, weight in masked_by_loops(supernet).items()}
    theirs = dict(masked.encoder.named_parameters())
    for name, parameter in supernet.encoder.named_parameters():
        kept = pruned.get(name, torch.tensor(True))
        torch.testing.assert_close(parameter.grad, theirs[name].grad * kept, atol=1e-4, rtol=1e-4)
        assert (parameter.grad * ~kept == 0).all()
    supernet.zero_grad()
    loss_of(supernet, 0).backward()
    weights = dict(supernet.encoder.named_parameters())
    for name, kept in pruned.items():
        assert (~kept).any() and (weights[name].grad[~kept] != 0).float().mean() > 0.9, name


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_shrinks_with_the_streaming_mode(kind, monkeypatch):
    supernet = make_supernet(kind, dropout=0.4).train()
    used = set()
    monkeypatch.setattr(F, "dropout", lambda x, p: used.add(p) or x)
    loss_of(supernet, 0)
    assert used == {0.4}
    used.clear()
    loss_of(supernet, CHUNK)
    assert used == {0.4 * (1 - supernet.masks.sparsity())}


def test_without_a_chunk_size_the_configured_one_decides():
    streaming = make_supernet("unit")
    assert torch.equal(loss_of(streaming, None), loss_of(streaming, CHUNK))
    offline = make_supernet("unit", chunk_size=0)
    assert torch.equal(loss_of(offline, None), loss_of(offline, 0))


@pytest.mark.parametrize("chunk_size", [0, CHUNK])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_subsampled_frames_may_be_shared(kind, chunk_size):
    supernet = make_supernet(kind)
    frames, lens = supernet.encoder.subsample(*make_features())
    found, found_lens = supernet.encode_frames(frames, lens, chunk_size)
    expected, expected_lens = supernet.encode(*make_features(), chunk_size)
    assert torch.equal(found, expected) and torch.equal(found_lens, expected_lens)


@pytest.mark.parametrize("chunk_size", [0, CHUNK, 5])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_plain_is_one_mode_by_itself(kind, chunk_size):
    supernet = make_supernet(kind)
    torch.manual_seed(1)
    plain = supernet.plain(chunk_size)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))  # training goes on with the same random numbers
    assert type(plain) is Transducer and plain.config.pruned_groups == "none" and not plain.training
    assert plain.config.encoder.chunk_size == chunk_size and supernet.config.encoder.chunk_size == CHUNK
    x, x_lens = make_features()
    expected, lens = supernet.encode(x, x_lens, chunk_size)
    torch.testing.assert_close(plain.encode(x, x_lens)[0], expected, atol=1e-5, rtol=1e-5)
    if chunk_size:
        state = plain.encoder.streaming_init(2, x.device)
        for start in range(0, 3 * chunk_size, chunk_size):
            chunk = x[:, 4 * start : 4 * (start + chunk_size) + 3]
            y, _, state = plain.encoder.streaming_forward(chunk, torch.tensor([chunk.size(1)] * 2), state)
            own = expected[0, start : start + chunk_size]  # the other utterance ends before
            torch.testing.assert_close(y[0], own, atol=1e-4, rtol=1e-4)
    before = loss_of(supernet, chunk_size)
    for parameter in plain.parameters():
        parameter.zero_()
    assert torch.equal(loss_of(supernet, chunk_size), before)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_survive_a_checkpoint(kind, tmp_path):
    supernet = make_supernet(kind)
    average = ckpt.start_running_average(supernet)
    assign_random(supernet.masks, 9)
    ckpt.update_running_average(average, supernet, 5, 5)
    ckpt.save_checkpoint(tmp_path / "epoch-1.pt", {"model": supernet.state_dict(), "model_avg": average})
    content = ckpt.load_checkpoint(tmp_path / "epoch-1.pt")
    for name in ("model", "model_avg"):
        other = copy.deepcopy(make_supernet(kind, seed=4))
        assert other.masks.sparsity() != supernet.masks.sparsity()
        reference = other.state_dict()
        other.load_state_dict({k: v.to(reference[k].dtype) for k, v in content[name].items()})
        for mask, value in supernet.masks.kept().items():
            assert content[name][f"masks.{mask}"].dtype == torch.bool
            assert torch.equal(other.masks.kept()[mask], value)
        assert int(other.masks.refreshes) == 2 and other.masks.sparsity() == supernet.masks.sparsity()
    assert torch.equal(average["masks.refreshes"], torch.tensor(2))


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"feedforward_dim": 20}, r"ff1\.hidden has 20"),
        ({"encoder_dim": 12}, r"ff1\.out has 12"),
        ({"num_heads": 3, "head_dim": 2}, r"attention\.qkv has 18"),
    ],
)
def test_rows_that_are_no_blocks_are_refused(changes, named):
    with pytest.raises(UserError, match=rf"block8x1 needs .* multiple of 8 rows, but {named}"):
        make_supernet("block8x1", **changes)
    make_supernet("unit", **changes)
