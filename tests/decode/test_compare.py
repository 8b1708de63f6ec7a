"""Which decodings are compared, that the numbers are wer.compare's, and what is said where they cannot be."""

import pytest

from transducer_kd.decode import wer
from transducer_kd.decode.compare import comparisons, pairs, read_recogs
from transducer_kd.log import UserError

NBEST, RESCORED = "fast_beam_search_nbest", "fast_beam_search_nbest_las_rescore"
BEAM, BEAM_RESCORED = "modified_beam_search", "modified_beam_search_las_rescore"


def phase(name, role, teacher=None, size=1000, control_of=None, compare_with=()):
    made = {"name": name, "role": role, "teacher": teacher, "params_deployed": size, "control_of": control_of}
    return {**made, "compare_with": list(compare_with), "is_stale": False, "is_unlike": False}


TEACHER = phase("teacher", "teacher", size=3000)
TEACHER_LAS = phase("teacher_las", "teacher", size=4000)
STUDENT = phase("student", "distilled", "teacher")
CONTROL = phase("student_control", "control", "teacher", control_of="student")
FINETUNE = phase("finetune", "distilled", "teacher")
NO_KD = phase("finetune_nokd", "control", "teacher", control_of="finetune")


def records(name, methods, test_set="test-clean", mode="offline"):
    return [{"phase": name, "method": m, "test_set": test_set, "mode": mode} for m in methods]


def found(phases, *groups):
    made = pairs(phases, [r for group in groups for r in group])
    return [(kind, a["phase"], a["method"], b["phase"], b["method"]) for kind, a, b in made]


# Pairs


def test_pairs_of_the_whole_recipe():
    phases = [TEACHER, TEACHER_LAS, STUDENT, CONTROL, FINETUNE]
    first, both = ["greedy_search", "fast_beam_search", NBEST], ["greedy_search", NBEST, RESCORED]
    groups = [records(p["name"], both if p in (TEACHER_LAS, FINETUNE) else first) for p in phases]
    assert found(phases, *groups) == [
        ("teacher", "teacher", NBEST, "student", NBEST),
        ("teacher", "teacher", "greedy_search", "student", "greedy_search"),
        ("teacher", "teacher", NBEST, "student_control", NBEST),
        ("teacher", "teacher", "greedy_search", "student_control", "greedy_search"),
        # Its own teacher has no LAS: the rescored lists are compared with the largest teacher's.
        ("teacher", "teacher_las", RESCORED, "finetune", RESCORED),
        ("teacher", "teacher", NBEST, "finetune", NBEST),
        ("teacher", "teacher", "greedy_search", "finetune", "greedy_search"),
        ("control", "student_control", NBEST, "student", NBEST),
        ("control", "student_control", "greedy_search", "student", "greedy_search"),
        ("first pass", "teacher_las", NBEST, "teacher_las", RESCORED),
        ("first pass", "finetune", NBEST, "finetune", RESCORED),
    ]


def test_without_k2_the_beam_is_compared_and_what_both_have():
    without = records("teacher_las", ["greedy_search", BEAM, BEAM_RESCORED])
    student = records("student", ["greedy_search", BEAM, NBEST, RESCORED, BEAM_RESCORED])
    assert found([TEACHER_LAS, {**STUDENT, "teacher": None}], without, student) == [
        ("teacher", "teacher_las", BEAM_RESCORED, "student", BEAM_RESCORED),
        ("teacher", "teacher_las", BEAM, "student", BEAM),
        ("teacher", "teacher_las", "greedy_search", "student", "greedy_search"),
        ("first pass", "teacher_las", BEAM, "teacher_las", BEAM_RESCORED),
        ("first pass", "student", NBEST, "student", RESCORED),
        ("first pass", "student", BEAM, "student", BEAM_RESCORED),
    ]


def test_only_the_same_mode_and_test_set_are_compared():
    teacher = records("teacher", ["greedy_search"]) + records("teacher", ["greedy_search"], "test-other")
    student = records("student", ["greedy_search"], mode="streaming") + records("student", ["greedy_search"])
    made = pairs([TEACHER, STUDENT], teacher + student)
    assert [(a["mode"], a["test_set"], b["mode"], b["test_set"]) for _, a, b in made] == [
        ("offline", "test-clean", "offline", "test-clean")
    ]


def test_modes_differ_only_where_the_two_have_none_in_common():
    """An offline teacher of a streaming student; a named phase that was decoded in both modes, and one that
    was decoded in another one on one test set alone."""
    student = phase("student", "distilled", "teacher", compare_with=["both", "elsewhere"])
    phases = [TEACHER, phase("both", "control"), phase("elsewhere", "control"), student]
    decoded = records("teacher", ["greedy_search", NBEST]) + records("student", [NBEST], mode="streaming")
    decoded += records("both", [NBEST]) + records("both", [NBEST], mode="streaming")
    decoded += records("elsewhere", [NBEST], "test-other") + records("elsewhere", ["beam"])
    made = [
        (kind, a["phase"], a["mode"], b["mode"])
        for kind, a, b in pairs(phases, decoded)
        if b["phase"] == "student"
    ]
    assert made == [
        ("teacher", "teacher", "offline", "streaming"),
        ("named", "both", "streaming", "streaming"),
    ]


