"""Two passes over a model folder: the transducer's n-best list, and the LAS that chooses from it.

The first pass is modified_beam_search over what the encoder file makes of the audio; the LAS file scores its
hypotheses; `rescore` in model.json says how the two scores join. In PyTorch these are modified_beam_search,
score_nbests and ScoredNbest.best, and the result is the same.

A stream is encoded chunk by chunk as it comes, and a greedy search shows its words. The beam search and the
LAS run when an utterance is over, on encoder frames that were kept until then (some 20 kB for a second).

Shapes: S samples in [-1, 1] at 16 kHz, T' encoder frames, D encoder_dim.
"""

from dataclasses import dataclass
from typing import List, Sequence

import numpy as np
import torch

from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.greedy import GreedySearcher, Hypothesis
from transducer_kd.decode.rescore import ScoredNbest, Weights
from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.session import Encoded, FeatureStream, OnnxTransducer, features
from transducer_kd.export.sherpa import (
    LOOKAHEAD_FRAMES,
    SUBSAMPLING_FACTOR,
    UtteranceStream,
    padded,
    read_symbols,
)
from transducer_kd.log import UserError

ENCODER_FRAME_S = 0.04
_SILENT_TOKENS = ("<blk>", "<sos/eos>", "<unk>")


@dataclass(frozen=True)
class TwoPassResult:
    """What an utterance was recognised as."""

    words: List[str]
    hyp: Hypothesis  # the one that both passes chose
    nbest: ScoredNbest  # what it was chosen from

    def text(self) -> str:
        return " ".join(self.words)


class TwoPassRecogniser:
    """First pass, second pass, choice.

    Raises UserError where the folder has no second pass, no such precision or no such mode, or is damaged.
    """

    def __init__(
        self,
        folder: ModelFolder,
        precision: str = "float",
        mode: str = "streaming",
        num_threads: int = 1,
        pause_s: float = 0.0,
    ):
        """pause_s: seconds without words after which a stream is `at_pause`; 0: never."""
        if not folder.has_las or folder.rescore is None:
            raise UserError(
                f"{folder.path} has no second pass; leave --two-pass out, or export a phase with a LAS"
            )
        if mode not in folder.modes:
            raise UserError(f"{folder.path} has no mode {mode!r}; it has {', '.join(folder.modes)}")
        self.folder, self.mode, self.pause_s = folder, mode, pause_s
        self.model = OnnxTransducer(folder, precision, num_threads)
        self.model.open(mode)
        self._las = self.model.session("las")
        self._symbols = ["" if s in _SILENT_TOKENS else s for s in read_symbols(folder)]
        self._beam_size = int(folder.rescore["beam_size"])
        self._limit = int(folder.rescore["rescore_nbest"]) or None
        self._weights = Weights(folder.rescore["mu"], folder.rescore["length_weight"])

    def decode(self, samples: np.ndarray) -> TwoPassResult:
        """An utterance, samples (S,), from its beginning to its end."""
        if self.mode == "streaming":
            stream = self.stream()
            stream.accept(samples)
            stream.finish()
            return stream.result()
        x = features(padded(samples, self.folder))[None]
        return self.choose([self.model.encode(x, [x.shape[1]])])

    def stream(self) -> "TwoPassStream":
        """One that has heard nothing yet. UserError where the mode is not streaming."""
        if self.mode != "streaming":
            raise UserError(f"{self.folder.path}: mode {self.mode} hears whole utterances, and no stream")
        return TwoPassStream(self)

    def choose(self, encoded: Sequence[Encoded]) -> TwoPassResult:
        """Search an utterance that was encoded in pieces, one after the other, and let the LAS choose."""
        if not encoded:
            nothing = Hypothesis([], [], 0.0)
            return TwoPassResult([], nothing, ScoredNbest([nothing], [0.0]))
        encoder_out = torch.cat([piece.encoder_out for piece in encoded], dim=1)
        frames = torch.cat([piece.frames for piece in encoded], dim=1)
        lens = torch.tensor([encoder_out.size(1)])
        nbest = modified_beam_search(self.model, encoder_out, lens, self._beam_size)[0][: self._limit]
        scored = ScoredNbest(nbest, self._score(frames, nbest))
        best = scored.best(self._weights)
        return TwoPassResult(self.words(best.tokens), best, scored)

    def words(self, tokens: Sequence[int]) -> List[str]:
        """Token ids -> words."""
        text = "".join(self._symbols[token] for token in tokens)
        return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").split()

    def _score(self, frames: torch.Tensor, nbest: Sequence[Hypothesis]) -> List[float]:
        """Second-pass scores of hypotheses, from frames (1,T',D)."""
        y_lens = np.array([len(hyp.tokens) for hyp in nbest], dtype=np.int64)
        y = np.zeros((len(nbest), max(1, y_lens.max())), dtype=np.int64)
        for row, hyp in zip(y, nbest):
            row[: len(hyp.tokens)] = hyp.tokens
        inputs = {"encoder_frames": frames.numpy(), "y": y, "y_lens": y_lens}
        return self._las.run(None, inputs)[0].tolist()


class TwoPassStream(UtteranceStream):
    """Both passes over audio that comes piece by piece, in the interface of SherpaStream."""

    def __init__(self, recogniser: TwoPassRecogniser):
        self._recogniser, self._model = recogniser, recogniser.model
        super().__init__(self._model.chunk_size, recogniser.pause_s)

    def text(self) -> str:
        """The words so far, as the first pass has them."""
        return " ".join(self._recogniser.words(self._greedy().tokens))

    def result(self) -> TwoPassResult:
        """Both passes over the utterance so far."""
        return self._recogniser.choose(self._encoded)

    def final_text(self) -> str:
        """The words of the utterance after both passes."""
        return self.result().text()

    def at_pause(self) -> bool:
        """No words have come for pause_s seconds of audio."""
        if not self._recogniser.pause_s:
            return False
        timestamps = self._greedy().timestamps
        silent = self._searcher.frames_seen - (timestamps[-1] + 1 if timestamps else 0)
        return silent * ENCODER_FRAME_S >= self._recogniser.pause_s

    def _greedy(self) -> Hypothesis:
        """What the greedy search makes of the utterance so far."""
        with torch.inference_mode():
            for encoded in self._encoded[self._num_searched :]:
                self._searcher.advance(encoded.encoder_out, encoded.encoder_out_lens)
        self._num_searched = len(self._encoded)
        return self._searcher.results()[0]

    def _open(self) -> None:
        self._features, self._state = FeatureStream(), self._model.streaming_init(1)
        self._encoded: List[Encoded] = []
        self._num_searched = 0  # of them
        self._searcher = GreedySearcher(self._model, 1, torch.device("cpu"))

    def _give(self, samples: np.ndarray) -> None:
        self._features.accept(samples)

    def _run(self) -> int:
        before, advance = len(self._encoded), SUBSAMPLING_FACTOR * self._model.chunk_size
        while self._features.num_ready() >= advance + LOOKAHEAD_FRAMES:
            x = self._features.take(advance + LOOKAHEAD_FRAMES, advance)
            encoded, self._state = self._model.streaming_forward(x[None], self._state)
            self._encoded.append(encoded)
        return len(self._encoded) - before

    def _end(self) -> None:
        self._features.finish()
