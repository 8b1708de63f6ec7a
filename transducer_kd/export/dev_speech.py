"""Dev speech: what odd inputs are made of, and what an int8 candidate loses, by how much its WER is worse
than PyTorch's and which odd inputs it understands differently.

S samples, T feature frames, C mel bins.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from transducer_kd.decode.wer import word_error_rate
from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.implementations import (
    Implementation,
    TorchModels,
    Words,
    of_files,
    two_pass_of_files,
    whole,
    whole_two_pass,
)
from transducer_kd.export.odd_inputs import WITHOUT_SPEECH, odd_inputs
from transducer_kd.export.parity import Recording, blocks
from transducer_kd.export.quantise import MOST_WORSE
from transducer_kd.log import progress

_DISTURBANCE = 0.4  # of log-mel energies, standard deviation: 2 dB
_DRAWS = 3
MOST_TRIED = 40


def steady_recordings(
    folder: ModelFolder, models: TorchModels, recordings: Sequence[Recording], num: int
) -> List[Recording]:
    """`num` of the recordings to make odd inputs of: those on which PyTorch does not hesitate.

    Odd inputs are there to show lost frames and wrong scales. A piece of speech whose words change when the
    features are off by 2 dB would only show that int8 rounds: of 17 pieces that int8 files understood
    differently 16 were such, of 216 others 46. Recordings are tried from all over the part until enough
    have no such piece, or else those with the fewest are taken. int8 has no say in it.
    """
    some = [recordings[i * len(recordings) // MOST_TRIED] for i in range(MOST_TRIED)]
    some = list({one.name: one for one in some}.values())
    # Of a phase that only streams both modes are one model.
    modes = {id(models.models[mode]): mode for mode in folder.modes}.values()
    steady: List[Recording] = []
    others: List[Tuple[int, int]] = []
    for number, one in enumerate(progress(some, desc="speech for odd inputs")):
        odd = odd_inputs(one.samples, folder.info["chunk_size"])
        inputs = [samples for name, samples in odd.items() if name not in WITHOUT_SPEECH]
        hesitations = sum(_hesitations(folder, models, mode, inputs) for mode in modes)
        if not hesitations:
            steady.append(one)
        else:
            others.append((hesitations, number))
        if len(steady) == num:
            break
    found = [*steady, *(some[number] for _, number in sorted(others))][:num]
    logging.info("odd inputs are made of %s", ", ".join(one.name for one in found))
    return found


def _hesitations(folder: ModelFolder, models: TorchModels, mode: str, inputs: Sequence[np.ndarray]) -> int:
    """Of how many inputs the words change with disturbed features."""
    expected = whole(folder, models, mode)(inputs)
    changed = set()
    for draw in range(_DRAWS):
        disturbed = dataclasses.replace(models, extract=_disturbed(models.extract, draw))
        found = whole(folder, disturbed, mode)(inputs)
        changed |= {i for i, words in enumerate(found) if words != expected[i]}
    return len(changed)


def _disturbed(extract: Callable[[np.ndarray], np.ndarray], seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """`extract`, samples (S,) -> (T,C), with noise on the features."""
    rng = np.random.default_rng(seed)

    def disturbed(samples: np.ndarray) -> np.ndarray:
        features = extract(samples)
        return features + _DISTURBANCE * rng.standard_normal(features.shape, dtype=np.float32)

    return disturbed


@dataclass(frozen=True)
class Loss:
    """What a precision loses against PyTorch."""

    wer_difference: float  # per cent, where it is worst; below 0: it makes fewer errors
    different: Tuple[str, ...]  # odd inputs that one pass understands differently, "streaming, silence"


class DevSpeech:
    """Dev recordings and odd inputs, with what PyTorch says to them: one pass in each mode of a folder, and
    two passes in the first of them.
    """

    def __init__(
        self,
        folder: ModelFolder,
        models: TorchModels,
        recordings: Sequence[Recording],
        odd: Mapping[str, np.ndarray],
    ):
        self.recordings, self.odd = recordings, odd
        self._two_pass_mode = folder.modes[0] if folder.has_las else None
        self._wer: Dict[str, float] = {}
        self._odd_words: Dict[str, List[Words]] = {}
        for mode in folder.modes:
            recognise = whole(folder, models, mode)
            self._wer[mode] = self._word_error_rate(recognise)
            self._odd_words[mode] = self._to_odd(recognise)
        if self._two_pass_mode:
            recognise = whole_two_pass(folder, models, self._two_pass_mode)
            self._two_pass_wer = self._word_error_rate(recognise)

    def loss(self, folder: ModelFolder, only: Sequence[str] = (), precision: str = "int8") -> Loss:
        """What the files of a precision lose, through the runtime. Two passes take longer than all else: they
        are only measured where one pass is good enough.

        only: names as in Loss.different, of the odd inputs to try, without a WER; nothing: everything.
        """
        worse, different = [], []
        for mode, expected in self._odd_words.items():
            recognise = of_files(folder, mode, precision)
            for (name, samples), wanted in zip(self.odd.items(), expected):
                name = f"{mode}, {name}"
                if (not only or name in only) and recognise([samples])[0] != wanted:
                    different.append(name)
            if not only:
                worse.append(self._word_error_rate(recognise) - self._wer[mode])
        if only:
            return Loss(0.0, tuple(different))
        if self._two_pass_mode and not different and max(worse) <= MOST_WORSE:
            recognise = two_pass_of_files(folder, self._two_pass_mode, precision)
            worse.append(self._word_error_rate(recognise) - self._two_pass_wer)
        return Loss(max(worse), tuple(different))

    def _to_odd(self, recognise: Implementation) -> List[Words]:
        return [recognise([samples])[0] for samples in self.odd.values()]

    def _word_error_rate(self, recognise: Implementation) -> float:
        said = []
        for block in blocks(self.recordings):
            hyps = recognise([one.samples for one in block])
            said += [(one.name, one.words, hyp) for one, hyp in zip(block, hyps)]
        return word_error_rate(said)