def test_phases_of_two_modes_are_compared_mode_by_mode():
    """Also where one of the modes was decoded on one test set alone: nothing is compared across modes."""
    net = phase("net", "", compare_with=["full", "stream", "both"])
    phases = [phase("full", "control"), phase("stream", "control"), phase("both", "control"), net]
    of_both = [(name, mode) for name in ("both", "net") for mode in ("offline", "streaming")]
    decoded = [r for name, mode in of_both for r in records(name, [BEAM], mode=mode)]
    decoded += records("full", [BEAM]) + records("full", [BEAM], "test-other")
    decoded += records("stream", [BEAM], mode="streaming") + records("net", [BEAM], "test-other", "streaming")
    made = pairs(phases, decoded)
    assert {(kind, a["phase"], a["mode"], b["mode"], b["test_set"]) for kind, a, b in made} == {
        ("named", "full", "offline", "offline", "test-clean"),
        ("named", "stream", "streaming", "streaming", "test-clean"),
        ("named", "both", "offline", "offline", "test-clean"),
        ("named", "both", "streaming", "streaming", "test-clean"),
    }
    assert len(made) == 4


def test_named_phases_are_compared_once_and_only_those_that_are_there_and_not_stale():
    step3 = phase(
        "step3", "distilled", "teacher", compare_with=["scratch", "teacher", "gone", "old", "step3"]
    )
    step3_control = phase("step3_control", "control", "teacher", control_of="step3")
    step3["compare_with"].append("step3_control")
    old = {**phase("old", "distilled"), "is_stale": True}
    scratch = phase("scratch", "control")
    phases = [TEACHER, step3, step3_control, scratch, old]
    made = found(phases, *(records(p["name"], ["greedy_search", BEAM]) for p in phases))
    methods = (BEAM, "greedy_search")
    assert [pair[:2] + pair[3:4] for pair in made if pair[2] == BEAM] == [
        ("teacher", "teacher", "step3"),
        ("teacher", "teacher", "step3_control"),
        ("teacher", "teacher", "scratch"),
        ("control", "step3_control", "step3"),
        ("named", "scratch", "step3"),
    ]
    assert [pair[2] for pair in made if pair[0] == "named"] == list(methods)


def test_phases_without_a_role_or_a_partner_are_not_compared():
    phases = [phase("a", ""), phase("b", ""), phase("lonely_control", "control", control_of="lonely")]
    assert found(phases, *(records(p["name"], ["greedy_search"]) for p in phases)) == []


def test_every_control_of_a_phase_is_compared_with_it():
    phases = [FINETUNE, phase("finetune_control", "control", control_of="finetune"), NO_KD]
    groups = [records(p["name"], [NBEST, RESCORED]) for p in phases]
    assert [pair[1:] for pair in found(phases, *groups) if pair[0] == "control"] == [
        (name, method, "finetune", method)
        for name in ("finetune_control", "finetune_nokd")
        for method in (RESCORED, NBEST)
    ]


def test_stale_phases_are_in_no_pair_and_unlike_controls_only_with_the_teacher():
    phases = [TEACHER, TEACHER_LAS, STUDENT, CONTROL, FINETUNE, NO_KD]
    groups = [records(p["name"], [NBEST, RESCORED]) for p in phases]
    stale = [{**p, "is_stale": p in (TEACHER, FINETUNE)} for p in phases]
    assert {(kind, a, b) for kind, a, _, b, _ in found(stale, *groups)} == {
        ("teacher", "teacher_las", "student"),
        ("teacher", "teacher_las", "student_control"),
        ("teacher", "teacher_las", "finetune_nokd"),
        ("control", "student_control", "student"),
        *(("first pass", p["name"], p["name"]) for p in (TEACHER_LAS, STUDENT, CONTROL, NO_KD)),
    }
    unlike = [{**p, "is_unlike": p is CONTROL} for p in phases]
    of_control = {pair[:2] + pair[3:4] for pair in found(unlike, *groups) if "student_control" in pair}
    assert of_control == {
        ("teacher", "teacher", "student_control"),
        ("first pass", "student_control", "student_control"),
    }


# Numbers


def utterances(wrong, count=40, prefix="cut"):
    """Ten words each; in utterance i the first wrong(i) are not what was said."""
    ref = [f"w{j}" for j in range(10)]
    return [(f"{prefix}-{i:03d}", ref, ["x"] * wrong(i) + ref[wrong(i) :]) for i in range(count)]


@pytest.fixture
def exp(tmp_path):
    """(folder, decode(phase, method, utterances) -> record) as local/decode.py leaves it."""

    def decode(name, method, decoded, test_set="test-clean"):
        report = wer.write_results(tmp_path / name / method, test_set, "epoch-1", decoded, method)
        made = records(name, [method], test_set)[0]
        return {**made, "wer": report.wer, "recogs": f"{method}/recogs-{test_set}-epoch-1.txt"}

    return tmp_path, decode


