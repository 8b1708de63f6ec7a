"""The second pass: n-best lists of the first pass scored by the LAS, and the weights of the two scores.

A hypothesis is worth (1 - mu) first + mu second + length_weight U: `first` is its log-probability in the
first pass, `second` that in the LAS with the closing <sos/eos>. mu joins the two as in two-pass end-to-end
recognition (arXiv:1908.10992); the length term makes up for the LAS's taste for short hypotheses. Both are
tuned on a dev part, kept in <exp_dir>/rescore.json, and used for the test parts.

Shapes: N utterances, T' encoder frames, B hypotheses of an utterance (at most), U tokens of a hypothesis.
"""

import dataclasses
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch

from transducer_kd.decode.greedy import Hypothesis
from transducer_kd.decode.wer import word_errors
from transducer_kd.log import UserError, write_json

_MUS = np.linspace(0, 1, 21).round(2)
_LENGTH_WEIGHTS = np.linspace(-1, 3, 41).round(1)  # nats per token


@dataclass(frozen=True)
class Weights:
    """How first and second score join."""

    mu: float
    length_weight: float
    tuned_on: Optional[str] = None  # dev part; None: given by hand


@dataclass(frozen=True)
class Tuning:
    """What tuning on a dev part found. Rates are per cent, over the same n-best lists."""

    mu: float
    length_weight: float
    part: str
    method: str  # *_las_rescore
    checkpoint: str  # which weights of the phase, as in Record
    settings: Dict[str, Any]  # of the first pass and its n-best lists
    num_utts: int
    wer_before: float  # of the first pass
    wer_after: float
    wer_oracle: float  # of the best hypotheses in the lists

    def weights(self) -> Weights:
        return Weights(self.mu, self.length_weight, self.part)

    def line(self) -> str:
        """For the log."""
        return (
            f"{self.method}: mu {self.mu:g} and length_weight {self.length_weight:g}, tuned on {self.part} "
            f"({self.num_utts} utterances): WER {self.wer_before:.2f}% -> {self.wer_after:.2f}%, "
            f"the best in the n-best lists {self.wer_oracle:.2f}%"
        )


@dataclass
class ScoredNbest:
    """The n-best list of an utterance after the second pass, best of the first pass first, never empty."""

    hyps: List[Hypothesis]  # with their first-pass scores
    second: List[float]  # their second-pass scores

    def table(self) -> np.ndarray:
        """(3, hypotheses): first score, second score, number of tokens."""
        first, lens = [h.score for h in self.hyps], [len(h.tokens) for h in self.hyps]
        return np.array([first, self.second, lens], dtype=np.float64)

    def best(self, weights: Weights) -> Hypothesis:
        """The hypothesis with the highest score; of equals the first pass's favourite."""
        return self.hyps[int(_joined(self.table(), weights.mu, weights.length_weight).argmax())]


@torch.inference_mode()
def score_nbests(
    las: Any,
    encoder_out: torch.Tensor,
    encoder_out_lens: torch.Tensor,
    nbests: Sequence[List[Hypothesis]],
    limit: int = 0,
) -> List[ScoredNbest]:
    """Score the n-best lists of a batch in one call of the LAS.

    encoder_out (N,T',encoder_dim), encoder_out_lens (N,); nbests: one list per utterance, best first; limit:
    only the first so many hypotheses of each, 0 for all. Predictions after prefixes that hypotheses share are
    made once; tools/bench_rescore.py measures what that saves.
    """
    kept = [nbest[: limit or None] for nbest in nbests]
    scores = las.score(encoder_out, encoder_out_lens, [[h.tokens for h in nbest] for nbest in kept])
    return [ScoredNbest(nbest, second.tolist()) for nbest, second in zip(kept, scores)]


