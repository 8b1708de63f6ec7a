"""The gate between the laboratory and the device: all implementations of an exported model have to agree.

First by tensor: what the ONNX files compute against PyTorch. Then by word, over whole test sets, through the
runtime of the device: the float files have to give the hypotheses of PyTorch, the int8 files at most a little
more errors. Last on inputs of odd lengths and loudness, where all have to say the same words.
"""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Sequence

import numpy as np
import sherpa_onnx

from transducer_kd.decode import wer
from transducer_kd.decode.wer import Utterance
from transducer_kd.export.implementations import FILES, REFERENCE, Comparison
from transducer_kd.log import UserError, progress

LEAST_IDENTICAL = 0.995  # of the utterances, for all but int8
MOST_WORSE = 0.3  # per cent WER, for int8
LEAST_SAME_UNSEEN = 0.9  # of the odd inputs that int8 was not chosen on, for int8
MOST_DIFFERENT_OF_KIND = 0.5  # of those of one kind
RUNTIME = f"sherpa-onnx {sherpa_onnx.__version__}"
_BLOCK = 16  # recordings that go through all implementations before the next are read
_SHOWN = 3  # differences that the log tells of each implementation and test set

Row = Dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """An utterance of a test set."""

    name: str
    samples: np.ndarray  # (S,) float32 in [-1, 1], 16 kHz
    words: List[str]  # what was said


Speech = Mapping[str, Callable[[], Iterable[Recording]]]  # of each test set, read anew at each call


def check(
    comparisons: Sequence[Comparison],
    tensors: Sequence[Row],
    speech: Speech,
    odd: Mapping[str, np.ndarray],
    unseen: Mapping[str, np.ndarray],
    about: Mapping[str, str],
) -> Dict[str, Any]:
    """All of gate.json.

    tensors: rows of tensors.check_tensors; speech: the test sets; odd: inputs on which one pass is compared,
    by name, "kind, recording"; unseen: more of them, which int8 was not chosen on: most of these, and half of
    each kind, it has to understand as all others do, who have to agree on every one. about: commit and
    command.
    """
    start = time.monotonic()
    words = [row for test_set in speech for row in check_words(comparisons, test_set, speech[test_set]())]
    one_pass = [one for one in comparisons if not one.two_pass]
    odd_rows = [row for one in one_pass for row in check_odd(one, odd)]
    odd_rows += [row for one in one_pass for row in check_odd(one, unseen, LEAST_SAME_UNSEEN)]
    passed = all(row["passed"] for row in [*tensors, *words, *odd_rows])
    return {
        "passed": passed,
        **about,
        "runtime": RUNTIME,
        "seconds": round(time.monotonic() - start, 1),
        "least_identical": LEAST_IDENTICAL,
        "most_worse": MOST_WORSE,
        "least_same_unseen": LEAST_SAME_UNSEEN,
        "tensors": list(tensors),
        "words": words,
        "odd": odd_rows,
    }


def check_words(
    comparisons: Sequence[Comparison], test_set: str, recordings: Iterable[Recording]
) -> List[Row]:
    """Decode a test set with everything. UserError where it has no words to score."""
    said: List[Dict[str, List[Utterance]]] = [
        {name: [] for name in comparison.implementations} for comparison in comparisons
    ]
    for block in blocks(progress(recordings, desc=f"parity on {test_set}")):
        samples = [recording.samples for recording in block]
        for comparison, utterances in zip(comparisons, said):
            for name, recognise in comparison.implementations.items():
                hyps = recognise(samples)
                utterances[name] += [(r.name, r.words, hyp) for r, hyp in zip(block, hyps)]
    return [
        row
        for comparison, utterances in zip(comparisons, said)
        for row in word_rows(comparison, test_set, utterances)
    ]


def word_rows(comparison: Comparison, test_set: str, said: Mapping[str, List[Utterance]]) -> List[Row]:
    """said: implementation -> its utterances, all in the same order -> a row for each implementation."""
    expected = said[REFERENCE]
    where = f"{test_set}, {comparison.mode}{', two passes' if comparison.two_pass else ''}"
    if not any(hyp for _, _, hyp in expected):
        # A model that has learnt next to nothing, as at scale smoke, is mute and no reason to fail.
        logging.warning("%s: the model says nothing at all, so there are no words to compare", where)
    reports = {name: wer.score(utterances) for name, utterances in said.items()}
    if not reports[REFERENCE].ref_words:
        raise UserError(f"part {test_set} has no reference words to score; leave it out of --test-parts")
    rows = []
    for name, utterances in said.items():
        different = [(theirs, own) for theirs, own in zip(expected, utterances) if theirs != own]
        for theirs, own in different[:_SHOWN]:
            logging.info(
                "%s: %s: %r with %s, %r with %s",
                where, own[0], " ".join(theirs[2]), REFERENCE, " ".join(own[2]), name,
            )  # fmt: skip
        identical = len(utterances) - len(different)
        share = identical / len(utterances)
        worse = reports[name].wer - reports[REFERENCE].wer
        is_good = share >= LEAST_IDENTICAL
        if name == FILES["int8"]:
            is_good = worse <= MOST_WORSE + 1e-9
        rows.append(
            {
                "mode": comparison.mode,
                "implementation": name,
                "two_pass": comparison.two_pass,
                "test_set": test_set,
                "num_utts": len(utterances),
                "is_mute": not any(hyp for _, _, hyp in utterances),
                "identical": identical,
                "identical_share": share,
                "wer": reports[name].wer,
                "wer_low": reports[name].wer_low,
                "wer_high": reports[name].wer_high,
                "wer_difference": worse,
                "passed": is_good,
            }
        )
    return rows


