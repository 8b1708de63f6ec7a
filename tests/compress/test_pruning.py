"""Pruning: the schedule's values, what scores a group gets, which ones go, and when."""

import copy

import pytest
import torch

from transducer_kd.compress.pruning import Pruner, choose_masks, group_scores, mask_image, sparsity_at
from transducer_kd.config import PruningConfig
from transducer_kd.models.supernet import MATRICES

KINDS = ("unit", "block8x1")


@pytest.mark.parametrize(
    "step, expected",
    [(0, 0.0), (10, 0.0), (35, 0.4625), (60, 0.7), (85, 0.7875), (110, 0.8), (111, 0.8), (9999, 0.8)],
)
def test_the_cubic_schedule(step, expected):
    cfg = PruningConfig(sparsity=0.8, begin_step=10, num_steps=100)
    assert sparsity_at(step, cfg) == pytest.approx(expected, abs=1e-12)


def test_the_schedule_from_one_share_to_another():
    cfg = PruningConfig(sparsity=0.7, initial_sparsity=0.3, begin_step=10, num_steps=100)
    assert sparsity_at(0, cfg) == sparsity_at(10, cfg) == 0.3 and sparsity_at(110, cfg) == 0.7
    assert sparsity_at(60, cfg) == pytest.approx(0.7 - 0.4 / 8)
    at_once = PruningConfig(sparsity=0.5)
    assert sparsity_at(0, at_once) == 0 and sparsity_at(1, at_once) == 0.5


def matrix_of(supernet, layer, matrix):
    return supernet.encoder.layers[layer].get_submodule(matrix).weight


def scores_by_loops(supernet):
    """Readable twin of group_scores: {mask: {(layer, group...): score}}."""
    found = {}
    for layer in range(2):
        for matrix in MATRICES:
            squares = {}
            for row, values in enumerate(matrix_of(supernet, layer, matrix).tolist()):
                for column, value in enumerate(values):
                    if supernet.config.pruned_groups == "block8x1":
                        group = matrix.replace(".", "_"), row // 8, column
                    elif matrix.startswith("ff"):
                        group = matrix[:3], row if matrix.endswith("hidden") else column
                    elif matrix.startswith("attention"):
                        channel = row % 24 if matrix.endswith("qkv") else column
                        group = "heads", channel // 6
                    else:
                        continue
                    squares[group] = squares.get(group, 0.0) + value * value
            mean = sum(squares.values()) / max(len(squares), 1)
            for (mask, *place), square in squares.items():
                found.setdefault(mask, {}).setdefault((layer, *place), []).append(square / mean)
    return {
        mask: {place: (sum(parts) / len(parts)) ** 0.5 for place, parts in groups.items()}
        for mask, groups in found.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_loops_and_have_one_scale(kind, make_supernet):
    supernet = make_supernet(kind)
    scores = group_scores(supernet)
    for mask, groups in scores_by_loops(supernet).items():
        assert scores[mask].numel() == len(groups)
        for place, expected in groups.items():
            assert float(scores[mask][place]) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(scores[mask].square().flatten(1).mean(dim=1), torch.ones(2))
    with torch.no_grad():
        matrix_of(supernet, 0, "ff1.out").mul_(100)
        matrix_of(supernet, 1, "attention.qkv").mul_(0.01)
    for mask, found in group_scores(supernet).items():
        torch.testing.assert_close(found, scores[mask])


def test_a_matrix_of_zeros_has_scores(make_supernet):
    supernet = make_supernet("block8x1")
    with torch.no_grad():
        matrix_of(supernet, 0, "conv.out").zero_()
    assert not group_scores(supernet)["conv_out"][0].any()
    assert not choose_masks(supernet, 0.3)["conv_out"][0].any()


def test_units_with_the_smallest_scores_go_equally_many_of_each_layer(make_supernet):
    supernet = make_supernet("unit")
    scores = group_scores(supernet)
    for sparsity, left in ((0.0, (24, 4)), (0.3, (17, 3)), (0.5, (12, 2)), (0.9, (2, 1)), (0.99, (1, 1))):
        chosen = choose_masks(supernet, sparsity)
        for name, mask in chosen.items():
            kept = left[name == "heads"]
            for row, own in zip(mask, scores[name].tolist()):
                best = sorted(range(len(own)), key=lambda group: -own[group])[:kept]
                assert row.nonzero().flatten().tolist() == sorted(best), (name, sparsity)


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8])
def test_blocks_of_all_matrices_of_a_layer_compete(sparsity, make_supernet):
    supernet = make_supernet("block8x1")
    with torch.no_grad():  # nearly all that it says is in one column
        matrix_of(supernet, 1, "ff2.out")[:, 3] *= 30
    scores, chosen = group_scores(supernet), choose_masks(supernet, sparsity)
    for layer in range(2):
        flat = [
            (float(scores[name][layer][place]), bool(chosen[name][layer][place]))
            for name in scores
            for place in [tuple(p) for p in torch.ones_like(scores[name][layer]).nonzero().tolist()]
        ]
        masked = [score for score, kept in flat if not kept]
        assert len(masked) == round(sparsity * len(flat)) and len(flat) == 480
        assert max(masked, default=0) <= min(score for score, kept in flat if kept)
    if sparsity:
        assert chosen["ff2_out"][1].float().mean() < 0.5 * chosen["ff2_out"][0].float().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_of_equals_the_earlier_are_kept(kind, make_supernet):
    supernet = make_supernet(kind)
    with torch.no_grad():
        for parameter in supernet.encoder.parameters():
            parameter.fill_(0.5)
    chosen = choose_masks(supernet, 0.5)
    flat = torch.cat([mask.flatten(1) for mask in chosen.values()], dim=1)
    pools = [flat] if kind == "block8x1" else chosen.values()
    for pool in pools:
        half = pool.size(1) // 2
        assert pool[:, :half].all() and not pool[:, half:].any()


