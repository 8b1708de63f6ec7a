"""Decode a test part with several methods: the encoder runs once, each method is timed and yielded when done.

Shapes: N batch, T feature frames, T' encoder frames.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import torch

from transducer_kd.data.batch import Batch
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.decode import lattice as lat
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.greedy import Hypothesis, greedy_search
from transducer_kd.decode.streaming import streaming_greedy_search
from transducer_kd.decode.wer import Utterance
from transducer_kd.log import UserError, progress

LATTICE_METHODS = ("fast_beam_search", "fast_beam_search_nbest", "fast_beam_search_nbest_oracle")
METHODS = ("greedy_search", "modified_beam_search", *LATTICE_METHODS, "streaming_greedy_search")

# Encoder outputs of a part that are kept between methods; what is beyond is computed again for each.
_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class SearchOptions:
    """How the methods search; the names are icefall's."""

    chunk_size: int = 0  # encoder frames; 0: full context. The encoder's, for all methods
    max_sym_per_frame: int = 1  # greedy_search, streaming_greedy_search
    beam_size: int = 4  # modified_beam_search
    fast_beam: lat.FastBeamSearchConfig = field(default_factory=lat.FastBeamSearchConfig)
    num_paths: int = 200  # fast_beam_search_nbest*
    nbest_scale: float = 0.5

    def of(self, method: str) -> Dict[str, Any]:
        """The settings that `method` uses, for its record and its file names."""
        if method == "modified_beam_search":
            return {"beam_size": self.beam_size}
        if method not in LATTICE_METHODS:
            return {"max_sym_per_frame": self.max_sym_per_frame}
        graph = {
            "beam": self.fast_beam.beam,
            "max_contexts": self.fast_beam.max_contexts,
            "max_states": self.fast_beam.max_states,
        }
        if method == "fast_beam_search":
            return graph
        return {**graph, "num_paths": self.num_paths, "nbest_scale": self.nbest_scale}

    def suffix(self, method: str) -> str:
        """Part of a file name that tells decodings with other settings apart."""
        settings = {"streaming-chunk-size": self.chunk_size} if self.chunk_size else {}
        settings.update(self.of(method))
        return "-".join(f"{name.replace('_', '-')}-{value}" for name, value in settings.items())


@dataclass
class MethodResult:
    """One part decoded by one method."""

    method: str
    utterances: List[Utterance] = field(default_factory=list)
    audio_s: float = 0.0
    decode_s: float = 0.0  # encoder and search, without reading features


def check_methods(methods: Sequence[str], model: Any, options: SearchOptions, device: torch.device) -> None:
    """UserError for an unknown method, or one that cannot work with this model: before any time is spent."""
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--decoding-method {method} is not known; known: {', '.join(METHODS)}")
    if any(method in LATTICE_METHODS for method in methods):
        lat.check_model(model, device)
    if "streaming_greedy_search" in methods and options.chunk_size <= 0:
        raise UserError(
            "streaming_greedy_search needs a chunk size, but this model was trained with full context; pass "
            "--chunk-size, e.g. 16, or leave the method out"
        )


@dataclass
class _Encoded:
    """A batch after the encoder."""

    cut_ids: List[str]
    texts: List[str]
    audio_s: float
    encoder_out: torch.Tensor  # (N,T',encoder_dim)
    encoder_out_lens: torch.Tensor  # (N,)
    encode_s: float


