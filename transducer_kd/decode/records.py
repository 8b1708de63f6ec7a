"""metrics.json: what every decoding of a phase found, the material of all reports.

A JSON list with one record per (phase, mode, test_set, method); decoding again replaces the record.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional

from transducer_kd.log import UserError, write_json

_KEY = ("phase", "mode", "test_set", "method")


@dataclass
class Record:
    """One test set decoded by one method with one model."""

    recipe: str
    corpus: str
    scale: str
    phase: str
    mode: str  # offline: full context; streaming: chunk mask or chunk by chunk
    chunk_size: int  # encoder frames (40 ms); 0 offline
    left_context: int  # encoder frames; of streaming mode
    checkpoint: str  # which weights: "epoch-7-avg-2-use-averaged-model"
    # What this mode stores of encoder, decoder and joiner, and of the LAS where the method has a second pass:
    # without what a supernet leaves out when it streams.
    params_deployed: int
    bytes: int  # of these as float32, and index_bytes; quantised files are smaller
    index_bytes: int  # of what says where the values of sparse matrices stand
    params_dense: int  # as params_deployed, with nothing left out
    params_layers: int  # of params_dense, in the encoder's layers: elsewhere nothing can be left out
    test_set: str
    num_utts: int
    method: str
    parameters: Dict[str, Any]  # of the method: beam_size, num_paths, mu, ...
    recogs: str  # file with references and hypotheses, relative to the folder of metrics.json
    wer: float  # per cent
    wer_low: float  # 95% bootstrap interval over utterances, per cent
    wer_high: float
    errors: int
    insertions: int
    deletions: int
    substitutions: int
    ref_words: int
    audio_s: float  # seconds of audio in the test set
    decode_s: (
        float  # encoder (in each method's, though it ran once for all) and search; no reading, no scoring
    )
    device: str
    num_threads: int  # torch's, for one operation on a CPU
    commit: str  # of the code that decoded
    command: str
    second_pass_s: Optional[float] = None  # part of decode_s spent in a second pass; None without one


def append_record(path: Path, record: Record) -> None:
    """Add `record` to the list in `path` in place of one with its key, atomically. Raises as read_records."""
    new = dataclasses.asdict(record)
    for name, value in new.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"record field {name} is {value}: JSON has no such number")
    kept = [r for r in read_records(path) if any(r.get(k) != new[k] for k in _KEY)]
    write_json(path, kept + [new])


def read_records(path: Path) -> List[Dict[str, Any]]:
    """The records in `path`, oldest first; none where there is no file. UserError where it is damaged."""
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except ValueError:
        raise UserError(f"{path} is not valid JSON; move it away and decode again") from None
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise UserError(f"{path} is not a list of records; move it away and decode again")
    return records
