"""Attention: both kernels against a loop, rotary positions, and the cache."""

import math

import pytest
import torch
import torch.nn.functional as F

from transducer_kd.models import attention
from transducer_kd.models.attention import RotaryTable, SelfAttention, rotate
from transducer_kd.models.masks import sequence_bias

CPU = torch.device("cpu")


def attend_loop(q, k, v, bias):
    """Slow twin: one query of one head at a time."""
    out = torch.zeros(*q.shape[:3], v.size(-1))
    for n in range(q.size(0)):
        for h in range(q.size(1)):
            for t in range(q.size(2)):
                scores = (
                    torch.stack([q[n, h, t] @ key / math.sqrt(q.size(-1)) for key in k[n, h]]) + bias[n, 0, t]
                )
                out[n, h, t] = sum(w * value for w, value in zip(scores.exp() / scores.exp().sum(), v[n, h]))
    return out


@pytest.mark.parametrize("kernel", ["attend_matmul", "attend_fused"])
def test_kernels_equal_the_loop(kernel):
    if kernel == "attend_fused" and not hasattr(F, "scaled_dot_product_attention"):
        pytest.skip("this torch has no scaled_dot_product_attention; attend_matmul is used")
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 7, 4).unbind(0)
    bias = sequence_bias(torch.tensor([7, 5]), 7, chunk_size=3, left_context=2)
    y = getattr(attention, kernel)(q, k, v, bias)
    valid = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])[:, None, :, None]
    assert torch.allclose(y * valid, attend_loop(q, k, v, bias) * valid, atol=1e-5)
    assert y.isfinite().all()


def test_rows_without_any_key_are_finite_with_finite_gradients():
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    bias = sequence_bias(torch.tensor([1]), 4, chunk_size=1, left_context=0)
    y = attention.attend(q, q, q, bias)
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all()


def test_rotation_makes_scores_depend_on_distance_only():
    torch.manual_seed(0)
    table = RotaryTable(8, max_len=4)
    q, k = torch.randn(8), torch.randn(8)
    rotated_q, rotated_k = (rotate(x.expand(1, 3000, 1, 1, 8), table(3000, CPU))[0, :, 0, 0] for x in (q, k))
    near = rotated_q[5] @ rotated_k[2]
    far = rotated_q[2905] @ rotated_k[2902]
    assert abs(near - far) < 1e-5
    assert abs(near - rotated_q[6] @ rotated_k[2]) > 1e-3
    assert torch.allclose(rotated_q.norm(dim=1), q.norm().expand(3000), atol=1e-5)


def test_a_table_that_grew_in_inference_mode_still_serves_training():
    rotary = RotaryTable(8, max_len=4)
    with torch.inference_mode():
        rotary(9, CPU)
    x = torch.randn(1, 9, 1, 1, 8, requires_grad=True)
    rotate(x, rotary(9, CPU)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "head_dim", [8, 12]
)  # 12: more than the model dimension's share, as after growing a head
@pytest.mark.parametrize("cached", [0, 1, 6])
def test_cache_equals_the_end_of_a_longer_sequence(cached, head_dim):
    torch.manual_seed(0)
    layer = SelfAttention(16, num_heads=2, head_dim=head_dim)
    x = torch.randn(3, 9, 16)
    table = RotaryTable(head_dim)
    whole = layer(x, table(9, CPU), torch.zeros(1, 1, 1, 9))
    cache = torch.zeros(3, cached, 4 * head_dim)
    nothing_before = torch.zeros(1, 1, 1, 2 * cached).index_fill(3, torch.arange(cached), -1e4)
    first, cache = layer.streaming(x[:, :cached], table(2 * cached, CPU), nothing_before, cache)
    rest, _ = layer.streaming(x[:, cached:], table(9, CPU), torch.zeros(1, 1, 1, 9), cache)
    assert torch.allclose(whole[:, cached:], rest, atol=1e-5)
    assert cache.shape == (3, cached, 4 * head_dim)
    assert not torch.equal(first, torch.zeros_like(first)) or cached == 0
