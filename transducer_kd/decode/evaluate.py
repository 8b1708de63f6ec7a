"""Decode a test part with several methods: the encoder runs once, each method is timed and yielded when done.

Shapes: N batch, T feature frames, T' encoder frames.
"""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple

import torch

from transducer_kd.data.batch import Batch
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.decode import lattice as lat
from transducer_kd.decode import rescore
from transducer_kd.decode.beam_search import modified_beam_search
from transducer_kd.decode.greedy import Hypothesis, greedy_search
from transducer_kd.decode.streaming import streaming_greedy_search
from transducer_kd.decode.wer import Utterance
from transducer_kd.log import UserError, progress

# Methods of a family share their search, n-best lists and time before the last step.
FAMILIES = (
    ("greedy_search",),
    ("modified_beam_search", "modified_beam_search_las_rescore"),
    (
        "fast_beam_search",
        "fast_beam_search_nbest",
        "fast_beam_search_nbest_oracle",
        "fast_beam_search_nbest_las_rescore",
    ),
    ("streaming_greedy_search",),
)
LATTICE_METHODS = FAMILIES[2]
METHODS = tuple(method for family in FAMILIES for method in family)
_RESCORE = "_las_rescore"  # what follows the first pass's name

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
    rescore_nbest: int = 0  # *_las_rescore: hypotheses of each n-best list that the LAS scores; 0: all
    # Of each *_las_rescore method that is used.
    weights: Mapping[str, rescore.Weights] = field(default_factory=dict)

    def of(self, method: str) -> Dict[str, Any]:
        """The settings that `method` uses, for its record and its file names."""
        if is_rescore(method):
            return {**self.of_nbest(method), **dataclasses.asdict(self.weights[method])}
        if method.startswith("modified_beam_search"):
            return {"beam_size": self.beam_size}
        if method not in LATTICE_METHODS:
            return {"max_sym_per_frame": self.max_sym_per_frame}
        graph = dataclasses.asdict(self.fast_beam)
        if method == "fast_beam_search":
            return graph
        return {**graph, "num_paths": self.num_paths, "nbest_scale": self.nbest_scale}

    def of_nbest(self, method: str) -> Dict[str, Any]:
        """The settings of a *_las_rescore method without the weights."""
        return {**self.of(method[: -len(_RESCORE)]), "rescore_nbest": self.rescore_nbest}

    def suffix(self, method: str) -> str:
        """Part of a file name that tells decodings with other settings apart."""
        settings = {"streaming-chunk-size": self.chunk_size} if self.chunk_size else {}
        settings.update(self.of(method))
        settings.pop("tuned_on", None)  # where weights are from changes no result
        return "-".join(f"{name.replace('_', '-')}-{value}" for name, value in settings.items())


@dataclass
class MethodResult:
    """One part decoded by one method."""

    method: str
    utterances: List[Utterance] = field(default_factory=list)
    audio_s: float = 0.0
    decode_s: float = 0.0  # encoder and search, without reading features
    second_pass_s: Optional[float] = None  # part of decode_s spent in a second pass; None without one


def is_rescore(method: str) -> bool:
    """Whether `method` has a second pass."""
    return method.endswith(_RESCORE)


def check_methods(methods: Sequence[str], model: Any, options: SearchOptions, device: torch.device) -> None:
    """UserError for an unknown method, or one that cannot work with this model: before any time is spent."""
    for method in methods:
        if method not in METHODS:
            raise UserError(f"--decoding-method {method} is not known; known: {', '.join(METHODS)}")
    if any(method in LATTICE_METHODS for method in methods):
        lat.check_model(model, device)
    rescoring = [method for method in methods if is_rescore(method)]
    if rescoring and model.las is None:
        raise UserError(
            f"{rescoring[0]} needs a LAS, but this phase has none (model.las.enabled=false); decode a phase "
            "that has one, such as teacher_las, student_las or finetune, or leave the method out"
        )
    if "streaming_greedy_search" in methods and options.chunk_size <= 0:
        raise UserError(
            "streaming_greedy_search needs a chunk size, but this model was trained with full context; pass "
            "--chunk-size, e.g. 16, or leave the method out"
        )


