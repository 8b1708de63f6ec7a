"""80-bin log-mel features: how they are computed, and how they are kept on disk.

S samples in [-1, 1] at 16 kHz, T = (S + 80) // 160 frames: a 25 ms window every 10 ms, snip_edges=False.

The options are those of sherpa-onnx, which computes its own features on the device with kaldi-native-fbank:
Povey window, pre-emphasis 0.97, 20 Hz to 7,600 Hz, no dither, log floored at float32's epsilon. kaldifeat,
lhotse and kaldi-native-fbank agree on them within 1e-3 (tests/data/test_features.py).

On disk a feature file is the frames of many utterances one after the other in float16, read through a memory
map: about 50,000 audio seconds a second, against 7,000 for lilcom, at an error of at most 0.004 (lilcom:
0.016) and 16 kB for a second of audio (lilcom: 8).
"""

import os
from functools import lru_cache
from typing import Any, Optional

import numpy as np
import torch
from lhotse.features import Fbank, FbankConfig, Features
from lhotse.features.io import FeaturesReader, register_reader

from transducer_kd.data.batch import FRAME_SHIFT_S
from transducer_kd.log import UserError

SAMPLING_RATE = 16000
FEATURE_DIM = 80
BYTES_PER_AUDIO_S = 2 * FEATURE_DIM / FRAME_SHIFT_S
LOW_FREQ_HZ = 20.0
HIGH_FREQ_HZ = -400.0  # below the Nyquist frequency
STORAGE_TYPE = "float16_frames"
BACKENDS = ("auto", "kaldifeat", "lhotse")


def num_frames(num_samples: int) -> int:
    """T of S samples."""
    shift = round(SAMPLING_RATE * FRAME_SHIFT_S)
    return (num_samples + shift // 2) // shift


class FeatureExtractor:
    """backend kaldifeat or lhotse; auto takes kaldifeat where it imports. Both give the same within 1e-3."""

    def __init__(self, backend: str = "auto"):
        if backend not in BACKENDS:
            raise UserError(f"feature backend {backend!r} is not one of {', '.join(BACKENDS)}")
        kaldifeat = _import_kaldifeat() if backend != "lhotse" else None
        if kaldifeat is None and backend == "kaldifeat":
            raise UserError(
                "kaldifeat is not installed here; use --feature-backend lhotse, or build it with "
                "tools/setup.sh"
            )
        self.backend = "kaldifeat" if kaldifeat is not None else "lhotse"
        self._compute = _kaldifeat_fbank(kaldifeat) if kaldifeat is not None else _lhotse_fbank()

    def extract(self, samples: Any, sampling_rate: int = SAMPLING_RATE) -> np.ndarray:
        """samples (S,) or (1,S), numpy or torch -> (T,80) float32. UserError for another sampling rate."""
        if sampling_rate != SAMPLING_RATE:
            raise UserError(
                f"features are computed at {SAMPLING_RATE} Hz, not {sampling_rate} Hz; resample the audio"
            )
        wave = torch.as_tensor(samples, dtype=torch.float32).reshape(-1)
        with torch.no_grad():
            return self._compute(wave).numpy()


def _import_kaldifeat() -> Optional[Any]:
    try:
        import kaldifeat
    except (ImportError, OSError):  # OSError: a library built against another torch
        return None
    return kaldifeat


def _kaldifeat_fbank(kaldifeat: Any) -> Any:
    options = kaldifeat.FbankOptions()
    options.frame_opts.samp_freq = SAMPLING_RATE
    options.frame_opts.dither = 0.0
    options.frame_opts.snip_edges = False
    options.mel_opts.num_bins = FEATURE_DIM
    options.mel_opts.low_freq = LOW_FREQ_HZ
    options.mel_opts.high_freq = HIGH_FREQ_HZ
    return kaldifeat.Fbank(options)


def _lhotse_fbank() -> Any:
    config = FbankConfig(
        sampling_rate=SAMPLING_RATE,
        num_filters=FEATURE_DIM,
        low_freq=LOW_FREQ_HZ,
        high_freq=HIGH_FREQ_HZ,
        dither=0.0,
        snip_edges=False,
    )
    fbank = Fbank(config)
    return lambda wave: fbank.extract(wave, SAMPLING_RATE)


# ---------------------------------------------------------------- storage


class FeatureFileWriter:
    """Appends (T,80) matrices to an open binary file as float16 and describes each in a lhotse manifest.

    `path` is where manifests say the file is; a relative one is relative to the folder of the cuts.
    """

    def __init__(self, file: Any, path: str):
        self.file, self.path, self.position = file, path, 0

    def write(self, matrix: np.ndarray, recording_id: str, start_s: float, duration_s: float) -> Features:
        """Store the features of one utterance and return what the manifest says of them."""
        self.file.write(np.ascontiguousarray(matrix, dtype=np.float16).tobytes())
        key = f"{self.position},{len(matrix)}"
        self.position += len(matrix)
        return Features(
            type="kaldi-fbank",
            num_frames=len(matrix),
            num_features=matrix.shape[1],
            frame_shift=FRAME_SHIFT_S,
            sampling_rate=SAMPLING_RATE,
            start=start_s,
            duration=duration_s,
            storage_type=STORAGE_TYPE,
            storage_path=self.path,
            storage_key=key,
            recording_id=recording_id,
            channels=0,
        )


@register_reader
class FeatureFileReader(FeaturesReader):
    """What lhotse calls to load features written by FeatureFileWriter."""

    name = STORAGE_TYPE

    def __init__(self, storage_path: str, *args: Any, **kwargs: Any):
        super().__init__()
        self.storage_path = storage_path

    def read(
        self, key: str, left_offset_frames: int = 0, right_offset_frames: Optional[int] = None
    ) -> np.ndarray:
        """(T,80) float32, or the frames [left, right) of it."""
        position, frames = (int(number) for number in key.split(","))
        left, right, _ = slice(left_offset_frames, right_offset_frames).indices(frames)
        return read_frames(self.storage_path, position + left, right - left)


def read_frames(path: str, position: int, frames: int) -> np.ndarray:
    """Rows from `position` on of a feature file, (frames,80) float32. OSError or ValueError when damaged."""
    status = os.stat(path)
    matrix = _open_frames(str(path), status.st_mtime_ns, status.st_size)[position : position + frames]
    if len(matrix) != frames:
        raise OSError("the file is truncated")
    return matrix.astype(np.float32)


@lru_cache(maxsize=512)
def _open_frames(path: str, mtime_ns: int, size: int) -> np.ndarray:
    # Time and size are part of the cache's key: a file that was written anew is opened anew.
    return np.memmap(path, dtype=np.float16, mode="r").reshape(-1, FEATURE_DIM)
