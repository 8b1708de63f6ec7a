import pytest
import torch

from transducer_kd.decode.greedy import greedy_search
from transducer_kd.decode.streaming import streaming_greedy_search
from transducer_kd.log import UserError


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 64])
@pytest.mark.parametrize("kind", ["stateless", "lstm"])
def test_chunk_by_chunk_equals_masked_full_sequence(build_model, chunk_size, kind):
    model = build_model(kind, chunk_size=chunk_size)
    x_lens = torch.tensor([101, 7, 58, 99, 34, 67])
    x = 4 * torch.randn(len(x_lens), int(x_lens.max()), 80) - 8
    expected = greedy_search(model, *model.encode(x, x_lens), max_sym_per_frame=2)
    found = streaming_greedy_search(model, x, x_lens, max_sym_per_frame=2)
    assert sum(len(h.tokens) for h in expected) > 10
    for hyp, reference in zip(found, expected):
        assert (hyp.tokens, hyp.timestamps) == (reference.tokens, reference.timestamps)
        assert hyp.score == pytest.approx(reference.score, abs=1e-3)


def test_an_offline_model_needs_a_chunk_size(build_model):
    model = build_model(chunk_size=0)
    x, x_lens = torch.randn(1, 40, 80), torch.tensor([40])
    with pytest.raises(UserError, match="--chunk-size"):
        streaming_greedy_search(model, x, x_lens)
    masked = greedy_search(model, *model.encode(x, x_lens, 4))
    assert streaming_greedy_search(model, x, x_lens, chunk_size=4)[0].tokens == masked[0].tokens
