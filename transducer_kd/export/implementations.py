"""The implementations of an exported model that have to agree, each a function from recordings to words.

PyTorch decodes the whole utterance, and a streaming model also chunk by chunk; sherpa-onnx runs the float and
the int8 files. With a second pass, PyTorch's two passes stand beside those over the files. All hear the same
padded samples, so that none of them has a frame that another has not.

S samples in [-1, 1] at 16 kHz, N recordings, T feature frames, C mel bins.
"""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.greedy import Hypothesis, greedy_search
from transducer_kd.decode.rescore import Weights, score_nbests
from transducer_kd.decode.streaming import streaming_greedy_search
from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.sherpa import SherpaOffline, SherpaStreaming, padded
from transducer_kd.export.two_pass import TwoPassRecogniser

Words = List[str]
Implementation = Callable[[Sequence[np.ndarray]], List[Words]]

REFERENCE = "pytorch"
BY_CHUNKS = "chunks"
FILES = {
    "float": "onnx",
    "int8": "int8",
}  # precision of the files -> name of the implementation that runs them


@dataclass(frozen=True)
class TorchModels:
    """What was exported, in PyTorch.

    models: of each mode of the folder the model, in that mode alone (LoadedModel.in_mode).
    extract: samples (S,) -> features (T,C), as in training. to_words: token ids -> words.
    """

    models: Dict[str, Any]
    extract: Callable[[np.ndarray], np.ndarray]
    to_words: Callable[[List[int]], Words]

    def features(
        self, folder: ModelFolder, recordings: Sequence[np.ndarray]
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """N recordings (S,) -> x (N,T,C), x_lens (N,), of what the folder's recognisers hear."""
        matrices = [torch.from_numpy(self.extract(padded(samples, folder))) for samples in recordings]
        return pad_sequence(matrices, batch_first=True), torch.tensor([len(matrix) for matrix in matrices])

    def words(self, hyps: Sequence[Hypothesis]) -> List[Words]:
        return [self.to_words(hyp.tokens) for hyp in hyps]


@dataclass(frozen=True)
class Comparison:
    """Implementations that have to say the same; the others are compared with REFERENCE, the first."""

    mode: str
    two_pass: bool
    implementations: Dict[str, Implementation]


def comparisons(folder: ModelFolder, models: TorchModels) -> List[Comparison]:
    """All that can be compared of a model folder: each mode, without and with the second pass."""
    found = []
    for mode in folder.modes:
        one_pass = {REFERENCE: whole(folder, models, mode)}
        if mode == "streaming":
            one_pass[BY_CHUNKS] = by_chunks(folder, models)
        one_pass.update({name: of_files(folder, mode, precision) for precision, name in FILES.items()})
        found.append(Comparison(mode, False, one_pass))
        if folder.has_las:
            two_pass = {REFERENCE: whole_two_pass(folder, models, mode)}
            two_pass.update(
                {name: two_pass_of_files(folder, mode, precision) for precision, name in FILES.items()}
            )
            found.append(Comparison(mode, True, two_pass))
    return found


def whole(folder: ModelFolder, models: TorchModels, mode: str) -> Implementation:
    """PyTorch on whole utterances; a model that streams with its chunk mask."""
    model = models.models[mode]

    @torch.inference_mode()
    def recognise(recordings: Sequence[np.ndarray]) -> List[Words]:
        return models.words(greedy_search(model, *model.encode(*models.features(folder, recordings))))

    return recognise


def by_chunks(folder: ModelFolder, models: TorchModels) -> Implementation:
    """PyTorch chunk by chunk, with caches."""
    model = models.models["streaming"]
    return lambda recordings: models.words(
        streaming_greedy_search(model, *models.features(folder, recordings))
    )


def whole_two_pass(folder: ModelFolder, models: TorchModels, mode: str) -> Implementation:
    """PyTorch on whole utterances: n-best lists of modified_beam_search, chosen from by the LAS."""
    model, rescore = models.models[mode], folder.rescore
    weights = Weights(rescore["mu"], rescore["length_weight"])

    @torch.inference_mode()
    def recognise(recordings: Sequence[np.ndarray]) -> List[Words]:
        encoded = model.encode(*models.features(folder, recordings))
        nbests = modified_beam_search(model, *encoded, rescore["beam_size"])
        scored = score_nbests(model.las, *encoded, nbests, rescore["rescore_nbest"])
        return models.words([one.best(weights) for one in scored])

    return recognise


def of_files(folder: ModelFolder, mode: str, precision: str) -> Implementation:
    """sherpa-onnx over the files of a precision, one recording after the other as on a device."""
    recogniser = (SherpaStreaming if mode == "streaming" else SherpaOffline)(folder, precision)
    return lambda recordings: [recogniser.decode(samples).split() for samples in recordings]


def two_pass_of_files(folder: ModelFolder, mode: str, precision: str) -> Implementation:
    """Both passes over the files of a precision, by onnxruntime."""
    recogniser = TwoPassRecogniser(folder, precision, mode)
    return lambda recordings: [recogniser.decode(samples).words for samples in recordings]
