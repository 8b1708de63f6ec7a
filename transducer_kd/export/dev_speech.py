"""What an int8 candidate loses, measured on speech that is not tested: by how much its WER is worse than
PyTorch's, and which odd inputs it understands differently.

PyTorch's side is computed once and compared with every candidate.
"""

from dataclasses import dataclass
from typing import Dict, List, Mapping, Sequence, Tuple

import numpy as np

from transducer_kd.decode.wer import word_error_rate
from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.implementations import Implementation, TorchModels, Words, of_files, whole
from transducer_kd.export.parity import Recording, blocks


@dataclass(frozen=True)
class Loss:
    """What a precision loses against PyTorch in its worst mode."""

    wer_difference: float  # per cent; below 0: it makes fewer errors
    different: Tuple[str, ...]  # odd inputs, "streaming, silence"


class DevSpeech:
    """Dev recordings and odd inputs, with what PyTorch says to them in each mode of a folder."""

    def __init__(
        self,
        folder: ModelFolder,
        models: TorchModels,
        recordings: Sequence[Recording],
        odd: Mapping[str, np.ndarray],
    ):
        self.recordings, self.odd = recordings, odd
        self._wer: Dict[str, float] = {}
        self._odd_words: Dict[str, List[Words]] = {}
        for mode in folder.modes:
            recognise = whole(folder, models, mode)
            self._wer[mode] = self._word_error_rate(recognise)
            self._odd_words[mode] = [recognise([samples])[0] for samples in odd.values()]

    def loss(self, folder: ModelFolder, precision: str = "int8") -> Loss:
        """What the files of a precision lose, through sherpa-onnx."""
        worse, different = [], []
        for mode, expected in self._odd_words.items():
            recognise = of_files(folder, mode, precision)
            for name, samples, words in zip(self.odd, self.odd.values(), expected):
                if recognise([samples])[0] != words:
                    different.append(f"{mode}, {name}")
            worse.append(self._word_error_rate(recognise) - self._wer[mode])
        return Loss(max(worse), tuple(different))

    def _word_error_rate(self, recognise: Implementation) -> float:
        said = []
        for block in blocks(self.recordings):
            hyps = recognise([one.samples for one in block])
            said += [(one.name, one.words, hyp) for one, hyp in zip(block, hyps)]
        return word_error_rate(said)
