import numpy as np
import pytest

from transducer_kd.decode import wer


def utterance(cut_id, ref, hyp):
    return cut_id, ref.split(), hyp.split()


UTTERANCES = [
    utterance("u2", "the cat sat", "the cat sat"),
    utterance("u1", "turn on the light", "turn the big lights"),
    utterance("u3", "play", ""),
    utterance("u4", "stop", "stop now"),
]


def test_counts_and_rate():
    report = wer.score(UTTERANCES)
    # u1: "on" deleted, "big" inserted, "light" became "lights"; u3: deleted; u4: "now" inserted
    assert (report.insertions, report.deletions, report.substitutions) == (2, 2, 1)
    assert (report.errors, report.ref_words) == (5, 9)
    assert report.wer == pytest.approx(100 * 5 / 9)
    assert wer.word_error_rate(UTTERANCES) == pytest.approx(report.wer)
    assert report.line().startswith("%WER 55.56% [5 / 9, 2 ins, 2 del, 1 sub ] 95% interval ")


def test_interval_covers_the_rate_and_is_reproducible():
    rng = np.random.default_rng(1)
    utterances = [
        (str(i), ["w"] * 10, ["w"] * (10 - int(wrong)) + ["x"] * int(wrong))
        for i, wrong in enumerate(rng.binomial(10, 0.1, size=300))
    ]
    report = wer.score(utterances)
    assert report.wer_low < report.wer < report.wer_high
    # 3000 words that err independently with probability 0.1: 1.96 standard deviations are 1.07.
    assert report.wer_high - report.wer_low == pytest.approx(2 * 1.07, rel=0.15)
    assert wer.score(utterances) == report


def test_interval_of_few_errors_stays_above_zero():
    utterances = [(str(i), ["a", "b"], ["a", "b"]) for i in range(50)] + [("x", ["a", "b"], ["a", "c"])]
    report = wer.score(utterances)
    assert report.wer_low == 0.0 < report.wer < report.wer_high


def test_no_errors_no_words_nothing():
    perfect = wer.score([utterance("u", "a b", "a b")])
    assert (perfect.wer, perfect.wer_low, perfect.wer_high) == (0.0, 0.0, 0.0)
    assert wer.score([]).wer == 0.0
    assert wer.word_error_rate([]) == 0.0
    assert wer.score([utterance("u", "", "a")]).wer == float("inf")


def test_paired_bootstrap_sees_what_separate_intervals_cannot():
    """B makes A's errors and, in 8 of 200 utterances, one more: the utterances' difficulty cancels."""
    rng = np.random.default_rng(3)
    hard = rng.binomial(10, rng.choice([0.02, 0.5], size=200))
    a = [(str(i), ["w"] * 10, ["w"] * (10 - k) + ["x"] * int(k)) for i, k in enumerate(hard)]
    b = [
        (cut, ref, ["x"] + hyp[1:] if int(cut) < 12 and hyp[0] == "w" else hyp)
        for cut, ref, hyp in reversed(a)
    ]
    extra = sum(x[2] != y[2] for x, y in zip(a, reversed(b)))
    result = wer.compare(a, b)
    assert result.difference == pytest.approx(100 * extra / 2000)
    assert 0 < result.low <= result.difference <= result.high
    assert result.p_value < 0.01
    assert wer.score(b).wer_low < wer.score(a).wer
    opposite = wer.compare(b, a)
    assert (opposite.difference, opposite.low) == pytest.approx((-result.difference, -result.high))
    assert opposite.p_value == pytest.approx(result.p_value)


def test_paired_bootstrap_p_value_of_no_difference():
    same = wer.compare(UTTERANCES, UTTERANCES)
    assert (same.difference, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    # One error each, in different utterances: every difference is chance.
    a = [utterance("1", "a b", "a x"), utterance("2", "a b", "a b")]
    b = [utterance("1", "a b", "a b"), utterance("2", "a b", "a x")]
    assert wer.compare(a, b).p_value == 1.0


def test_paired_bootstrap_resamples_in_blocks_of_bounded_size():
    assert sum(wer._blocks(10000, 7000)) == 10000
    assert max(wer._blocks(10000, 7000)) * 7000 <= 2_000_000
    assert wer._blocks(5, 10_000_000) == [1] * 5


@pytest.mark.parametrize("other", [UTTERANCES[:3], UTTERANCES[:3] + [utterance("u5", "a", "a")], []])
def test_paired_bootstrap_refuses_other_utterances(other):
    with pytest.raises(ValueError, match="same utterances"):
        wer.compare(UTTERANCES, other)


def test_files_are_icefalls(tmp_path):
    utterances = [
        utterance("b", "turn on the light", "turn the light"),
        utterance("a", "one two three four", "one too tree four five"),
    ]
    wer.write_results(tmp_path / "greedy_search", "test-clean", "epoch-1-avg-1", utterances, "greedy_search")
    folder = tmp_path / "greedy_search"
    assert sorted(p.name for p in folder.iterdir()) == [
        "errs-test-clean-epoch-1-avg-1.txt",
        "recogs-test-clean-epoch-1-avg-1.txt",
        "wer-summary-test-clean-epoch-1-avg-1.txt",
    ]
    assert (folder / "recogs-test-clean-epoch-1-avg-1.txt").read_text() == (
        "a:\tref=['one', 'two', 'three', 'four']\n"
        "a:\thyp=['one', 'too', 'tree', 'four', 'five']\n"
        "b:\tref=['turn', 'on', 'the', 'light']\n"
        "b:\thyp=['turn', 'the', 'light']\n"
    )
    assert (folder / "wer-summary-test-clean-epoch-1-avg-1.txt").read_text() == (
        "settings\tWER\ngreedy_search\t50.00\n"
    )
    sections = (folder / "errs-test-clean-epoch-1-avg-1.txt").read_text().split("\n\n")
    assert sections == [
        "%WER = 50.00\n"
        "Errors: 1 insertions, 1 deletions, 2 substitutions, over 8 reference words (5 correct)\n"
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, "
        "INSERTIONS:, PER-WORD STATS:",
        "PER-UTT DETAILS: corr or (ref->hyp)  \n"
        "a:\tone (two three->too tree) four (*->five)\n"
        "b:\tturn (on->*) the light",
        "SUBSTITUTIONS: count ref -> hyp\n1   two -> too\n1   three -> tree",
        "DELETIONS: count ref\n1   on",
        "INSERTIONS: count hyp\n1   five",
        "PER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp\n"
        "five   0 1 0 1\non   0 1 1 0\nthree   0 1 1 0\ntoo   0 1 0 1\ntree   0 1 0 1\ntwo   0 1 1 0\n"
        "four   1 0 1 1\nlight   1 0 1 1\none   1 0 1 1\nthe   1 0 1 1\nturn   1 0 1 1\n",
    ]
