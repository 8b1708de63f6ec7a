"""tools/bench_rescore.py: made-up lists, both ways timed in turns, and the same figures in table and JSON."""

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import pytest

from transducer_kd.log import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
CONF = ROOT / "egs/librispeech/two_pass/conf/smoke"
TINY = "--utterances 2 --frames 6 --hyps 5 --tokens 4 --edits 1 --vocab 20 --repeats 3".split()

spec = importlib.util.spec_from_file_location("bench_rescore", ROOT / "tools/bench_rescore.py")
bench_rescore = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_rescore)


def test_both_ways_are_timed_and_score_the_same(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rescore.json"
    options = [*TINY, "--config", str(CONF / "teacher_las.yaml"), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_rescore.py", *options])
    bench_rescore.main()
    result, printed = json.loads(path.read_text()), capsys.readouterr().out
    shared, separate = result["seconds"]["shared"], result["seconds"]["separate"]
    assert len(shared) == len(separate) == 3
    assert result["ratio"] == pytest.approx(statistics.median(b / a for a, b in zip(shared, separate)))
    assert (
        f"is {result['ratio']:.2f} times as fast" in printed and "tools/bench_rescore.py --utter" in printed
    )
    assert result["largest_difference"] < 1e-4
    # After each of 0 to 4 tokens of every hypothesis, or once where hypotheses are the same up to there.
    assert result["prefixes"]["separate"] == 2 * 5 * 5
    assert 2 * 5 < result["prefixes"]["shared"] < 50


def test_the_lists_have_the_sizes_asked_for_and_share_what_is_not_edited():
    args = bench_rescore.parse_arguments(TINY)
    nbests = bench_rescore.make_nbests(args)
    assert [len(nbest) for nbest in nbests] == [5, 5] and nbests[0] != nbests[1]
    for first, *others in nbests:
        assert all(len(hyp) == 4 and sum(a != b for a, b in zip(first, hyp)) <= 1 for hyp in others)
        assert any(hyp != first for hyp in others)
    assert all(3 <= token < 20 for nbest in nbests for hyp in nbest for token in hyp)


def test_senseless_options_and_a_phase_without_a_las(capsys):
    for options in (["--hyps", "0"], ["--edits", "5"], ["--vocab", "3"], ["--edits", "-1"]):
        with pytest.raises(SystemExit):
            bench_rescore.parse_arguments([*TINY, *options])
        assert options[0] in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(UserError, match="student.yaml has no LAS"):
        bench_rescore.run(bench_rescore.parse_arguments([*TINY, "--config", str(CONF / "student.yaml")]))
