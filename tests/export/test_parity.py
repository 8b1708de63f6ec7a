"""The gate: what it asks of each implementation, on made-up differences and on tiny exported models."""

import json

import numpy as np
import pytest

from transducer_kd.export import parity
from transducer_kd.export.implementations import Comparison
from transducer_kd.export.parity import Recording
from transducer_kd.log import UserError

ABOUT = {"commit": "abc", "command": "export.py"}
GOOD_TENSOR = {
    "part": "joiner",
    "output": "logit",
    "max_difference": 1e-6,
    "limit": 1e-3,
    "starts_at": None,
    "passed": True,
}


def recordings(number, words=10):
    """`number` recordings of so many words each; a recording's first sample is its number."""
    return [
        Recording(f"cut-{i}", np.full(160, i, dtype=np.float32), [f"w{j}" for j in range(words)])
        for i in range(number)
    ]


def saying(changed=()):
    """An implementation that says what was said, but in the recordings `changed` one word less."""

    def recognise(samples):
        return [[f"w{j}" for j in range(9 if int(one[0]) in changed else 10)] for one in samples]

    return recognise


def rows(changed, number=200, two_pass=False, mode="streaming"):
    """{implementation: its row}; changed: implementation -> recordings in which it says something else."""
    comparison = Comparison(
        mode,
        two_pass,
        {name: saying(changed.get(name, ())) for name in ("pytorch", "chunks", "onnx", "int8")},
    )
    found = parity.check_words([comparison], "test-clean", recordings(number))
    return {row["implementation"]: row for row in found}


class TestWords:
    def test_nothing_differs(self):
        found = rows({})
        assert list(found) == ["pytorch", "chunks", "onnx", "int8"]
        for row in found.values():
            assert (row["num_utts"], row["identical"], row["identical_share"]) == (200, 200, 1.0)
            assert (row["wer"], row["wer_difference"], row["passed"]) == (0.0, 0.0, True)
            assert (row["mode"], row["two_pass"], row["test_set"]) == ("streaming", False, "test-clean")

    @pytest.mark.parametrize("name", ["chunks", "onnx"])
    def test_float_may_differ_in_one_of_200_utterances_and_not_in_two(self, name):
        one, two = rows({name: {3}}), rows({name: {3, 70}})
        assert one[name]["passed"] and one[name]["identical_share"] == 0.995
        assert not two[name]["passed"] and two[name]["identical"] == 198
        assert all(row["passed"] for other, row in two.items() if other != name)

    def test_float_may_not_say_other_words_though_it_makes_fewer_errors(self):
        found = rows({"pytorch": {1, 2, 3}})
        assert found["onnx"]["wer_difference"] == pytest.approx(-0.15) and not found["onnx"]["passed"]
        assert found["int8"]["passed"], "int8 is only asked not to be worse"

    def test_int8_may_be_so_much_worse(self):
        # 200 utterances of 10 words: a word is 0.05 %.
        good, bad = rows({"int8": range(6)}), rows({"int8": range(7)})
        assert good["int8"]["passed"] and good["int8"]["wer_difference"] == pytest.approx(0.3)
        assert not bad["int8"]["passed"] and bad["int8"]["wer"] == pytest.approx(0.35)
        assert bad["int8"]["identical"] == 193

    def test_int8_is_measured_against_pytorch_and_not_against_what_was_said(self):
        found = rows({"pytorch": range(50), "int8": range(50), "chunks": range(50), "onnx": range(50)})
        assert found["int8"]["wer"] == pytest.approx(2.5) and all(row["passed"] for row in found.values())

    def test_a_test_set_without_words_cannot_be_scored(self):
        comparison = Comparison("offline", False, {"pytorch": saying(), "onnx": saying(), "int8": saying()})
        with pytest.raises(UserError, match="part quiet has no reference words"):
            parity.check_words([comparison], "quiet", recordings(3, words=0))

    def test_the_log_names_what_differs(self, caplog):
        caplog.set_level("INFO")
        rows({"onnx": {5}}, two_pass=True)
        assert "test-clean, streaming, two passes: cut-5: 'w0 w1" in caplog.text


class TestOddInputs:
    def test_all_have_to_say_the_same(self):
        odd = {"one frame": np.full(160, 1.0), "silence": np.full(160, 2.0)}
        comparison = Comparison(
            "streaming", False, {"pytorch": saying(), "onnx": saying(), "int8": saying({2})}
        )
        first, second = parity.check_odd(comparison, odd)
        assert (first["input"], first["same"]) == ("one frame", True)
        assert (second["input"], second["same"], second["mode"]) == ("silence", False, "streaming")
        assert second["words"]["int8"] == "w0 w1 w2 w3 w4 w5 w6 w7 w8" != second["words"]["onnx"]


