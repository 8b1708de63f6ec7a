"""How much memory a stream takes, and whether memory or latency grow as it goes on.

Memory is that of a process of its own that hears audio piece by piece, as a microphone gives it, begins anew
at pauses, and reads it piece by piece from a file of raw 16-bit samples:

  python -m transducer_kd.export.memory MODEL_DIR PRECISION PCM_FILE

No torch here, nor in what is imported: it would be most of the memory of that process.

S samples in [-1, 1] at 16 kHz.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np

from transducer_kd.export.folder import PRECISIONS, open_folder
from transducer_kd.export.sherpa import PAUSE_S, SAMPLING_RATE
from transducer_kd.export.timed import Candidate, latency_percentiles
from transducer_kd.log import UserError, atomic_write, run_main

MINUTE = 60 * SAMPLING_RATE

_MODULE = "transducer_kd.export.memory"
_PCM_SCALE = 32768
_STATUS = Path("/proc/self/status")
_PROJECT = Path(__file__).resolve().parents[2]


def measure(folder: Path, precision: str, pcm: Path) -> Dict[str, Any]:
    """What `hear_file` finds in a fresh process. UserError where that fails."""
    paths = [str(_PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", _MODULE, str(folder), precision, str(pcm)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"{folder}: the process that measures the memory of {precision} ended with status "
            f"{done.returncode} ({said[0]}); see it with python -m {_MODULE} {folder} {precision} PCM_FILE"
        )
    return json.loads(done.stdout)


def hear_file(folder: Path, precision: str, pcm: Path) -> Dict[str, Any]:
    """Decode raw audio in this process.

    Returns baseline_mb (resident before the model is opened: Python and libraries), peak_mb (the most that
    was ever resident, baseline included) and first_minute and last_minute of a stream: resident_mb at its
    end, chunk_ms_median, chunk_ms_p95. They are None for what does not stream, or not for two full minutes.
    """
    opened = open_folder(folder)
    baseline = memory_mb("VmRSS")
    candidate = Candidate(opened, precision, PAUSE_S)
    heard = candidate.hear(read_pcm(pcm, candidate.piece_samples))
    pieces_a_minute, minutes = MINUTE // candidate.piece_samples, []
    while True:
        # Summed up minute by minute: what is kept of every piece would be memory that grows.
        minute = list(itertools.islice(heard, pieces_a_minute))
        if len(minute) < pieces_a_minute:
            break
        median, p95 = latency_percentiles(minute)
        minutes.append({"resident_mb": memory_mb("VmRSS"), "chunk_ms_median": median, "chunk_ms_p95": p95})
    is_long = candidate.mode == "streaming" and len(minutes) > 1
    return {
        "baseline_mb": baseline,
        "peak_mb": memory_mb("VmHWM"),
        "first_minute": minutes[0] if is_long else None,
        "last_minute": minutes[-1] if is_long else None,
    }


def memory_mb(key: str) -> float:
    """Of this process, in units of 1e6 bytes. VmRSS: resident now; VmHWM: the most that ever was.

    UserError where there is no /proc.
    """
    # getrusage would do everywhere, but its peak is that of the parent where that was larger as it forked.
    try:
        lines = _STATUS.read_text().splitlines()
    except FileNotFoundError:
        raise UserError(f"{_STATUS} does not exist: measure memory on Linux") from None
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith(f"{key}:"))
    return int(kilobytes) * 1024 / 1e6


def write_pcm(path: Path, samples: np.ndarray) -> None:
    """Samples (S,) as raw 16-bit little-endian."""
    with atomic_write(path, "wb") as f:
        f.write(np.clip(_PCM_SCALE * samples, -_PCM_SCALE, _PCM_SCALE - 1).astype("<i2").tobytes())


def read_pcm(path: Path, piece_samples: int) -> Iterator[np.ndarray]:
    """Its samples, piece by piece (S,): never all of them in memory."""
    with open(path, "rb") as f:
        while data := f.read(2 * piece_samples):
            yield np.frombuffer(data, dtype="<i2").astype(np.float32) / _PCM_SCALE


def main(argv: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="MODEL_DIR")
    parser.add_argument("precision", choices=PRECISIONS)
    parser.add_argument("pcm", type=Path, metavar="PCM_FILE", help="raw 16-bit little-endian, 16 kHz, mono")
    args = parser.parse_args(argv)
    if not args.pcm.is_file():
        raise UserError(f"there is no file {args.pcm}")
    json.dump(hear_file(args.folder, args.precision, args.pcm), sys.stdout)
    return 0


if __name__ == "__main__":
    run_main(main)
