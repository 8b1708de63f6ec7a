"""Recognisers of sherpa-onnx with a clock on them.

A recogniser spends its time in two places, which are timed apart: in the features, which cost the same for
every model and which no compression makes cheaper, and in the model: encoder, prediction network, joiner and
greedy search.

S samples in [-1, 1] at 16 kHz.
"""

import time
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Tuple

import numpy as np

from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.sherpa import SAMPLING_RATE, SherpaOffline, SherpaStreaming, tail_samples

Clock = Callable[[], float]  # seconds

# Seconds that this process was on a processor. On an idle machine they are those of the wall clock; on a busy
# one they leave out what others took.
CPU_TIME: Clock = time.process_time

_PIECE = SAMPLING_RATE // 10  # samples that a microphone gives at once
_UTTERANCE = 10 * SAMPLING_RATE  # what a model that does not stream is given at once


class Heard(NamedTuple):
    """Seconds that a piece of audio took."""

    features_s: float
    chunks_s: List[float]  # of the model, for every chunk (or utterance) that was complete with this piece

    @property
    def latencies_s(self) -> List[float]:
        """From the arrival of the piece to the words of each chunk."""
        return (self.features_s + np.cumsum(self.chunks_s)).tolist()


def streamed(
    recogniser: SherpaStreaming, pieces: Iterable[np.ndarray], clock: Clock = CPU_TIME
) -> Iterator[Heard]:
    """Stream pieces (S,) as they come, and at the end the silence that the last chunk waits for.

    The features are computed as the samples are handed over, all else when a chunk is decoded.
    """
    online = recogniser.recognizer
    stream, num_samples = online.create_stream(), 0

    def hear(samples: np.ndarray, is_last: bool = False) -> Heard:
        start = clock()
        stream.accept_waveform(SAMPLING_RATE, samples)
        if is_last:
            stream.input_finished()
        features_s, chunks_s = clock() - start, []
        while online.is_ready(stream):
            start = clock()
            online.decode_stream(stream)
            chunks_s.append(clock() - start)
        return Heard(features_s, chunks_s)

    for samples in pieces:
        num_samples += len(samples)
        yield hear(samples)
    yield hear(np.zeros(tail_samples(num_samples, recogniser.chunk_size), dtype=np.float32), is_last=True)


def heard_whole(
    recogniser: SherpaOffline, utterances: Iterable[np.ndarray], clock: Clock = CPU_TIME
) -> Iterator[Heard]:
    """Utterances (S,), each at once."""
    for samples in utterances:
        stream = recogniser.recognizer.create_stream()
        start = clock()
        stream.accept_waveform(SAMPLING_RATE, samples)
        middle = clock()
        recogniser.recognizer.decode_stream(stream)
        yield Heard(middle - start, [clock() - middle])


class Candidate:
    """A model folder in one precision. It streams where it can; `mode` says so.

    piece_samples: what it is given at once.
    """

    def __init__(self, folder: ModelFolder, precision: str) -> None:
        self.mode = "streaming" if "streaming" in folder.modes else "offline"
        if self.mode == "streaming":
            self._hear, self.piece_samples = streamed, _PIECE
            self._recogniser: Any = SherpaStreaming(folder, precision)
        else:
            self._hear, self.piece_samples = heard_whole, _UTTERANCE
            self._recogniser = SherpaOffline(folder, precision)

    def hear(self, pieces: Iterable[np.ndarray], clock: Clock = CPU_TIME) -> Iterator[Heard]:
        """Audio from its beginning to its end."""
        return self._hear(self._recogniser, pieces, clock)


def latency_percentiles(heard: Iterable[Heard]) -> Tuple[float, float]:
    """Milliseconds of a chunk: median, 95th percentile."""
    latencies = [1000 * seconds for piece in heard for seconds in piece.latencies_s]
    median, p95 = np.percentile(latencies, [50, 95]).tolist()
    return median, p95
