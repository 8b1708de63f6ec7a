"""The reference against arithmetic done by hand and against a sum over all paths."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

from transducer_kd.losses.rnnt_reference import occupancy, rnnt_loss_reference

sys.path.insert(0, str(Path(__file__).parent))
from loss_problems import make_problem  # noqa: E402

# T'=2, U=1, V=3, the token is class 1. Probabilities (blank, token, other) at the nodes:
#   (t=0,u=0): .3 .6 .1    (t=0,u=1): .5 .2 .3    (t=1,u=0): .7 .2 .1    (t=1,u=1): .8 .1 .1
# Two paths: token at frame 0: .6 x .5 x .8 = .24; token at frame 1: .3 x .2 x .8 = .048. Together .288.
HAND = torch.tensor(
    [[[[0.3, 0.6, 0.1], [0.5, 0.2, 0.3]], [[0.7, 0.2, 0.1], [0.8, 0.1, 0.1]]]], dtype=torch.float64
)
HAND_SYMBOLS = torch.tensor([[1]])
HAND_BOUNDARY = torch.tensor([[0, 0, 1, 2]])


def test_loss_by_hand():
    loss = rnnt_loss_reference(HAND.log(), HAND_SYMBOLS, HAND_BOUNDARY)
    assert loss.item() == pytest.approx(1.244795, abs=1e-6)  # -ln .288


def test_occupancy_by_hand():
    passed = occupancy(HAND.log(), HAND_SYMBOLS, HAND_BOUNDARY)
    expected = torch.tensor([[[1.0, 5 / 6], [1 / 6, 1.0]]], dtype=torch.float64)  # .24 / .288 = 5/6
    torch.testing.assert_close(passed, expected)


def test_gradient_by_hand():
    # d loss / d logit_k at a node = occupancy x p_k - occupancy of the arc that emits k.
    logits = HAND.log().requires_grad_()
    rnnt_loss_reference(logits, HAND_SYMBOLS, HAND_BOUNDARY).sum().backward()
    first = torch.tensor([0.3 - 1 / 6, 0.6 - 5 / 6, 0.1], dtype=torch.float64)
    last = torch.tensor([0.8 - 1.0, 0.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(logits.grad[0, 0, 0], first)
    torch.testing.assert_close(logits.grad[0, 1, 1], last)


def all_paths(num_frames, num_tokens):
    """Every path as the frames at which its tokens are emitted, a non-decreasing tuple."""
    return itertools.combinations_with_replacement(range(num_frames), num_tokens)


@pytest.mark.parametrize("num_frames,num_tokens", list(itertools.product([1, 2, 3, 4], [0, 1, 2, 3])))
def test_equals_the_sum_over_all_paths(num_frames, num_tokens):
    p = make_problem(
        [num_frames], [num_tokens], vocab=4, seed=num_frames * 10 + num_tokens, dtype=torch.float64
    )
    probs = p.logits().softmax(-1)[0]
    total, passed = 0.0, torch.zeros(num_frames, num_tokens + 1, dtype=torch.float64)
    for emitted_at in all_paths(num_frames, num_tokens):
        weight, u, nodes = 1.0, 0, []
        for t in range(num_frames):
            nodes.append((t, u))
            while u < num_tokens and emitted_at[u] == t:
                weight *= probs[t, u, p.symbols[0, u]].item()
                u += 1
                nodes.append((t, u))
            weight *= probs[t, u, 0].item()
        total += weight
        for node in nodes:
            passed[node] += weight
    loss = rnnt_loss_reference(p.logits(), p.symbols, p.boundary)
    assert loss.item() == pytest.approx(-math.log(total), abs=1e-10)
    torch.testing.assert_close(occupancy(p.logits(), p.symbols, p.boundary)[0], passed / total)
