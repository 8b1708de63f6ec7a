"""Pairs of utterances for training: what goes on after an utterance is over.

A model that has learnt single utterances takes their end for the end of the audio: in a stream that goes on
it hardly recognises the next one. So some batches have their utterances joined in pairs, a pause between.

T feature frames, C mel bins.
"""

import random
from typing import List, Sequence

import numpy as np

from transducer_kd.data.batch import FRAME_SHIFT_S
from transducer_kd.data.features import FeatureExtractor
from transducer_kd.data.silence import silence

_PAUSE_S = (0.0, 2.0)


class PairJoiner:
    """Joins the utterances of a share `prob` of the batches in pairs; `rng` alone decides which batches, and
    how long the pauses are.

    longest_s: what no pair may exceed: a batch whose longest would stays as it is.
    """

    def __init__(self, prob: float, extractor: FeatureExtractor, longest_s: float):
        self.prob, self.extractor, self.longest_s = prob, extractor, longest_s

    def is_due(self, features: Sequence[np.ndarray], rng: random.Random) -> bool:
        """Whether a batch of utterances (T,C) is joined."""
        longest_s = FRAME_SHIFT_S * sum(sorted(map(len, features))[-2:]) + _PAUSE_S[1]
        return rng.random() < self.prob and len(features) > 1 and longest_s <= self.longest_s

    def __call__(self, features: Sequence[np.ndarray], rng: random.Random) -> List[np.ndarray]:
        """(T,C) of each utterance of a batch -> (T,C) of each pair, as `in_pairs` has them."""
        found = []
        for i in range(0, len(features) - 1, 2):
            pause = self.extractor.extract(silence(rng.uniform(*_PAUSE_S), rng))
            found.append(np.concatenate([features[i], pause, features[i + 1]]))
        return [*found, *features[2 * len(found) :]]


def in_pairs(texts: Sequence[str], between: str) -> List[str]:
    """First and second, third and fourth, ..., joined; one that is left alone stays so, at the end."""
    return [between.join(texts[i : i + 2]) for i in range(0, len(texts), 2)]
