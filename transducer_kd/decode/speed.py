"""How fast encoders are, streaming and on whole utterances.

The encoders take turns, and a time is the median over turns: what else the machine does slows one of them no
more than another. How long an encoder takes does not depend on what it is given, so it is given random
features, one utterance at a time.

Shapes: N streams, T feature frames, C mel bins, T' encoder frames, D channels.
"""

import dataclasses
import time
import warnings
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from transducer_kd.data.batch import FRAME_SHIFT_S
from transducer_kd.decode.streaming import chunks
from transducer_kd.log import progress
from transducer_kd.models.conformer import Conformer, StreamingState
from transducer_kd.models.subsampling import subsampled_lens

Clock = Callable[[], float]  # seconds
RUNTIME = "TorchScript, frozen"
_SEED = 0
_RUNS_UNTIL_OPTIMISED = 3  # TorchScript watches a graph's first runs, and then compiles it


@dataclass(frozen=True)
class Timing:
    """Of an encoder in one mode; medians over the turns."""

    rtf: float  # seconds for a second of audio
    chunk_ms_median: Optional[float] = None  # of the chunks of an utterance; None with full context
    chunk_ms_p95: Optional[float] = None
    times_faster: Optional[float] = None  # than the reference in this mode; None where it has no such mode


class FrozenEncoder:
    """A Conformer as it runs when it is deployed: traced and frozen by TorchScript.

    What Python needs to call an operation does not depend on its size; in a small encoder it is as much as
    the operations themselves, and would hide what smaller ones save. A graph is made for each shape of input.
    """

    def __init__(self, encoder: Conformer) -> None:
        self.encoder, self.cfg, self.streaming_init = encoder, encoder.cfg, encoder.streaming_init
        self._chunk = _Call(encoder, Conformer.streaming_core).eval()
        self._whole = _Call(encoder, _whole).eval()
        self._graphs: Dict[Any, Callable[..., Tuple[Tensor, ...]]] = {}

    def streaming_forward(
        self, x: Tensor, x_lens: Tensor, state: StreamingState
    ) -> Tuple[Tensor, Tensor, StreamingState]:
        """Conformer.streaming_forward: x (N,T,C), x_lens (N,) -> (N,T',D), (N,), the next state."""
        out_lens = subsampled_lens(x_lens)
        out, attn, conv = self._run(self._chunk, x, *state, out_lens)
        return out, out_lens, StreamingState(attn, conv, state.processed_lens + out.size(1))

    def __call__(self, x: Tensor, x_lens: Tensor, chunk_size: int) -> Tuple[Tensor, ...]:
        """Conformer.forward with full context, chunk_size 0: x (N,T,C), x_lens (N,) -> (N,T',D), (N,)."""
        assert chunk_size == 0, "chunks go through streaming_forward"
        return self._run(self._whole, x, x_lens)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tuple[Tensor, ...]:
        key = module, inputs[0].shape
        if key not in self._graphs:
            with warnings.catch_warnings():
                # Sizes become constants of the trace, which is for one shape.
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                graph = torch.jit.freeze(torch.jit.trace(module, inputs, check_trace=False))
            for _ in range(_RUNS_UNTIL_OPTIMISED):
                graph(*inputs)
            self._graphs[key] = graph
        return self._graphs[key](*inputs)


class _Call(nn.Module):
    """call(encoder, *inputs) as a module, which is what TorchScript can freeze."""

    def __init__(self, encoder: Conformer, call: Callable[..., Tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.encoder, self.call = encoder, call

    def forward(self, *inputs: Tensor) -> Tuple[Tensor, ...]:
        return self.call(self.encoder, *inputs)


def _whole(encoder: Conformer, x: Tensor, x_lens: Tensor) -> Tuple[Tensor, ...]:
    return encoder(x, x_lens, 0)


def measure(
    encoders: Mapping[Any, Mapping[str, Any]],
    audio_s: float,
    repeats: int,
    clock: Clock = time.perf_counter,
) -> Dict[Any, Dict[str, Timing]]:
    """encoders: {whose: {"streaming" | "offline": Conformer or FrozenEncoder, which streams in chunks of its
    cfg.chunk_size}}, the reference first. Each is given `audio_s` seconds `repeats` times, and once
    before that.
    """
    turns = [(who, mode) for who, modes in encoders.items() for mode in modes]
    seconds: Dict[Tuple[Any, str], List[List[float]]] = {turn: [] for turn in turns}
    for number in progress(range(repeats + 1), desc="turns"):
        for who, mode in turns:
            encoder = encoders[who][mode]
            spent = _PASSES[mode](encoder, _features(audio_s, encoder.cfg.feature_dim), clock)
            if number > 0:
                seconds[who, mode].append(spent)
    found = {turn: _summarised(turn[1], spent, audio_s) for turn, spent in seconds.items()}
    reference = turns[0][0]
    for (who, mode), timing in found.items():
        of_reference = found.get((reference, mode))
        if of_reference:
            found[who, mode] = dataclasses.replace(timing, times_faster=of_reference.rtf / timing.rtf)
    return {who: {mode: found[who, mode] for mode in modes} for who, modes in encoders.items()}


@torch.inference_mode()
def _streaming_pass(encoder: Any, x: torch.Tensor, clock: Clock) -> List[float]:
    """x (1,T,C) -> seconds of each chunk."""
    seconds, state = [], encoder.streaming_init(1, x.device)
    for chunk, lens in chunks(x, torch.tensor([x.size(1)]), encoder.cfg.chunk_size):
        start = clock()
        _, _, state = encoder.streaming_forward(chunk, lens, state)
        seconds.append(clock() - start)
    return seconds


@torch.inference_mode()
def _offline_pass(encoder: Any, x: torch.Tensor, clock: Clock) -> List[float]:
    """x (1,T,C) -> seconds of all of it, with full context."""
    start = clock()
    encoder(x, torch.tensor([x.size(1)]), 0)
    return [clock() - start]


_PASSES = {"streaming": _streaming_pass, "offline": _offline_pass}


def _features(audio_s: float, num_bins: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randn(1, round(audio_s / FRAME_SHIFT_S), num_bins, generator=generator)


def _summarised(mode: str, seconds: List[List[float]], audio_s: float) -> Timing:
    """seconds: of each turn those of its chunks, or of the whole."""
    rtf = float(np.median([sum(turn) for turn in seconds])) / audio_s
    if mode == "offline":
        return Timing(rtf)
    middle, p95 = np.median(1000 * np.percentile(seconds, [50, 95], axis=1), axis=1).tolist()
    return Timing(rtf, middle, p95)


def table(timings: Mapping[str, Mapping[str, Timing]]) -> str:
    """For the terminal: a line for each phase and mode."""
    width = max(len(name) for name in timings)
    first = next(iter(timings))
    lines = [f"{'phase':{width}}  {'mode':9}      RTF  ms a chunk (p95)  times faster than {first}"]
    for name, modes in timings.items():
        for mode, t in modes.items():
            chunk = "-" if t.chunk_ms_median is None else f"{t.chunk_ms_median:.2f} ({t.chunk_ms_p95:.2f})"
            faster = "-" if t.times_faster is None else f"{t.times_faster:.2f}"
            lines.append(f"{name:{width}}  {mode:9}  {t.rtf:.5f}  {chunk:>16}  {faster:>12}")
    return "\n".join(lines)