def check_odd(comparison: Comparison, odd: Mapping[str, np.ndarray], least_same: float = 1.0) -> List[Row]:
    """A row for each odd input: what every implementation says to it, and whether that will do.

    least_same: share of the inputs to which int8 has to say what PyTorch says. The others may not all be of
    one kind, since rounding strikes here and there, while a lost frame or a wrong scale is the same in all
    inputs of a kind: half of each may differ, and one where there are no two.
    """
    rows: List[Row] = []
    for name, samples in odd.items():
        words = {
            who: " ".join(recognise([samples])[0]) for who, recognise in comparison.implementations.items()
        }
        is_same = len(set(words.values())) == 1
        rows.append({"mode": comparison.mode, "input": name, "words": words, "same": is_same})
    int8 = FILES["int8"]
    all_of = Counter(_kind(row) for row in rows)
    different = Counter(_kind(row) for row in rows if row["words"][int8] != row["words"][REFERENCE])
    is_int8_good = len(rows) - sum(different.values()) >= least_same * len(rows) and all(
        num <= max(1, MOST_DIFFERENT_OF_KIND * all_of[kind]) for kind, num in different.items()
    )
    for row in rows:
        others = {words for who, words in row["words"].items() if who != int8}
        row["passed"] = row["same"] or (len(others) == 1 and is_int8_good)
    return rows


def _kind(row: Row) -> str:
    """What was done to the recording: "cut at 1 s, dev-7" -> "cut at 1 s"."""
    return row["input"].split(", ")[0]


def table(gate: Mapping[str, Any]) -> str:
    """What a gate found, for the terminal; a line of every row, of odd inputs only where words differ."""
    lines = [
        f"{'file':26} {'output':16} {'difference':>11} {'limit':>8}  starts at",
        *(_tensor_line(row) for row in gate["tensors"]),
        "",
        f"{'mode':9} {'passes':6} {'implementation':14} {'test set':14} {'identical':>16} {'WER %':>7} "
        f"{'95% interval':>16} {'worse by':>8}",
        *(_word_line(row) for row in gate["words"]),
        "",
    ]
    different = [row for row in gate["odd"] if not row["same"]]
    same = len(gate["odd"]) - len(different)
    lines.append(f"odd inputs: the same words in all implementations for {same} of {len(gate['odd'])}")
    for row in different:
        said = ", ".join(f"{name} {words!r}" for name, words in row["words"].items())
        lines.append(f"  {row['mode']}, {row['input']}: {said}{_verdict(row)}")
    lines.append(f"the gate is {'passed' if gate['passed'] else 'NOT PASSED'}")
    return "\n".join(lines)


def _tensor_line(row: Row) -> str:
    limit = "-" if row["limit"] is None else f"{row['limit']:.0e}"
    difference = "other shape" if row["max_difference"] is None else f"{row['max_difference']:.1e}"
    line = f"{row['part']:26} {row['output']:16} {difference:>11} {limit:>8}  "
    return line + (row["starts_at"] or "-") + _verdict(row)


def _word_line(row: Row) -> str:
    interval = f"{row['wer_low']:.2f} to {row['wer_high']:.2f}"
    identical = f"{row['identical']} of {row['num_utts']}"
    return (
        f"{row['mode']:9} {2 if row['two_pass'] else 1:<6} {row['implementation']:14} {row['test_set']:14} "
        f"{identical:>16} {row['wer']:7.2f} {interval:>16} {row['wer_difference']:+8.2f}"
        f"{'  no words' if row['is_mute'] else ''}{_verdict(row)}"
    )


def _verdict(row: Row) -> str:
    return "" if row["passed"] else "  NOT PASSED"


def blocks(recordings: Iterable[Recording]) -> Iterator[List[Recording]]:
    iterator = iter(recordings)
    while True:
        block = list(islice(iterator, _BLOCK))
        if not block:
            return
        yield block
