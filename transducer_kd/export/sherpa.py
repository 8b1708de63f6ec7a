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
TOKENS = "tokens.txt"
DECODING_METHODS = ("greedy_search", "modified_beam_search")

# As in models/subsampling.py, which imports torch; tests/export/test_sherpa.py compares them.
SUBSAMPLING_FACTOR = 4
LOOKAHEAD_FRAMES = 3
MIN_FEATURE_FRAMES = 7

PIECE_SAMPLES = SAMPLING_RATE // 2  # samples that a stream takes in before it decodes: memory is for so many
# Seconds without words that end an utterance. With 0.6 to 0.8 dev utterances that follow each other have the
# fewest errors (two_pass and progressive at mini); 0.5 cuts utterances in two, 1.2 misses short pauses.
PAUSE_S = 0.8
MOST_AGAIN_S = 1.0  # of a pause that the next utterance hears again
_NEVER_S = 1e9
LONGEST_SILENCE = 10 * SAMPLING_RATE  # samples without words after which a stream begins anew, too


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


def longest_tail(chunk_size: int) -> int:
    """Samples of silence that are enough after any number of samples, of a model that streams."""
    return FRAME_SAMPLES * (SUBSAMPLING_FACTOR * chunk_size + LOOKAHEAD_FRAMES + 1)


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
        self.chunk_size, self.pause_s = int(folder.info["chunk_size"]), pause_s
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


class UtteranceStream:
    """Audio that comes piece by piece, utterance by utterance. However it is cut, the words of an utterance
    are the same; audio is forgotten.

    Models know utterances alone, and one that goes on after an utterance hardly recognises the next. So each
    utterance begins with a model that has heard nothing, and with the second half of the pause, MOST_AGAIN_S
    at most, where its first sound may be. WER of 70 test-clean utterances with pauses of 2 s (two_pass at
    mini, int8): as one stream 60 %, with sherpa-onnx's reset of a stream 42 %, with a new stream after a
    pause 5.0 %, like this 3.7 %; alone they have 3.9 %.

    A subclass has _open (a model that has heard nothing), _give (it hears a piece), _run (the chunks that are
    complete; returns how many), _end (no more will come) and text.
    """

    def __init__(self, chunk_size: int, pause_s: float):
        """chunk_size: encoder frames; pause_s: what lies between utterances."""
        self._chunk_size, self._is_finished = chunk_size, False
        self._num_again = round(min(pause_s / 2, MOST_AGAIN_S) * SAMPLING_RATE)
        self._begin()

    def accept(self, samples: np.ndarray) -> None:
        """Hear the next samples (S,), any number of them, and run the chunks that are complete."""
        if self._is_finished:
            raise ValueError("this stream is over; begin another one")
        self._hear(samples)

    def finish(self) -> None:
        """No more audio will come: run what is left."""
        if self._is_finished:
            return
        self._hear(np.zeros(tail_samples(self._num_heard, self._chunk_size), dtype=np.float32))
        self._is_finished = True
        self._end()
        self._run()

    def restart(self) -> None:
        """Begin another utterance, at a pause. A silence goes on, until it is long."""
        if self.text() or self._num_heard > LONGEST_SILENCE:
            recent = self._recent
            self._begin()
            self._hear(recent)

    def _begin(self) -> None:
        self._num_heard = self._num_decoded = 0  # samples of this utterance
        # What the next utterance hears as well: what is not decoded yet, and some samples before.
        self._recent = np.zeros(0, dtype=np.float32)
        self._open()

    def _hear(self, samples: np.ndarray) -> None:
        for start in range(0, len(samples), PIECE_SAMPLES):
            piece = np.ascontiguousarray(samples[start : start + PIECE_SAMPLES], dtype=np.float32)
            self._give(piece)
            self._num_heard += len(piece)
            self._num_decoded += self._run() * self._chunk_size * SUBSAMPLING_FACTOR * FRAME_SAMPLES
            wanted = self._num_heard - self._num_decoded + self._num_again
            recent = np.concatenate([self._recent, piece])
            self._recent = recent[max(0, len(recent) - wanted) :]


class SherpaStream(UtteranceStream):
    """A stream of sherpa-onnx."""

    def __init__(self, recogniser: SherpaStreaming):
        self._recognizer = recogniser.recognizer
        super().__init__(recogniser.chunk_size, recogniser.pause_s)

    def text(self) -> str:
        """The words of the utterance so far."""
        return self._recognizer.get_result(self._stream).strip()

    def final_text(self) -> str:
        """The words of the utterance."""
        return self.text()

    def tokens(self) -> List[str]:
        """The tokens of the utterance so far, as they stand in tokens.txt."""
        return self._recognizer.tokens(self._stream)

    def at_pause(self) -> bool:
        """No words have come for pause_s seconds of audio."""
        return self._recognizer.is_endpoint(self._stream)

    def _open(self) -> None:
        self._stream = self._recognizer.create_stream()

    def _give(self, samples: np.ndarray) -> None:
        self._stream.accept_waveform(SAMPLING_RATE, samples)

    def _run(self) -> int:
        num_chunks = 0
        while self._recognizer.is_ready(self._stream):
            self._decode()
            num_chunks += 1
        return num_chunks

    def _decode(self) -> None:
        """One chunk that is complete."""
        self._recognizer.decode_stream(self._stream)

    def _end(self) -> None:
        self._stream.input_finished()


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


def read_symbols(folder: ModelFolder) -> List[str]:
    """What each token id stands for, V of them. UserError where tokens.txt does not fit the model."""
    path, vocab_size = folder.path / TOKENS, folder.info["vocab_size"]
    try:
        lines = path.read_text(encoding="utf-8").strip("\n").split("\n")  # other line ends may be tokens
        split = (line.rsplit(maxsplit=1) for line in lines)
        pairs = sorted((int(number), symbol) for symbol, number in split)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy the whole folder, or export the phase again") from None
    except ValueError:
        pairs = []
    if [number for number, _ in pairs] != list(range(vocab_size)):
        raise UserError(
            f"{path} is not of this model, which has the tokens 0 to {vocab_size - 1}, a line for each with "
            "the token and its number; copy the whole folder, or export the phase again"
        )
    return [symbol for _, symbol in pairs]


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
    read_symbols(folder)
    return {
        **{name: str(path) for name, path in files.items()},
        "tokens": str(folder.path / TOKENS),
        "num_threads": num_threads,
        "sample_rate": SAMPLING_RATE,
        "feature_dim": FEATURE_DIM,
        "decoding_method": decoding_method,
        "max_active_paths": beam_size,
    }
