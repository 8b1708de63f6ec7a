"""Word error rates through kaldialign, with intervals, and the files that icefall's users know.

An utterance is (cut_id, reference words, hypothesis words). Rates are in per cent.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, List, Sequence, TextIO, Tuple

import kaldialign
import numpy as np

from transducer_kd.log import atomic_write

Utterance = Tuple[str, List[str], List[str]]
Pair = Tuple[str, str]  # aligned reference and hypothesis word; _NONE where there is none

_NONE = ""  # no word is empty
_RESAMPLES = 10000
_SEED = 0


@dataclass
class WerReport:
    """Errors of one system on one test set."""

    insertions: int
    deletions: int
    substitutions: int
    ref_words: int
    wer_low: float  # 95% bootstrap interval, per cent
    wer_high: float

    @property
    def errors(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    @property
    def wer(self) -> float:
        """Per cent; of no reference words, 0 without errors and infinite with some."""
        return _per_cent(self.errors, self.ref_words)

    def line(self) -> str:
        """icefall's log line, and the interval."""
        return (
            f"%WER {self.wer:.2f}% [{self.errors} / {self.ref_words}, {self.insertions} ins, "
            f"{self.deletions} del, {self.substitutions} sub ] "
            f"95% interval {self.wer_low:.2f} to {self.wer_high:.2f}"
        )


@dataclass
class PairedComparison:
    """System B against system A on the same utterances."""

    difference: float  # WER of B minus WER of A, per cent
    low: float  # its 95% bootstrap interval
    high: float
    p_value: float  # two-sided, that there is no difference


def word_error_rate(utterances: Iterable[Utterance]) -> float:
    """Per cent, nothing else: cheap enough for validation during training."""
    utterances = list(utterances)
    total = kaldialign.batch_error_rate([u[1] for u in utterances], [u[2] for u in utterances])
    return _per_cent(total["total"], total["ref_len"])


def score(utterances: Sequence[Utterance]) -> WerReport:
    """Count errors and bootstrap the WER over utterances (kaldialign's, by Bisani and Ney, ICASSP 2004)."""
    alignments = [_align(ref, hyp) for _, ref, hyp in utterances]
    kinds = Counter(_kind(pair) for pairs in alignments for pair in pairs)
    ref_words = sum(len(ref) for _, ref, _ in utterances)
    low = high = _per_cent(kinds["ins"], 0)
    if ref_words:
        refs, hyps = [u[1] for u in utterances], [u[2] for u in utterances]
        interval = kaldialign.bootstrap_wer_ci(refs, hyps, replications=_RESAMPLES, seed=_SEED)
        # It is the mean and 1.96 standard deviations, which may reach below zero.
        low, high = 100 * max(0.0, interval["ci95min"]), 100 * interval["ci95max"]
    return WerReport(kinds["ins"], kinds["del"], kinds["sub"], ref_words, low, high)


def compare(a: Sequence[Utterance], b: Sequence[Utterance], resamples: int = _RESAMPLES) -> PairedComparison:
    """Paired bootstrap over utterances: is B different from A?

    Both systems are scored on the same resampled utterances, so that what is hard for both cancels. The
    p-value is twice the smaller share of resamples on one side of zero.

    Raises ValueError unless both decode the same cuts.
    """
    by_cut = {cut: (ref, hyp) for cut, ref, hyp in b}
    if len(by_cut) != len(b) or sorted(by_cut) != sorted(cut for cut, _, _ in a):
        raise ValueError(
            f"a paired comparison needs the same utterances: {len(a)} and {len(b)} given, some differ"
        )
    more = np.array([word_errors(*by_cut[cut]) - word_errors(ref, hyp) for cut, ref, hyp in a])
    words = np.array([len(ref) for _, ref, _ in a])
    if not words.sum():
        raise ValueError("a paired comparison needs reference words, and there are none")
    rng = np.random.default_rng(_SEED)
    differences = np.concatenate(
        [_resampled_differences(more, words, block, rng) for block in _blocks(resamples, len(words))]
    )
    difference = 100.0 * more.sum() / words.sum()
    low, high = np.percentile(differences, [2.5, 97.5])
    # The observed sample counts as one more resample, so that no p-value is zero.
    smaller = min((differences <= 0).sum(), (differences >= 0).sum())
    p_value = min(1.0, 2.0 * (smaller + 1) / (resamples + 1))
    return PairedComparison(float(difference), float(low), float(high), float(p_value))