def walk(supernet, pruner, steps, seed=2):
    """Random updates; {step: what the pruner said} where it did, and the masks after every step."""
    generator, said, masks = torch.Generator().manual_seed(seed), {}, []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for parameter in supernet.encoder.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        found = pruner(step)
        if found:
            said[step] = found
        masks.append({name: mask.clone() for name, mask in supernet.masks.kept().items()})
    return said, masks


def is_same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_change_when_they_are_due_and_never_else(kind, make_supernet):
    supernet = make_supernet(kind)
    cfg = PruningConfig(sparsity=0.6, begin_step=4, num_steps=10, refresh_every=3)
    said, masks = walk(supernet, Pruner(supernet, cfg), 30)
    assert list(said) == [4, 7, 10, 13, 14] and int(supernet.masks.refreshes) == 5
    for step, (before, after) in enumerate(zip(masks, masks[1:]), 2):
        assert is_same(before, after) == (step not in (7, 10, 13, 14)), step  # none is left out at 4
    assert said[4]["pruning/sparsity"] == 0 and said[4]["pruning/kept_overlap"] == 1
    of_layers = [said[14][f"pruning/sparsity_layer{layer}"] for layer in range(2)]
    assert said[14]["pruning/sparsity"] == pytest.approx(sum(of_layers) / 2)
    expected = {"unit": (2 * 14 * 32 + 2 * 384) / 3072, "block8x1": 288 / 480}[kind]
    assert said[14]["pruning/sparsity"] == pytest.approx(expected) == supernet.masks.sparsity()
    assert said[14].keys() == said[4].keys() and len(said[4]) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_processes_with_the_same_weights_agree(kind, make_supernet):
    cfg = PruningConfig(sparsity=0.6, begin_step=2, num_steps=4, refresh_every=1)
    first = make_supernet(kind)
    second = copy.deepcopy(first)
    assert is_same(walk(first, Pruner(first, cfg), 6)[1][-1], walk(second, Pruner(second, cfg), 6)[1][-1])


def test_masks_taken_over_are_chosen_anew_at_the_first_step_of_the_schedule(make_supernet):
    supernet = make_supernet("unit")
    supernet.masks.assign(choose_masks(supernet, 0.5))
    taken_over = {name: mask.clone() for name, mask in supernet.masks.kept().items()}
    cfg = PruningConfig(sparsity=0.75, initial_sparsity=0.5, begin_step=3, num_steps=2, refresh_every=100)
    said, masks = walk(supernet, Pruner(supernet, cfg), 6)
    assert list(said) == [3, 5]
    assert is_same(masks[1], taken_over) and not is_same(masks[2], taken_over)
    assert [int(mask["ff1"][0].sum()) for mask in masks] == [12, 12, 12, 12, 6, 6]


def test_masks_taken_over_stay_until_the_first_refresh_of_a_schedule_that_begins_at_once(make_supernet):
    supernet = make_supernet("unit")
    supernet.masks.assign(choose_masks(supernet, 0.5))
    cfg = PruningConfig(sparsity=0.75, initial_sparsity=0.5, begin_step=0, num_steps=4, refresh_every=2)
    said, _ = walk(supernet, Pruner(supernet, cfg), 6)
    assert list(said) == [2, 4]


def test_what_was_left_out_can_return(make_supernet):
    supernet = make_supernet("unit")
    pruner = Pruner(supernet, PruningConfig(0.5, 0.5, begin_step=1, num_steps=10, refresh_every=1))
    pruner(1)
    before = {name: mask.clone() for name, mask in supernet.masks.kept().items()}
    gone = int((~before["ff1"][1]).nonzero()[0])
    with torch.no_grad():  # as updates through full context may do
        matrix_of(supernet, 1, "ff1.hidden")[gone] *= 10
    found = pruner(2)
    assert supernet.masks.ff1[1, gone]
    kept = 4 * 12 + 2 * 2
    new = sum(int((mask & ~before[name]).sum()) for name, mask in supernet.masks.kept().items())
    assert new > 0 and found["pruning/kept_overlap"] == pytest.approx(1 - new / kept)
    assert pruner(3)["pruning/kept_overlap"] == 1


def test_the_picture_of_the_masks(make_supernet):
    units, blocks = (make_supernet(kind).masks for kind in KINDS)
    units.ff1[1, 2] = units.heads[0, 3] = False
    picture = mask_image(units)
    assert picture.shape == (2 * 8, 24 + 4 + 24) and int((picture == 0).sum()) == 2 * 8
    assert (picture[8:, 2] == 0).all() and (picture[:8, 24 + 3] == 0).all()
    blocks.attention_qkv[0, :3, 5] = False  # 3 of 9 blocks of a column
    picture = mask_image(blocks)
    assert picture.shape == (2 * 8, 5 * 16 + 3 * 24)
    column = picture[:, 16 + 24 + 5]  # behind ff1_hidden and ff1_out
    torch.testing.assert_close(column, torch.tensor([6 / 9, 1.0]).repeat_interleave(8))
    assert int((picture == 1).sum()) == picture.numel() - 8
