"""Silence for training: before and after the words, and utterances that have none.

Every utterance of a corpus has words, so a model that knows nothing else takes words for certain: it says one
in a silent room. A device hears silence most of the time. Silence around the words alone does not teach it
otherwise (the model waits for words that have always come); utterances without any do.

S samples, T feature frames, C mel bins.
"""

import random
from typing import List, Sequence, Tuple

import numpy as np

from transducer_kd.data.batch import FRAME_SHIFT_S
from transducer_kd.data.features import SAMPLING_RATE, FeatureExtractor

_DIGITAL_SHARE = 0.3  # of the silences that are zeros throughout; the others are a quiet noise
_LEVEL_DB = (-95.0, -50.0)  # RMS of the noise; 0 is that of samples of 1
_AROUND_S = (0.1, 2.0)  # on each side of the words
_WITHOUT_WORDS_S = (0.3, 4.0)
# What a batch may grow by: a share of what it may hold, because one of many short utterances would become
# three times as large and a GPU run out of memory; or some seconds, which no machine notices.
_GROWTH_SHARE, _LEAST_GROWTH_S = 0.5, 60.0


class SilenceMixer:
    """Gives a share `prob` of the batches silence; `rng` alone decides which, how long and how loud.

    max_duration_s: what a batch holds without it, padding included; with it at most half as much again, or
    60 s more where that is more, unless even the shortest silences are too much.
    """

    def __init__(self, prob: float, extractor: FeatureExtractor, max_duration_s: float):
        self.prob, self.extractor = prob, extractor
        self.most_s = max_duration_s + max(_GROWTH_SHARE * max_duration_s, _LEAST_GROWTH_S)

    def is_due(self, rng: random.Random) -> bool:
        """Whether the batch that `rng` belongs to gets silence."""
        return rng.random() < self.prob

    def __call__(
        self, features: Sequence[np.ndarray], may_grow: Sequence[bool], rng: random.Random
    ) -> List[np.ndarray]:
        """(T,C) of each utterance of a batch, with silence before and after where it may grow, and of one
        more that has no words."""
        # Padding makes every utterance as long as the longest, the one without words included.
        room_s = self.most_s / (len(features) + 1)
        longest_s = FRAME_SHIFT_S * max(map(len, features))
        around_s = _at_most((room_s - longest_s) / 2, _AROUND_S)
        without_s = _at_most(room_s, _WITHOUT_WORDS_S)
        grown = [
            np.concatenate([self._silence(around_s, rng), matrix, self._silence(around_s, rng)])
            if may
            else matrix
            for matrix, may in zip(features, may_grow)
        ]
        return [*grown, self._silence(without_s, rng)]

    def _silence(self, range_s: Tuple[float, float], rng: random.Random) -> np.ndarray:
        """(T,C) of a silence whose length is drawn from `range_s`."""
        return self.extractor.extract(silence(rng.uniform(*range_s), rng))


def _at_most(limit: float, range_s: Tuple[float, float]) -> Tuple[float, float]:
    """range_s ending at the limit, where that is not below its beginning."""
    shortest, longest = range_s
    return shortest, max(shortest, min(longest, limit))


def silence(duration_s: float, rng: random.Random) -> np.ndarray:
    """Samples (S,) float32 of whole frames: zeros, or noise between white and dull, at a level that is heard
    as silence."""
    num_samples = max(1, round(duration_s / FRAME_SHIFT_S)) * round(SAMPLING_RATE * FRAME_SHIFT_S)
    if rng.random() < _DIGITAL_SHARE:
        return np.zeros(num_samples, dtype=np.float32)
    from scipy.signal import lfilter  # here: it takes a third of a second, and decoding needs none

    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(num_samples)
    noise = lfilter([1.0], [1.0, -rng.uniform(0.0, 0.95)], noise)  # one pole: how dull it is
    gain = 10.0 ** (rng.uniform(*_LEVEL_DB) / 20.0) / np.sqrt(np.mean(noise**2))
    return (gain * noise).astype(np.float32)