def tune(
    scored: Iterable[Tuple[ScoredNbest, List[str]]],
    to_words: Callable[[List[int]], List[str]],
    *,
    part: str,
    method: str,
    checkpoint: str,
    settings: Dict[str, Any],
) -> Tuning:
    """Search the grid mu 0 to 1, length_weight -1 to 3 for the fewest word errors on a dev part.

    scored: the part's n-best lists with their reference words. to_words: token ids -> words, as hypotheses
    will be scored. The others: see Tuning. Raises UserError for a part without reference words. Warns where
    the best length weight is the first or last of the grid.

    Many settings often make equally few errors. Of these the length weight nearest to 0 is taken, so that a
    term that is no probability is only used where it pays, and among those the middle one of the mus: it
    moves least when the edges of the range, which hang on single utterances, do.
    """
    tables, errors, ref_words = [], [], 0
    for nbest, ref in scored:
        tables.append(nbest.table())
        hyps = [to_words(h.tokens) for h in nbest.hyps]
        errors.append(np.array([[word_errors(ref, hyp) for hyp in hyps]]))
        ref_words += len(ref)
    if not ref_words:
        raise UserError(f"{part} has no reference words to tune on; name another --tune-part")
    table, error = _padded(tables), _padded(errors)[0]  # (3,N,B), (N,B)
    # Word errors of the part with each (length_weight, mu).
    found = {
        (float(length_weight), float(mu)): _errors_of_choice(_joined(table, mu, length_weight), error)
        for length_weight in _LENGTH_WEIGHTS
        for mu in _MUS
    }
    fewest = min(found.values())
    tied = [setting for setting, count in found.items() if count == fewest]
    length_weight = min((weight for weight, _ in tied), key=lambda weight: (abs(weight), -weight))
    mus = [mu for weight, mu in tied if weight == length_weight]
    if length_weight in (_LENGTH_WEIGHTS[0], _LENGTH_WEIGHTS[-1]):
        logging.warning(
            "%s: the length_weight tuned on %s, %g, is at the edge of what was tried, %g to %g: a value "
            "beyond may be better (--las-mu, --las-length-weight), or the hypotheses are badly scored",
            method,
            part,
            length_weight,
            *_LENGTH_WEIGHTS[[0, -1]],
        )
    return Tuning(
        mu=mus[(len(mus) - 1) // 2],
        length_weight=length_weight,
        part=part,
        method=method,
        checkpoint=checkpoint,
        settings=settings,
        num_utts=len(tables),
        wer_before=100.0 * int(error[:, 0].sum()) / ref_words,
        wer_after=100.0 * fewest / ref_words,
        wer_oracle=100.0 * int(error.min(axis=1).sum()) / ref_words,
    )


def _joined(table: np.ndarray, mu: float, length_weight: float) -> np.ndarray:
    """(3, ...) first score, second score, length -> (...) the score that decides."""
    first, second, lens = table
    return (1.0 - mu) * first + mu * second + length_weight * lens


def _errors_of_choice(scores: np.ndarray, errors: np.ndarray) -> int:
    """(N,B), (N,B) -> word errors of the best-scored hypotheses."""
    return int(np.take_along_axis(errors, scores.argmax(axis=1)[:, None], axis=1).sum())


def _padded(tables: List[np.ndarray]) -> np.ndarray:
    """N arrays (rows, hypotheses) -> (rows, N, B), padded with copies of the first hypothesis: argmax, which
    takes the first of equals, never picks them.
    """
    longest = max(table.shape[1] for table in tables)
    rows = [np.concatenate([t, np.repeat(t[:, :1], longest - t.shape[1], axis=1)], axis=1) for t in tables]
    return np.stack(rows, axis=1)


def save_tunings(path: Path, tunings: Sequence[Tuning]) -> None:
    """Write `path` (rescore.json), atomically: {method: its tuning}. What it held before is gone."""
    write_json(path, {tuning.method: dataclasses.asdict(tuning) for tuning in tunings})


def load_tuning(
    path: Path, method: str, checkpoint: str, settings: Dict[str, Any], test_parts: Sequence[str]
) -> Tuning:
    """What `save_tunings` kept for `method`.

    Raises UserError where the file is damaged or missing, or holds no tuning of the method with these weights
    (`checkpoint`) and the same n-best lists (`settings`), or one on a part that is now to be tested.
    """
    again = "tune first: local/decode.py --tune-part dev (or give --las-mu and --las-length-weight)"
    tunings = _read(path)
    if method not in tunings:
        raise UserError(f"{path} has no weights of the two passes for {method}; {again}")
    tuning = tunings[method]
    for what, found, needed in (
        ("the weights", tuning.checkpoint, checkpoint),
        ("search options", tuning.settings, settings),
    ):
        if found != needed:
            raise UserError(f"{path}: {method} was tuned with {what} {found}, not {needed}; {again}")
    if tuning.part in test_parts:
        raise UserError(
            f"{path}: {method} was tuned on {tuning.part}, which is to be decoded, and nothing may be tuned "
            "on what is tested; leave it out of --test-parts, or tune on a dev part (--tune-part)"
        )
    return tuning


def _read(path: Path) -> Dict[str, Tuning]:
    """Method -> its tuning; none where there is no file. UserError where it is damaged."""
    try:
        tunings = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {method: Tuning(**fields) for method, fields in tunings.items()}
        is_sound = all(0 <= t.mu <= 1 and math.isfinite(t.length_weight) for t in found.values())
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:
        raise UserError(f"{path} is damaged; tune again (local/decode.py --tune-part dev), which replaces it")
    return found
