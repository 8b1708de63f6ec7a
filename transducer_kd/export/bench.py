"""Model folders beside each other: how fast they are on one thread, how large, how much memory they take.

All of them, float and int8, are measured in one run in sherpa-onnx. They take turns, since what else the
machine does then slows them all; a time is the median over turns, and how many times faster a model is than
the reference is the median of the ratios within a turn.

Speed is that on utterances, each of which is a stream of its own; memory that of one long stream in which
pauses lie between them. A stream that goes on from utterance to utterance would say hardly a word after the
first (sherpa.UtteranceStream), and its search would have nothing to do.

S samples in [-1, 1] at 16 kHz.
"""

import dataclasses
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import sherpa_onnx

from transducer_kd.export import memory
from transducer_kd.export.folder import ModelFolder
from transducer_kd.export.sherpa import SAMPLING_RATE
from transducer_kd.export.timed import CPU_TIME, Candidate, Clock, Heard, latency_percentiles
from transducer_kd.log import UserError, progress

GAP_S = 1.5  # of silence between the utterances of a long stream; more than sherpa.PAUSE_S by a chunk
RUNTIME = f"sherpa-onnx {sherpa_onnx.__version__}"
REFERENCE_PRECISION = "float"

Pair = Tuple[str, str]  # phase, precision


@dataclass(frozen=True)
class Row:
    """Of a phase in one precision. rtf: seconds for a second of audio. None for what only a stream has."""

    phase: str
    precision: str
    mode: str
    bytes: int  # of encoder, decoder and joiner
    times_smaller: float  # than the reference
    rtf: float  # features and model
    rtf_model: float
    rtf_features: float
    times_faster: float
    times_faster_model: float
    chunk_ms_median: Optional[float]  # from the arrival of a chunk's last samples to its words
    chunk_ms_p95: Optional[float]
    baseline_mb: float  # what follows: see memory.hear_file
    peak_mb: float
    first_minute: Optional[Dict[str, float]]
    last_minute: Optional[Dict[str, float]]


@dataclass(frozen=True)
class Amounts:
    """How much is measured. Utterances are repeated to be as long."""

    audio_s: float = 60.0  # of a turn, at least: utterances are whole
    turns: int = 25  # that count; there is one before them
    stream_s: float = 300.0  # of a process for the memory
    streams: int = 3  # such processes of every model


def measure(
    folders: Mapping[str, ModelFolder],
    speech: Sequence[np.ndarray],
    amounts: Amounts,
    clock: Clock = CPU_TIME,
) -> List[Row]:
    """folders: {phase: its model folder}, the reference first; speech: utterances (S,). Rows in that order,
    float first.

    UserError where the reference has no float files.
    """
    pairs = [(phase, precision) for phase, folder in folders.items() for precision in folder.precisions]
    reference = next(iter(folders)), REFERENCE_PRECISION
    if reference not in pairs:
        raise UserError(
            f"{folders[reference[0]].path} has no {REFERENCE_PRECISION} files, with which all others are "
            "compared; export the phase again (local/export.py)"
        )
    candidates = {(phase, precision): Candidate(folders[phase], precision) for phase, precision in pairs}
    utterances = _repeated(speech, amounts.audio_s)
    audio_s = sum(map(len, utterances)) / SAMPLING_RATE
    heard = _in_turns(candidates, utterances, amounts.turns, clock)
    memory_of = _memory_in_turns(folders, pairs, _joined(speech, amounts.stream_s), amounts.streams)
    bytes_of = {pair: folders[pair[0]].bytes(candidates[pair].mode, pair[1]) for pair in pairs}
    seconds = {pair: _seconds(turns) for pair, turns in heard.items()}
    rows = []
    for pair in pairs:
        rtf = np.median(seconds[pair], axis=0) / audio_s
        faster = np.median(seconds[reference] / seconds[pair], axis=0)
        is_stream = candidates[pair].mode == "streaming"
        rows.append(
            Row(
                *pair,
                candidates[pair].mode,
                bytes_of[pair],
                bytes_of[reference] / bytes_of[pair],
                *rtf.tolist(),
                *faster[:2].tolist(),
                *(_latency_ms(heard[pair]) if is_stream else (None, None)),
                **memory_of[pair],
            )
        )
    return rows


def _repeated(speech: Sequence[np.ndarray], seconds: float) -> List[np.ndarray]:
    """Utterances (S,) of at least so many seconds in all."""
    found, left = [], seconds * SAMPLING_RATE
    for utterance in itertools.cycle(speech):
        found.append(np.asarray(utterance, dtype=np.float32))
        left -= len(utterance)
        if left <= 0:
            return found