@dataclass
class _Encoded:
    """A batch after the encoder."""

    number: int  # of the batch within the part
    cut_ids: List[str]
    texts: List[str]
    audio_s: float
    out: Tuple[torch.Tensor, torch.Tensor]  # encoder_out (N,T',encoder_dim), encoder_out_lens (N,)
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
        """Results in the order of METHODS, each as soon as it is there; those of a family come together."""
        searches = (self._greedy, self._beam, self._lattices, self._streaming)
        for family, search in zip(FAMILIES, searches):
            results = {method: MethodResult(method) for method in family if method in methods}
            if results:
                # The streaming search runs the encoder itself, chunk by chunk.
                batches = self.batches() if search == self._streaming else self._encoded()
                for batch in progress(batches, desc=", ".join(results)):
                    search(batch, results)
                yield from results.values()

    def scored_nbests(self, method: str) -> Iterator[Tuple[rescore.ScoredNbest, List[str]]]:
        """Of each utterance the n-best list that `method` chooses from, with the reference words."""
        for encoded in progress(self._encoded(), desc=f"n-best lists of {method}"):
            if method in LATTICE_METHODS:
                nbests = self._nbests(self._lattice(encoded))
            else:
                nbests = self._beams(encoded)
            yield from zip(self._scored(encoded, nbests), (text.split() for text in encoded.texts))

    def _greedy(self, encoded: _Encoded, results: Dict[str, MethodResult]) -> None:
        start = self._now()
        hyps = greedy_search(self.model, *encoded.out, self.options.max_sym_per_frame)
        self._add(results["greedy_search"], encoded, hyps, encoded.encode_s + self._now() - start)

    def _beam(self, encoded: _Encoded, results: Dict[str, MethodResult]) -> None:
        start = self._now()
        nbests = self._beams(encoded)
        seconds = encoded.encode_s + self._now() - start
        if "modified_beam_search" in results:
            self._add(results["modified_beam_search"], encoded, [nbest[0] for nbest in nbests], seconds)
        if "modified_beam_search_las_rescore" in results:
            self._rescore(results["modified_beam_search_las_rescore"], encoded, nbests, seconds)

    def _lattices(self, encoded: _Encoded, results: Dict[str, MethodResult]) -> None:
        start = self._now()
        lattice = self._lattice(encoded)
        seconds = encoded.encode_s + self._now() - start
        if self.lattice_dir is not None:
            lat.save_lattices(
                self.lattice_dir / f"lattices-{encoded.number:05d}.pt", lattice, encoded.cut_ids
            )
        if "fast_beam_search" in results:
            start = self._now()
            hyps = lat.one_best(lattice)
            self._add(results["fast_beam_search"], encoded, hyps, seconds + self._now() - start)
        if list(results) == ["fast_beam_search"]:
            return
        start = self._now()
        nbests = self._nbests(lattice)
        seconds += self._now() - start
        if "fast_beam_search_nbest" in results:
            self._add(results["fast_beam_search_nbest"], encoded, [nbest[0] for nbest in nbests], seconds)
        if "fast_beam_search_nbest_oracle" in results:
            hyps = lat.oracle(nbests, [text.split() for text in encoded.texts], self.words)
            self._add(results["fast_beam_search_nbest_oracle"], encoded, hyps, seconds)
        if "fast_beam_search_nbest_las_rescore" in results:
            self._rescore(results["fast_beam_search_nbest_las_rescore"], encoded, nbests, seconds)

    def _rescore(
        self, result: MethodResult, encoded: _Encoded, nbests: List[List[Hypothesis]], first_pass_s: float
    ) -> None:
        start = self._now()
        weights = self.options.weights[result.method]
        hyps = [scored.best(weights) for scored in self._scored(encoded, nbests)]
        seconds = self._now() - start
        self._add(result, encoded, hyps, first_pass_s + seconds)
        result.second_pass_s = (result.second_pass_s or 0.0) + seconds

    def _streaming(self, batch: Batch, results: Dict[str, MethodResult]) -> None:
        start = self._now()
        batch = batch.to(self.device)
        hyps = streaming_greedy_search(
            self.model,
            batch.features,
            batch.feature_lens,
            self.options.chunk_size,
            self.options.max_sym_per_frame,
        )
        self._add(results["streaming_greedy_search"], batch, hyps, self._now() - start)

    def _beams(self, encoded: _Encoded) -> List[List[Hypothesis]]:
        return modified_beam_search(self.model, *encoded.out, self.options.beam_size)

    def _lattice(self, encoded: _Encoded) -> Any:
        return lat.fast_beam_search_lattice(self.model, *encoded.out, self.options.fast_beam)

    def _nbests(self, lattice: Any) -> List[List[Hypothesis]]:
        return lat.nbest(lattice, self.options.num_paths, self.options.nbest_scale)

    def _scored(self, encoded: _Encoded, nbests: List[List[Hypothesis]]) -> List[rescore.ScoredNbest]:
        return rescore.score_nbests(self.model.las, *encoded.out, nbests, self.options.rescore_nbest)

    def _add(self, result: MethodResult, batch: Any, hyps: List[Hypothesis], seconds: float) -> None:
        """batch: anything with cut_ids, texts and audio_s."""
        for cut_id, text, hyp in zip(batch.cut_ids, batch.texts, hyps):
            result.utterances.append((cut_id, text.split(), self.words(hyp.tokens)))
        result.audio_s += batch.audio_s
        result.decode_s += seconds

    def words(self, tokens: List[int]) -> List[str]:
        """Token ids -> words, as they are scored."""
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
            encoded = self._encode(number, batch)
            is_caching = is_caching and self._cached_bytes < _CACHE_BYTES
            if is_caching:
                self._cache.append(encoded)
                self._cached_bytes += encoded.out[0].numel() * encoded.out[0].element_size()
            yield encoded
        self._is_complete = is_caching

    def _encode(self, number: int, batch: Batch) -> _Encoded:
        start = self._now()
        moved = batch.to(self.device)
        with torch.inference_mode():
            out = self.model.encode(moved.features, moved.feature_lens, self.options.chunk_size)
        encode_s = self._now() - start
        return _Encoded(number, batch.cut_ids, batch.texts, batch.audio_s, out, encode_s)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
