"""A supernet's streaming mode by itself: it computes the same, and what it weighs adds up by hand."""

import dataclasses

import pytest
import torch

from transducer_kd.compress.extract import extract, kept_groups
from transducer_kd.compress.pruning import choose_masks
from transducer_kd.compress.size import Size, count
from transducer_kd.models.transducer import Transducer

KINDS = ("unit", "block8x1")
PARTS = ("encoder", "decoder", "joiner")


def extracted(supernet):
    config, state = extract(supernet)
    model = Transducer(config, supernet.vocab_size, with_ctc=True).eval()
    model.load_state_dict(state)
    return model


@pytest.fixture(params=KINDS)
def supernet(request, make_supernet):
    supernet = make_supernet(request.param)
    supernet.masks.assign(choose_masks(supernet, 0.5))
    return supernet


@torch.no_grad()
def test_it_streams_as_the_supernet_does(supernet, features):
    model, (x, x_lens) = extracted(supernet), features
    assert model.config.encoder.chunk_size == 3 and model.config.pruned_groups == "none"
    expected, lens = supernet.encode(x, x_lens)
    found, found_lens = model.encode(x, x_lens)
    assert torch.equal(lens, found_lens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    decoder_out = supernet.decode_labels(torch.tensor([[3, 4], [5, 6]]))
    logits = supernet.joiner(expected[:, :, None], decoder_out[:, None])
    torch.testing.assert_close(
        model.joiner(found[:, :, None], model.decode_labels(torch.tensor([[3, 4], [5, 6]]))[:, None]),
        logits, atol=1e-5, rtol=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(model.ctc_output(found), supernet.ctc_output(expected), atol=1e-5, rtol=1e-5)
    state = model.encoder.streaming_init(2, x.device)
    for start in range(0, 12, 3):
        chunk = x[:, 4 * start : 4 * start + 15]
        y, _, state = model.encoder.streaming_forward(chunk, torch.tensor([15, 15]), state)
        torch.testing.assert_close(y, expected[:, start : start + 3], atol=1e-4, rtol=1e-4)
    other_mode = supernet.encode(x, x_lens, 0)[0]
    assert not torch.allclose(model.encode(x, x_lens, 0)[0], other_mode, atol=0.01)


def test_units_are_gone(make_supernet):
    supernet = make_supernet("unit")
    supernet.masks.assign(choose_masks(supernet, 0.5))
    encoder, masks = extracted(supernet).config.encoder, supernet.masks
    assert (encoder.num_heads, encoder.head_dim, encoder.feedforward_dim) == (2, 6, 12)
    original = dataclasses.replace(encoder, num_heads=4, feedforward_dim=24)
    assert original == supernet.config.encoder
    for layer, kept in enumerate(kept_groups(masks)):
        assert kept["layer"] == layer
        for name in ("heads", "ff1", "ff2"):
            assert kept[name] == [i for i, is_kept in enumerate(getattr(masks, name)[layer]) if is_kept]


def test_a_head_size_that_was_implied_is_kept(make_supernet, features):
    supernet = make_supernet("unit", head_dim=0)
    supernet.masks.assign(choose_masks(supernet, 0.5))
    model = extracted(supernet)
    assert (model.config.encoder.num_heads, model.config.encoder.head_dim) == (2, 4)
    torch.testing.assert_close(
        model.encode(*features)[0], supernet.encode(*features)[0], atol=1e-5, rtol=1e-5
    )


def test_blocks_are_zero_and_are_counted(make_supernet):
    supernet = make_supernet("block8x1")
    supernet.masks.assign(choose_masks(supernet, 0.5))
    model = extracted(supernet)
    assert model.config.encoder == supernet.config.encoder
    for layer, kept in enumerate(kept_groups(supernet.masks)):
        for name in supernet.masks.kept():
            weight = model.encoder.layers[layer].get_submodule(name.replace("_", ".")).weight
            assert 8 * kept[name] == int((weight != 0).sum())


def test_layers_of_unlike_numbers_are_refused(make_supernet):
    supernet = make_supernet("unit")
    supernet.masks.ff1[1, 0] = False
    with pytest.raises(ValueError, match=r"different numbers .*\(4, 23, 24\)"):
        extract(supernet)


# ---------------------------------------------------------------- size


def test_all_of_a_model_is_dense(make_supernet):
    supernet = make_supernet("block8x1")
    total = sum(p.numel() for n, p in supernet.named_parameters() if n.split(".")[0] in PARTS)
    whole = Size(total, total, 4 * total, 0, 4 * total)
    assert supernet.first_pass_parameters() == total
    assert count(supernet.plain(0)) == count(supernet) == whole  # nothing is left out yet
    supernet.masks.assign(choose_masks(supernet, 0.5))
    assert count(supernet, 0) == whole != count(supernet)


def test_units_by_hand(make_supernet):
    supernet = make_supernet("unit")
    supernet.masks.assign(choose_masks(supernet, 0.5))
    # A unit: a row of hidden, its bias, a column of out; a head: 18 rows, their biases, 6 columns.
    gone = 2 * (2 * 12 * (16 + 1 + 16) + 2 * (18 * 16 + 18 + 6 * 16))
    total = supernet.first_pass_parameters()
    left = total - gone
    assert count(supernet) == Size(left, left, 4 * left, 0, 4 * total)
    assert count(extracted(supernet)) == Size(left, left, 4 * left, 0, 4 * left)


def test_blocks_by_hand(make_supernet):
    supernet = make_supernet("block8x1")
    kept = {name: torch.zeros_like(mask) for name, mask in supernet.masks.kept().items()}
    for name, mask in kept.items():
        mask[:, 0, :3] = True  # three blocks in each matrix ...
        if name == "conv_out":
            mask[1] = True  # ... but one has them all, and is better off dense
            mask[1, 0, 0] = False
    supernet.masks.assign(kept)
    total = supernet.first_pass_parameters()
    rest = total - 2 * 8 * 480  # 480 blocks in a layer
    sparse = 15  # matrices
    block_rows = 2 * (3 + 2 + 9 + 2 + 4 + 2 + 3 + 2) - 2
    nonzero = rest + sparse * 3 * 8 + 31 * 8
    values = 4 * (rest + sparse * 3 * 8 + 32 * 8)
    index = sparse * 3 * 2 + 4 * (block_rows + sparse)
    expected = Size(total, nonzero, values, index, 4 * total)
    assert count(supernet) == count(extracted(supernet)) == expected