def test_int8_may_be_off_on_a_few_inputs_that_it_was_not_chosen_on():
    assert gate({"int8": {203}})["passed"]
    assert "odd, cut-3: pytorch 'w0" in parity.table(gate({"int8": {203}}))
    assert not gate({"int8": {203, 204}})["passed"]
    assert not gate({"onnx": {203}})["passed"]
    assert not gate({"int8": {101}})["passed"]


@pytest.mark.parametrize(
    "off, is_good",
    [
        ({0, 1}, True),
        ({0, 1, 2}, False),
        ({0, 1, 4, 6}, True),
        ({4, 5}, False),
        ({6}, True),
        ({0, 1, 4, 5}, False),
    ],
)
def test_int8_may_not_be_off_on_most_inputs_of_a_kind(off, is_good):
    """Of 40 of other kinds, four clipped ones, two cut and one of silence; all that are off are a tenth."""
    kinds = [*(f"clipped, {i}" for i in range(4)), *(f"cut at 1 s, {i}" for i in range(2)), "silence"]
    odd = {name: np.full(160, float(i)) for i, name in enumerate(kinds)}
    odd.update({f"kind {i}, 0": np.full(160, 100.0 + i) for i in range(40)})
    implementations = {"pytorch": saying(), "onnx": saying(), "int8": saying(off)}
    found = parity.check_odd(Comparison("streaming", False, implementations), odd, 0.9)
    assert all(row["passed"] == (row["same"] or is_good) for row in found)


def test_a_model_that_says_nothing_is_told(caplog):
    """One of scale smoke has learnt next to nothing: that is no failure."""
    mute = {name: lambda samples: [[] for _ in samples] for name in ("pytorch", "onnx", "int8")}
    comparisons = [
        Comparison("streaming", False, mute),
        Comparison("offline", False, {**mute, "pytorch": saying(), "onnx": saying()}),
    ]
    found = parity.check_words(comparisons, "test-clean", recordings(3))
    assert [row["is_mute"] for row in found] == [True, True, True, False, False, True]
    assert [row["passed"] for row in found] == [True, True, True, True, True, False]
    assert "test-clean, streaming: the model says nothing at all" in caplog.text
    assert "offline" not in caplog.text
    lines = parity.table({"tensors": [], "words": found, "odd": [], "passed": False}).splitlines()
    assert [line.split("+0.00")[-1] for line in lines if "streaming" in line] == 3 * ["  no words"]
    assert sum("no words" in line for line in lines) == 4


def gate(changed, odd_changed=(), tensors=(GOOD_TENSOR,)):
    """A gate with recordings 0 to 19 and the odd inputs 100 and 101."""
    implementations = {name: saying({*changed.get(name, ()), *odd_changed}) for name in ("onnx", "int8")}
    comparisons = [
        Comparison("offline", two_pass, {"pytorch": saying(changed.get("pytorch", ())), **implementations})
        for two_pass in (False, True)
    ]
    odd = {"one frame": np.full(160, 100.0), "silence": np.full(160, 101.0)}
    unseen = {f"odd, cut-{i}": np.full(160, 200.0 + i) for i in range(10)}
    speech = {part: lambda: iter(recordings(20)) for part in ("test-clean", "test-other")}
    return parity.check(comparisons, tensors, speech, odd, unseen, ABOUT)


class TestWholeGate:
    def test_passed(self):
        found = gate({})
        assert found["passed"] and found["runtime"].startswith("sherpa-onnx ") and found["commit"] == "abc"
        assert len(found["words"]) == 2 * 2 * 3 and len(found["odd"]) == 2 + 10 and len(found["tensors"]) == 1
        assert json.loads(json.dumps(found)) == found
        text = parity.table(found)
        assert "NOT PASSED" not in text and "the gate is passed" in text and "for 12 of 12" in text

    def test_any_difference_fails_it_and_the_table_says_which(self):
        words = gate({"onnx": {7}})
        assert not words["passed"]
        (line,) = {
            line
            for line in parity.table(words).splitlines()
            if "onnx" in line and "test-other" in line and " 1 " in line[:18]
        }
        assert "19 of 20" in line and line.endswith("NOT PASSED")
        odd = gate({}, odd_changed={101})
        assert not odd["passed"] and "offline, silence: pytorch 'w0" in parity.table(odd)
        off = {**GOOD_TENSOR, "max_difference": 0.5, "starts_at": "encoder.layers.2", "passed": False}
        tensors = gate({}, tensors=(GOOD_TENSOR, off))
        assert not tensors["passed"]
        assert any("encoder.layers.2  NOT PASSED" in line for line in parity.table(tensors).splitlines())
