import pytest
import torch

from transducer_kd.data.tokenizer import UNK_ID
from transducer_kd.decode.greedy import GreedySearcher, greedy_search

LENS = [9, 4, 1, 7]


def slow_greedy(model, encoder_out, max_sym_per_frame):
    """Readable twin, one utterance (T', D): every step runs the decoder over the whole history."""
    tokens, timestamps, score = [], [], 0.0
    for t, frame in enumerate(encoder_out):
        for _ in range(max_sym_per_frame):
            decoder_out = model.decode_labels(torch.tensor([tokens], dtype=torch.int64))[0, -1]
            log_probs = model.joiner(frame, decoder_out).log_softmax(-1)
            token = int(log_probs.argmax())
            score += float(log_probs[token])
            if token in (model.blank_id, UNK_ID):
                break
            tokens.append(token)
            timestamps.append(t)
    return tokens, timestamps, score


@pytest.mark.parametrize("kind", ["stateless", "lstm"])
@pytest.mark.parametrize("max_sym_per_frame", [1, 3])
def test_batched_greedy_equals_the_slow_twin(build_model, build_encoder_out, kind, max_sym_per_frame):
    seen_tokens = set()
    for seed in range(3):
        model = build_model(kind, seed=seed)
        encoder_out, lens = build_encoder_out(LENS, seed)
        for n, hyp in enumerate(greedy_search(model, encoder_out, lens, max_sym_per_frame)):
            tokens, timestamps, score = slow_greedy(model, encoder_out[n, : LENS[n]], max_sym_per_frame)
            assert hyp.tokens == tokens
            assert hyp.timestamps == timestamps
            assert hyp.score == pytest.approx(score, abs=1e-4)
            seen_tokens.update(tokens)
    assert len(seen_tokens) > 2, "the toy models say nothing: the test compares empty lists"


def test_pieces_give_the_same_as_the_whole(build_model, build_encoder_out):
    model = build_model("lstm")
    encoder_out, lens = build_encoder_out(LENS)
    searcher = GreedySearcher(model, len(LENS), encoder_out.device, max_sym_per_frame=2)
    for start in range(0, 9, 2):
        searcher.advance(encoder_out[:, start : start + 2], (lens - start).clamp(0, 2))
    for hyp, whole in zip(searcher.results(), greedy_search(model, encoder_out, lens, max_sym_per_frame=2)):
        assert (hyp.tokens, hyp.timestamps) == (whole.tokens, whole.timestamps)
        assert hyp.score == pytest.approx(whole.score, abs=1e-5)


def test_a_model_that_only_says_blank_gives_empty_hypotheses(build_model, build_encoder_out):
    model = build_model()
    model.joiner.output_linear.bias[0] = 100.0
    encoder_out, lens = build_encoder_out([3, 2])
    for hyp in greedy_search(model, encoder_out, lens):
        assert (hyp.tokens, hyp.timestamps) == ([], [])
        assert hyp.score == pytest.approx(0.0, abs=1e-5)


def test_unk_is_never_emitted(build_model, build_encoder_out):
    model = build_model()
    model.joiner.output_linear.bias[UNK_ID] = 100.0
    encoder_out, lens = build_encoder_out([3])
    assert greedy_search(model, encoder_out, lens, max_sym_per_frame=5)[0].tokens == []