def _resampled_differences(
    more: np.ndarray, words: np.ndarray, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """By how many errors B exceeds A, and reference words, per utterance -> (resamples,) per cent."""
    chosen = rng.integers(0, len(words), size=(resamples, len(words)))
    return 100.0 * more[chosen].sum(axis=1) / np.maximum(words[chosen].sum(axis=1), 1)


def _blocks(resamples: int, num_utterances: int) -> List[int]:
    """Split the resamples so that one block's table stays small."""
    size = max(1, 2_000_000 // max(1, num_utterances))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def write_results(
    folder: Path, part: str, suffix: str, utterances: Sequence[Utterance], setting: str
) -> WerReport:
    """Score, and write recogs-, errs- and wer-summary-<part>-<suffix>.txt into `folder` as icefall does.

    setting: names the line in the summary. Each file is written atomically, sorted by cut id.
    """
    utterances = sorted(utterances)
    report = score(utterances)
    with atomic_write(folder / f"recogs-{part}-{suffix}.txt") as f:
        for cut_id, ref, hyp in utterances:
            f.write(f"{cut_id}:\tref={ref}\n{cut_id}:\thyp={hyp}\n")
    with atomic_write(folder / f"errs-{part}-{suffix}.txt") as f:
        write_error_stats(f, utterances, report)
    with atomic_write(folder / f"wer-summary-{part}-{suffix}.txt") as f:
        f.write(f"settings\tWER\n{setting}\t{report.wer:.2f}\n")
    return report


def write_error_stats(f: TextIO, utterances: Sequence[Utterance], report: WerReport) -> None:
    """The `errs-` file: totals, every alignment, and counts by substitution, deletion, insertion and word."""
    alignments = [_align(ref, hyp) for _, ref, hyp in utterances]
    pairs = [pair for alignment in alignments for pair in alignment]
    correct = sum(_kind(pair) == "corr" for pair in pairs)
    f.write(
        f"%WER = {report.wer:.2f}\n"
        f"Errors: {report.insertions} insertions, {report.deletions} deletions, "
        f"{report.substitutions} substitutions, over {report.ref_words} reference words ({correct} correct)\n"
        "Search below for sections starting with PER-UTT DETAILS:, SUBSTITUTIONS:, DELETIONS:, INSERTIONS:, "
        "PER-WORD STATS:\n\n"
        "PER-UTT DETAILS: corr or (ref->hyp)  \n"
    )
    for (cut_id, _, _), alignment in zip(utterances, alignments):
        f.write(f"{cut_id}:\t{' '.join(_spans(alignment))}\n")
    counts = Counter(pairs)
    f.write("\nSUBSTITUTIONS: count ref -> hyp\n")
    for count, (ref, hyp) in _by_count(counts, "sub"):
        f.write(f"{count}   {ref} -> {hyp}\n")
    f.write("\nDELETIONS: count ref\n")
    for count, (ref, _) in _by_count(counts, "del"):
        f.write(f"{count}   {ref}\n")
    f.write("\nINSERTIONS: count hyp\n")
    for count, (_, hyp) in _by_count(counts, "ins"):
        f.write(f"{count}   {hyp}\n")
    f.write("\nPER-WORD STATS: word  corr tot_errs count_in_ref count_in_hyp\n")
    for word, corr, in_ref, in_hyp in _word_stats(counts):
        f.write(f"{word}   {corr} {in_ref + in_hyp - 2 * corr} {in_ref} {in_hyp}\n")


def _align(ref: List[str], hyp: List[str]) -> List[Pair]:
    return kaldialign.align(ref, hyp, _NONE)


def word_errors(ref: List[str], hyp: List[str]) -> int:
    """Insertions, deletions and substitutions of the best alignment."""
    return kaldialign.edit_distance(ref, hyp)["total"]


def _kind(pair: Pair) -> str:
    ref, hyp = pair
    if ref == hyp:
        return "corr"
    return "ins" if ref == _NONE else "del" if hyp == _NONE else "sub"


def _spans(alignment: List[Pair]) -> List[str]:
    """Words that are right, and neighbouring errors together as (ref->hyp), with * for nothing."""
    out: List[str] = []
    wrong: List[Pair] = []
    for pair in alignment + [("", "")]:  # the sentinel counts as right and flushes the last error
        if _kind(pair) != "corr":
            wrong.append(pair)
            continue
        if wrong:
            ref, hyp = (" ".join(words[i] for words in wrong if words[i]) or "*" for i in (0, 1))
            out.append(f"({ref}->{hyp})")
            wrong = []
        out.append(pair[0])
    return out[:-1]


def _by_count(counts: Counter, kind: str) -> List[Tuple[int, Pair]]:
    """Most frequent first."""
    return sorted(((count, pair) for pair, count in counts.items() if _kind(pair) == kind), reverse=True)


def _word_stats(counts: Counter) -> List[Tuple[str, int, int, int]]:
    """(word, correct, in references, in hypotheses), most errors first."""
    correct, in_ref, in_hyp = Counter(), Counter(), Counter()
    for (ref, hyp), count in counts.items():
        in_ref[ref] += count
        in_hyp[hyp] += count
        if ref == hyp:
            correct[ref] += count
    words = (in_ref.keys() | in_hyp.keys()) - {_NONE}
    rows = [(word, correct[word], in_ref[word], in_hyp[word]) for word in words]
    return sorted(rows, key=lambda row: (-(row[2] + row[3] - 2 * row[1]), row[0]))


def _per_cent(errors: int, words: int) -> float:
    if words:
        return 100.0 * errors / words
    return float("inf") if errors else 0.0
