"""Dev speech: what odd inputs are made of, and what an int8 candidate loses, by how much its WER is worse
than PyTorch's and which odd inputs it understands differently.

S samples, T feature frames, C mel bins.
"""

import logging
from dataclasses import dataclass
from typing import Dict, List, Mapping, Sequence, Set, Tuple

import numpy as np
import torch

from transducer_kd.decode.greedy import greedy_search
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

# Of the encoder's output, as a share of its standard deviation: somewhat more than int8 does.
_DISTURBANCE = 0.1
_DRAWS = 20
MOST_TRIED = 40


def steady_inputs(
    folder: ModelFolder, models: TorchModels, recordings: Sequence[Recording], num: int
) -> Dict[str, np.ndarray]:
    """Odd inputs, `num` of each kind, of speech on which PyTorch does not hesitate: "clipped, cut-7" -> (S,).

    Odd inputs are there to show lost frames and wrong scales. Where PyTorch's own words hang on a tenth of
    the encoder output's standard deviation, they would only show that int8 rounds: a command cut off within a
    word changed in 9 of 20 draws of a fiftieth. For each kind recordings are tried from all over the part
    until enough give a piece that never changes; where too few do there are fewer inputs of that kind, but
    one of each. int8 has no say in it.
    """
    some = [recordings[i * len(recordings) // MOST_TRIED] for i in range(MOST_TRIED)]
    some = list({one.name: one for one in some}.values())
    # Of a phase that only streams both modes are one model.
    modes = {id(models.models[mode]): mode for mode in folder.modes}.values()
    chosen: Dict[str, List[Tuple[str, np.ndarray]]] = {}
    unsteady: Dict[str, Tuple[str, np.ndarray]] = {}
    for one in progress(some, total=len(some), desc="speech for odd inputs"):
        odd = odd_inputs(one.samples, folder.info["chunk_size"])
        wanted = [kind for kind in odd if len(chosen.setdefault(kind, [])) < _num_of(kind, num)]
        if not wanted:
            break
        inputs = [odd[kind] for kind in wanted]
        hesitates = set().union(*(_hesitations(folder, models, mode, inputs) for mode in modes))
        for i, kind in enumerate(wanted):
            if i in hesitates:
                unsteady.setdefault(kind, (one.name, odd[kind]))
            else:
                chosen[kind].append((one.name, odd[kind]))
    for kind, pieces in chosen.items():
        if len(pieces) < _num_of(kind, num):
            logging.info("odd inputs: %d of %s are steady, of %d recordings", len(pieces), kind, len(some))
    return {
        kind if kind in WITHOUT_SPEECH else f"{kind}, {name}": samples
        for kind, pieces in chosen.items()
        for name, samples in pieces or [unsteady[kind]]
    }


def _num_of(kind: str, num: int) -> int:
    """What has no speech is the same of every recording."""
    return 1 if kind in WITHOUT_SPEECH else num


@torch.inference_mode()
def _hesitations(
    folder: ModelFolder, models: TorchModels, mode: str, inputs: Sequence[np.ndarray]
) -> Set[int]:
    """Those of the inputs, by number, whose words change when noise is added to the encoder's output."""
    model = models.models[mode]
    encoder_out, lens = model.encode(*models.features(folder, inputs))
    expected = models.words(greedy_search(model, encoder_out, lens))
    generator = torch.Generator().manual_seed(0)
    changed: Set[int] = set()
    for _ in range(_DRAWS):
        noise = torch.randn(encoder_out.shape, generator=generator)
        found = models.words(
            greedy_search(model, encoder_out + _DISTURBANCE * encoder_out.std() * noise, lens)
        )
        changed |= {i for i, words in enumerate(found) if words != expected[i]}
    return changed


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