class PartDecoder:
    """A model with the batches of one part.

    batches: gives the part's batches from the first on, the same ones at each call.
    lattice_dir: where the lattices of each batch are saved; None: they are not.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        batches: Callable[[], Iterable[Batch]],
        options: SearchOptions,
        device: torch.device,
        lattice_dir: Optional[Path] = None,
    ):
        self.model, self.tokenizer, self.batches, self.options = model, tokenizer, batches, options
        self.device, self.lattice_dir = device, lattice_dir
        self._cache: List[_Encoded] = []
        self._cached_bytes, self._is_complete = 0, False

    def decode(self, methods: Sequence[str]) -> Iterator[MethodResult]:
        """Results in the order of METHODS, each as soon as it is there.

        The lattice methods share their lattices and end together.
        """
        lattice_methods = [m for m in LATTICE_METHODS if m in methods]
        for method in METHODS:
            if method in lattice_methods[:1]:
                yield from self._lattice_methods(lattice_methods)
            elif method in methods and method == "streaming_greedy_search":
                yield self._streaming()
            elif method in methods and method not in lattice_methods:
                yield self._frame_synchronous(method)

    def _frame_synchronous(self, method: str) -> MethodResult:
        result = MethodResult(method)
        for encoded in progress(self._encoded(), desc=method):
            start = self._now()
            args = (self.model, encoded.encoder_out, encoded.encoder_out_lens)
            if method == "greedy_search":
                hyps = greedy_search(*args, self.options.max_sym_per_frame)
            else:
                hyps = [nbest[0] for nbest in modified_beam_search(*args, self.options.beam_size)]
            self._add(result, encoded, hyps, encoded.encode_s + self._now() - start)
        return result

    def _lattice_methods(self, methods: List[str]) -> List[MethodResult]:
        results = {method: MethodResult(method) for method in methods}
        for number, encoded in enumerate(progress(self._encoded(), desc=", ".join(methods))):
            start = self._now()
            lattice = lat.fast_beam_search_lattice(
                self.model, encoded.encoder_out, encoded.encoder_out_lens, self.options.fast_beam
            )
            shared_s = encoded.encode_s + self._now() - start
            if self.lattice_dir is not None:
                lat.save_lattices(self.lattice_dir / f"lattices-{number:05d}.pt", lattice, encoded.cut_ids)
            if "fast_beam_search" in results:
                start = self._now()
                hyps = lat.one_best(lattice)
                self._add(results["fast_beam_search"], encoded, hyps, shared_s + self._now() - start)
            if "fast_beam_search" not in methods or len(methods) > 1:
                start = self._now()
                nbests = lat.nbest(lattice, self.options.num_paths, self.options.nbest_scale)
                shared_s += self._now() - start
                self._choose(results, encoded, nbests, shared_s)
        return list(results.values())

    def _choose(
        self,
        results: Dict[str, MethodResult],
        encoded: _Encoded,
        nbests: List[List[Hypothesis]],
        shared_s: float,
    ) -> None:
        if "fast_beam_search_nbest" in results:
            best = [hyps[0] for hyps in nbests]
            self._add(results["fast_beam_search_nbest"], encoded, best, shared_s)
        if "fast_beam_search_nbest_oracle" in results:
            best = lat.oracle(nbests, [text.split() for text in encoded.texts], self._words)
            self._add(results["fast_beam_search_nbest_oracle"], encoded, best, shared_s)

    def _streaming(self) -> MethodResult:
        result = MethodResult("streaming_greedy_search")
        for batch in progress(self.batches(), desc=result.method):
            start = self._now()
            batch = batch.to(self.device)
            hyps = streaming_greedy_search(
                self.model,
                batch.features,
                batch.feature_lens,
                self.options.chunk_size,
                self.options.max_sym_per_frame,
            )
            self._add(result, batch, hyps, self._now() - start)
        return result

    def _add(self, result: MethodResult, batch: Any, hyps: List[Hypothesis], seconds: float) -> None:
        """batch: anything with cut_ids, texts and audio_s."""
        for cut_id, text, hyp in zip(batch.cut_ids, batch.texts, hyps):
            result.utterances.append((cut_id, text.split(), self._words(hyp.tokens)))
        result.audio_s += batch.audio_s
        result.decode_s += seconds

    def _words(self, tokens: List[int]) -> List[str]:
        return self.tokenizer.decode(tokens).split()

    def _encoded(self) -> Iterator[_Encoded]:
        """The part's batches after the encoder; from the second call on, from memory as far as it reaches."""
        if self._is_complete:
            yield from self._cache
            return
        is_caching = True
        for number, batch in enumerate(self.batches()):
            if number < len(self._cache):
                yield self._cache[number]
                continue
            encoded = self._encode(batch)
            is_caching = is_caching and self._cached_bytes < _CACHE_BYTES
            if is_caching:
                self._cache.append(encoded)
                self._cached_bytes += encoded.encoder_out.numel() * encoded.encoder_out.element_size()
            yield encoded
        self._is_complete = is_caching

    def _encode(self, batch: Batch) -> _Encoded:
        start = self._now()
        moved = batch.to(self.device)
        with torch.inference_mode():
            out, lens = self.model.encode(moved.features, moved.feature_lens, self.options.chunk_size)
        return _Encoded(batch.cut_ids, batch.texts, batch.audio_s, out, lens, self._now() - start)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