def _joined(speech: Sequence[np.ndarray], seconds: float) -> np.ndarray:
    """So many seconds (S,) of utterances with pauses between them."""
    gap = np.zeros(round(GAP_S * SAMPLING_RATE), dtype=np.float32)
    return np.resize(np.concatenate([x for u in speech for x in (u, gap)]), round(seconds * SAMPLING_RATE))


def _in_turns(
    candidates: Mapping[Pair, Candidate], utterances: Sequence[np.ndarray], turns: int, clock: Clock
) -> Dict[Pair, List[List[Heard]]]:
    """What each of them heard in each turn that counts."""
    heard: Dict[Pair, List[List[Heard]]] = {pair: [] for pair in candidates}
    for number in progress(range(turns + 1), desc="turns"):
        for pair, candidate in candidates.items():
            found: List[Heard] = []
            for samples in utterances:
                size = candidate.piece_samples if candidate.mode == "streaming" else len(samples)
                found += candidate.hear(_pieces(samples, size), clock)
            if number > 0:
                heard[pair].append(found)
    return heard


def _pieces(samples: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (samples[start : start + size] for start in range(0, len(samples), size))


def _seconds(turns: List[List[Heard]]) -> np.ndarray:
    """(turns, 3): seconds of everything, of the model, of the features."""
    features = np.array([sum(heard.features_s for heard in turn) for turn in turns])
    model = np.array([sum(sum(heard.chunks_s) for heard in turn) for turn in turns])
    return np.stack([features + model, model, features], axis=1)


def _latency_ms(turns: List[List[Heard]]) -> List[float]:
    """Medians over turns of the median and of the 95th percentile within a turn."""
    return np.median([latency_percentiles(turn) for turn in turns], axis=0).tolist()


def _memory_in_turns(
    folders: Mapping[str, ModelFolder], pairs: List[Pair], samples: np.ndarray, streams: int
) -> Dict[Pair, Dict[str, Any]]:
    """Of each pair the medians over its processes."""
    found: Dict[Pair, List[Dict[str, Any]]] = {pair: [] for pair in pairs}
    with tempfile.TemporaryDirectory() as scratch:
        pcm = Path(scratch) / "audio.pcm"
        memory.write_pcm(pcm, samples)
        for _ in progress(range(streams), desc="streams"):
            for phase, precision in pairs:
                found[phase, precision].append(memory.measure(folders[phase].path, precision, pcm))
    return {pair: _medians(of_processes) for pair, of_processes in found.items()}


def _medians(found: List[Any]) -> Any:
    """Of numbers; of dictionaries with the same keys, key by key; None of None."""
    if isinstance(found[0], dict):
        return {key: _medians([one[key] for one in found]) for key in found[0]}
    return None if found[0] is None else float(np.median(found))


# ---------------------------------------------------------------- what is shown


def as_json(rows: List[Row], phase: str) -> List[Dict[str, Any]]:
    """The rows of one phase, for bench.json."""
    return [dataclasses.asdict(row) for row in rows if row.phase == phase]


def table(rows: List[Row]) -> str:
    """For the terminal: a line for each phase and precision."""
    cells = [
        ["phase", "files", "mode", "MB", "smaller", "RTF", "faster", "model alone", "faster"]
        + ["ms a chunk (p95)", "peak MB", "of it Python", "last minute - first"]
    ]
    for row in rows:
        sizes = [f"{row.bytes / 1e6:.2f}", f"{row.times_smaller:.2f}"]
        speeds = [f"{row.rtf:.5f}", f"{row.times_faster:.2f}"]
        speeds += [f"{row.rtf_model:.5f}", f"{row.times_faster_model:.2f}"]
        memory_mb = [f"{row.peak_mb:.1f}", f"{row.baseline_mb:.1f}"]
        latency, growth = "-", "-"
        if row.chunk_ms_median is not None:
            latency = f"{row.chunk_ms_median:.2f} ({row.chunk_ms_p95:.2f})"
        if row.first_minute and row.last_minute:
            mb, ms = (row.last_minute[k] - row.first_minute[k] for k in ("resident_mb", "chunk_ms_median"))
            growth = f"{mb:+.1f} MB, {ms:+.2f} ms"
        cells.append([row.phase, row.precision, row.mode, *sizes, *speeds, latency, *memory_mb, growth])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(cell.ljust(width) if i < 3 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths)) for line in cells)
    )
