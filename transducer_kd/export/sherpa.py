"""Recognisers of sherpa-onnx, the runtime that phones use, over a model folder.

S samples in [-1, 1] at 16 kHz, T feature frames (10 ms), c encoder frames of a chunk (40 ms each).

sherpa-onnx runs a chunk of 4c+3 feature frames only when at least one frame more is there, and drops what is
left at the end. So silence follows the audio, as much as the last frame needs and no more (`tail_samples`).
It follows where a streaming model hears whole utterances too, so that both modes hear the same. Whoever
compares another implementation with these has to give it `padded(samples, folder)`.

No torch here, nor in what is imported: a recogniser should start at once.
"""

from typing import Any, Dict, List

import numpy as np
import sherpa_onnx

from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.metadata import check_metadata
from transducer_kd.log import UserError

SAMPLING_RATE = 16000
FEATURE_DIM = 80
FRAME_SAMPLES = 160  # from one feature frame to the next
DECODING_METHODS = ("greedy_search", "modified_beam_search")

# As in models/subsampling.py, which imports torch; tests/export/test_sherpa.py compares them.
SUBSAMPLING_FACTOR = 4
LOOKAHEAD_FRAMES = 3
MIN_FEATURE_FRAMES = 7

PIECE_SAMPLES = SAMPLING_RATE // 2  # samples that a stream takes in before it decodes: memory is for so many
_NEVER_S = 1e9
MOST_TOKENS = (
    1000  # of utterances that are over; some minutes of speech, which are still in sherpa-onnx's result
)


