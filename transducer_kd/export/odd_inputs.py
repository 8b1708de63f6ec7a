"""Inputs of odd lengths and loudness, on which every implementation of a model has to say the same words.

S samples in [-1, 1] at 16 kHz.
"""

from typing import Dict

import numpy as np

from transducer_kd.export.sherpa import FRAME_SAMPLES, LOOKAHEAD_FRAMES, SAMPLING_RATE, SUBSAMPLING_FACTOR

WITHOUT_SPEECH = ("silence", "quiet noise")

_OFFLINE_CHUNK = 16  # encoder frames: what counts as a chunk for a model that has none
_NUM_CHUNKS = 3
_TOO_LOUD = 2.0  # 6 dB
_NOISE_LEVEL = 1e-3  # -60 dB
_SILENCE_S = 2.0
_CUT_S = (0.5, 1.0)


def odd_inputs(speech: np.ndarray, chunk_size: int) -> Dict[str, np.ndarray]:
    """What is done to `speech` (S,) -> its samples. chunk_size: encoder frames; 0: the model has no chunks.

    Those of a chunk begin a quarter into the recording, where somebody speaks; a recording that is too short
    is repeated. "exactly a chunk" is what an encoder needs for its first chunk, to the sample.
    """
    chunk = SUBSAMPLING_FACTOR * (chunk_size or _OFFLINE_CHUNK)  # feature frames
    first = FRAME_SAMPLES * (chunk + LOOKAHEAD_FRAMES)
    inside = speech[len(speech) // 4 :]

    def piece(num_samples: int) -> np.ndarray:
        return np.resize(inside, num_samples)

    silence = np.zeros(round(_SILENCE_S * SAMPLING_RATE), dtype=np.float32)
    noise = _NOISE_LEVEL * np.random.default_rng(0).standard_normal(len(silence))
    return {
        "one frame": piece(FRAME_SAMPLES),
        "half a chunk": piece(first // 2),
        "a sample less than a chunk": piece(first - 1),
        "exactly a chunk": piece(first),
        "a sample more than a chunk": piece(first + 1),
        "a frame more than a chunk": piece(first + FRAME_SAMPLES),
        f"exactly {_NUM_CHUNKS} chunks": piece(first + (_NUM_CHUNKS - 1) * chunk * FRAME_SAMPLES),
        "silence": silence,
        "quiet noise": noise.astype(np.float32),
        "clipped": np.clip(_TOO_LOUD * speech / max(np.abs(speech).max(), 1e-9), -1, 1).astype(np.float32),
        "silence before and after": np.concatenate([silence, speech, silence]),
        **{f"cut at {s:g} s": speech[: round(s * SAMPLING_RATE)] for s in _CUT_S},
    }