def test_numbers_are_those_of_the_paired_bootstrap(exp):
    folder, decode = exp
    a, b = utterances(lambda i: i % 3), utterances(lambda i: 1 + i % 3 if i % 5 else 0)
    made, missing = comparisons(
        folder,
        [TEACHER, STUDENT],
        # The order of utterances in memory does not matter.
        [decode("teacher", "greedy_search", a[::-1]), decode("student", "greedy_search", b)],
    )
    expected = wer.compare(a, b)
    assert missing == [] and len(made) == 1
    assert made[0] == {
        "kind": "teacher", "test_set": "test-clean", "mode_a": "offline", "mode_b": "offline",
        "phase_a": "teacher", "method_a": "greedy_search", "wer_a": pytest.approx(100 * 39 / 400),
        "phase_b": "student", "method_b": "greedy_search", "wer_b": pytest.approx(100 * 63 / 400),
        "difference": pytest.approx(100 * 24 / 400), "relative": pytest.approx(100 * 24 / 39),
        "low": expected.low, "high": expected.high, "p_value": expected.p_value,
    }  # fmt: skip


def test_relative_to_no_errors_is_none(exp):
    folder, decode = exp
    a, b = utterances(lambda i: 0), utterances(lambda i: 1)
    made, _ = comparisons(
        folder,
        [TEACHER, STUDENT],
        [decode("teacher", "greedy_search", a), decode("student", "greedy_search", b)],
    )
    assert made[0]["relative"] is None and made[0]["difference"] == 10.0


def test_recogs_are_read_as_written(tmp_path):
    odd = [("a:b\tc", ["it's", 'say "x"', "ü"], []), ("z", ["one"], ["on", "e"])]
    wer.write_results(tmp_path, "test", "s", odd, "greedy_search")
    assert read_recogs(tmp_path / "recogs-test-s.txt") == odd


# What is missing


def test_what_cannot_be_compared_is_named_once_and_the_rest_compared(exp):
    folder, decode = exp
    good = utterances(lambda i: i % 2)
    phases = [TEACHER, STUDENT, CONTROL, FINETUNE]
    old = {**decode("student_control", "greedy_search", good), "recogs": None}
    gone = decode("finetune", "greedy_search", good)
    (folder / "finetune" / gone["recogs"]).unlink()
    kept = [decode(name, "greedy_search", good) for name in ("teacher", "student")]
    made, missing = comparisons(folder, phases, [*kept, old, gone])
    assert [(c["kind"], c["phase_b"]) for c in made] == [("teacher", "student")]
    # The control would have been compared twice.
    assert missing == [
        "paired comparisons: the records of phase student_control name no recogs file; decode it again",
        f"paired comparisons: finetune/{gone['recogs']} does not exist; decode again",
    ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda good: utterances(lambda i: i % 2, prefix="other"), "same utterances"),
        (lambda good: good[:-2], "same utterances"),
        # The same rates and cuts, but each cut has another one's words.
        (
            lambda good: [
                (c, ["other", *r[1:]], h if h[0] == "x" else ["other", *h[1:]]) for c, r, h in good
            ],
            "same references",
        ),
    ],
)
def test_decodings_of_other_utterances_are_not_compared(exp, change, told):
    folder, decode = exp
    good = utterances(lambda i: i % 2)
    made, missing = comparisons(
        folder,
        [TEACHER, STUDENT],
        [decode("teacher", "greedy_search", good), decode("student", "greedy_search", change(good))],
    )
    assert made == [] and len(missing) == 1
    assert (
        told in missing[0] and "teacher greedy_search and student greedy_search on test-clean" in missing[0]
    )


def test_swapped_cut_ids_and_later_files_are_noticed(exp):
    folder, decode = exp
    good = [(f"c{i}", [f"w{i}", "b"], [f"w{i}", "x"]) for i in range(4)]
    swapped = [(f"c{3 - i}", *words) for i, (_, *words) in enumerate(good)]
    teacher = decode("teacher", "greedy_search", good)
    _, missing = comparisons(
        folder, [TEACHER, STUDENT], [teacher, decode("student", "greedy_search", swapped)]
    )
    assert "same references" in missing[0]
    student = decode("student", "greedy_search", good)
    made, missing = comparisons(folder, [TEACHER, STUDENT], [teacher, {**student, "wer": 49.0}])
    assert made == []
    assert missing == [
        f"paired comparisons: student/{student['recogs']} is not what its record was made from; decode again"
    ]


@pytest.mark.parametrize(
    "text", ["a:\tref=['x']\nb:\thyp=['x']\n", "nothing\nof this\n", "a:\tref=[\na:\thyp=[]\n"]
)
def test_damaged_recogs_are_named(tmp_path, text):
    path = tmp_path / "recogs.txt"
    path.write_text("ok:\tref=['x']\nok:\thyp=[]\n" + text)
    with pytest.raises(UserError, match=r"recogs\.txt: after 1 utterances"):
        read_recogs(path)