def num_frames(num_samples: int) -> int:
    """T of S samples."""
    return (num_samples + FRAME_SAMPLES // 2) // FRAME_SAMPLES


def tail_samples(num_samples: int, chunk_size: int) -> int:
    """Samples of silence to append to S samples so that every feature frame of them is decoded.

    chunk_size: encoder frames of a chunk; then the frames of audio and silence are 4c for each chunk, the 3
    that the last chunk looks ahead, and the one that sherpa-onnx waits for. PyTorch makes exactly the same
    encoder frames of them. 0: the model does not stream; only what is too short for one encoder frame gets a
    tail.
    """
    frames = num_frames(num_samples)
    if chunk_size <= 0:
        needed = MIN_FEATURE_FRAMES
    else:
        chunk = SUBSAMPLING_FACTOR * chunk_size
        num_chunks = max(1, -(-(frames - LOOKAHEAD_FRAMES) // chunk))
        needed = num_chunks * chunk + LOOKAHEAD_FRAMES + 1
    return max(0, needed * FRAME_SAMPLES - FRAME_SAMPLES // 2 - num_samples)


def padded(samples: np.ndarray, folder: ModelFolder) -> np.ndarray:
    """What recognisers of a folder hear of an utterance (S,): the silence of `tail_samples` follows it."""
    tail = tail_samples(len(samples), int(folder.info["chunk_size"]))
    return np.pad(np.asarray(samples, dtype=np.float32), (0, tail))


class SherpaStreaming:
    """sherpa-onnx's OnlineRecognizer: audio is decoded as it comes, in any number of streams.

    Raises UserError where the folder is damaged, has no such precision, or does not stream.
    """

    def __init__(
        self,
        folder: ModelFolder,
        precision: str = "float",
        num_threads: int = 1,
        decoding_method: str = "greedy_search",
        beam_size: int = 4,
        pause_s: float = 0.0,
    ):
        """pause_s: seconds without words after which a stream is `at_pause`; 0: never."""
        if "streaming" not in folder.modes:
            raise UserError(
                f"{folder.path}: this model does not stream, it hears whole utterances; use mode offline"
            )
        self.chunk_size = int(folder.info["chunk_size"])
        self.is_greedy = decoding_method == "greedy_search"
        self.recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
            **_arguments(folder, "encoder-streaming", precision, num_threads, decoding_method, beam_size),
            enable_endpoint_detection=pause_s > 0,
            rule1_min_trailing_silence=pause_s,
            rule2_min_trailing_silence=pause_s,
            rule3_min_utterance_length=_NEVER_S,
            model_type="conformer",
        )

    def stream(self) -> "SherpaStream":
        """One that has heard nothing yet."""
        return SherpaStream(self)

    def decode(self, samples: np.ndarray) -> str:
        """The words of an utterance, samples (S,), from its beginning to its end."""
        stream = self.stream()
        stream.accept(samples)
        stream.finish()
        return stream.text()


class SherpaStream:
    """Audio that comes piece by piece. However it is cut, the words are the same; audio is forgotten."""

    def __init__(self, recogniser: SherpaStreaming):
        self._recognizer, self._chunk_size = recogniser.recognizer, recogniser.chunk_size
        self._is_greedy = recogniser.is_greedy
        self._stream = self._recognizer.create_stream()
        self._num_samples, self._is_finished = 0, False
        self._earlier_text, self._num_earlier_tokens = "", 0  # of utterances that are over

    def accept(self, samples: np.ndarray) -> None:
        """Hear the next samples (S,), any number of them, and decode the chunks that are complete."""
        if self._is_finished:
            raise ValueError("this stream is over; begin another one")
        self._num_samples += len(samples)
        self._hear(samples)

    def finish(self) -> None:
        """No more audio will come: decode what is left."""
        if self._is_finished:
            return
        self._hear(np.zeros(tail_samples(self._num_samples, self._chunk_size), dtype=np.float32))
        self._is_finished = True
        self._stream.input_finished()
        self._decode()

    def text(self) -> str:
        """The words of the utterance so far."""
        return self._all_text()[len(self._earlier_text) :].strip()

    def final_text(self) -> str:
        """The words of the utterance."""
        return self.text()

    def tokens(self) -> List[str]:
        """The tokens of the utterance so far, as they stand in tokens.txt."""
        return self._recognizer.tokens(self._stream)[self._num_earlier_tokens :]

    def at_pause(self) -> bool:
        """No words have come for pause_s seconds of audio."""
        return self._recognizer.is_endpoint(self._stream)

    def restart(self) -> None:
        """Begin another utterance, here in the audio. Nothing of it is lost; the model goes on as before."""
        self._earlier_text = self._all_text()
        self._num_earlier_tokens += len(self.tokens())
        if self._num_earlier_tokens > (MOST_TOKENS if self._is_greedy else 0):
            # This lets the words go, and also hides from attention what was before, which may be the first
            # half of a word: not at every pause. But a beam search may yet change words of before.
            self._recognizer.reset(self._stream)
            self._earlier_text, self._num_earlier_tokens = "", 0

    def _all_text(self) -> str:
        return self._recognizer.get_result(self._stream)

    def _hear(self, samples: np.ndarray) -> None:
        for start in range(0, len(samples), PIECE_SAMPLES):
            piece = np.ascontiguousarray(samples[start : start + PIECE_SAMPLES], dtype=np.float32)
            self._stream.accept_waveform(SAMPLING_RATE, piece)
            self._decode()

    def _decode(self) -> None:
        while self._recognizer.is_ready(self._stream):
            self._recognizer.decode_stream(self._stream)


class SherpaOffline:
    """sherpa-onnx's OfflineRecognizer: whole utterances.

    Raises UserError where the folder is damaged or has no such precision.
    """

    def __init__(
        self,
        folder: ModelFolder,
        precision: str = "float",
        num_threads: int = 1,
        decoding_method: str = "greedy_search",
        beam_size: int = 4,
    ):
        self._folder = folder
        self.recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
            **_arguments(folder, "encoder-offline", precision, num_threads, decoding_method, beam_size),
            model_type="transducer",
        )

    def decode(self, samples: np.ndarray) -> str:
        """The words of an utterance, samples (S,)."""
        stream = self.recognizer.create_stream()
        stream.accept_waveform(SAMPLING_RATE, padded(samples, self._folder))
        self.recognizer.decode_stream(stream)
        return stream.result.text.strip()


def _arguments(
    folder: ModelFolder,
    encoder: str,
    precision: str,
    num_threads: int,
    decoding_method: str,
    beam_size: int,
) -> Dict[str, Any]:
    """What both recognisers are made with. sherpa-onnx ends the process over what it does not like, without
    an exception, so everything is looked at before.
    """
    parts = {"encoder": encoder, "decoder": "decoder", "joiner": "joiner"}
    if decoding_method not in DECODING_METHODS:
        raise UserError(f"decoding method {decoding_method!r} is not one of {', '.join(DECODING_METHODS)}")
    files = {name: folder.file(part, precision) for name, part in parts.items()}
    for name, part in parts.items():
        check_metadata(files[name], part)
    tokens = folder.path / "tokens.txt"
    if not tokens.is_file():
        raise UserError(f"{tokens} is missing; copy the whole folder, or export the phase again")
    return {
        **{name: str(path) for name, path in files.items()},
        "tokens": str(tokens),
        "num_threads": num_threads,
        "sample_rate": SAMPLING_RATE,
        "feature_dim": FEATURE_DIM,
        "decoding_method": decoding_method,
        "max_active_paths": beam_size,
    }
