"""Speaking text with espeak-ng through ctypes: the voice of the synthetic corpus.

The library comes from the `espeakng-loader` package, which carries libespeak-ng and its data, so nothing has
to be installed on the system. Two of its habits shape this module and its callers:

- its state is global and never reset: one process holds one synthesiser, and a text spoken twice in a process
  gives different samples, while the same sequence of calls in a fresh process gives the same ones. Whoever
  wants reproducible audio therefore speaks one fixed list of texts per process.
- an unknown variant (the part after `+` in `en-us+f3`) is silently replaced by the plain voice, so voices and
  variants are checked against the data folder first.

Shapes: S samples at 22,050 Hz.
"""

import ctypes
import os
from pathlib import Path
from typing import List, Optional

import numpy as np

from transducer_kd.log import UserError

SAMPLE_RATE = 22050

_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000  # otherwise the library ends the whole process when its data are missing
_CHARS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_RANDOM_SEED = 1
_MAX_PATH = 150  # libespeak-ng keeps its data folder in a buffer of 160 bytes and truncates silently

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_is_taken = False  # this process already has its synthesiser


class Espeak:
    """The one synthesiser of this process.

    Args:
      voice: an espeak voice with an optional variant, e.g. `en-gb-scotland+f2`.
    Raises UserError when the package or its data are missing, or the voice or the variant does not exist, and
    RuntimeError when the process already holds a synthesiser.
    """

    def __init__(self, voice: str) -> None:
        global _is_taken
        if _is_taken:
            raise RuntimeError("espeak keeps global state: start a fresh process for every synthesiser")
        data_path = find_data()
        check_voice(voice, data_path)
        _is_taken = True
        self._lib = ctypes.CDLL(_loader().get_library_path())
        rate = self._lib.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, str(data_path).encode(), _INITIALIZE_DONT_EXIT
        )
        if rate != SAMPLE_RATE:
            raise UserError(
                f"espeak-ng could not start with its data in {data_path} (answer {rate}); reinstall it"
            )
        # Breath is noise from a generator that starts from the clock.
        self._lib.espeak_ng_SetRandSeed(ctypes.c_long(_RANDOM_SEED))
        self._chunks: List[np.ndarray] = []
        self._callback = _Callback(self._receive)  # kept here: the library stores only the pointer
        self._lib.espeak_SetSynthCallback(self._callback)
        if self._lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng refuses the voice {voice}")
        self.voice = voice

    def speak(self, text: str, rate_wpm: int, pitch: int) -> np.ndarray:
        """Speak `text` at about `rate_wpm` words a minute (80-450) and `pitch` (0-99, 50 is the voice's own).

        Returns (S,) int16 at SAMPLE_RATE.
        """
        self._chunks = []
        self._lib.espeak_SetParameter(_PARAMETER_RATE, rate_wpm, 0)
        self._lib.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        data = text.encode("utf-8")
        status = self._lib.espeak_Synth(
            data, ctypes.c_size_t(len(data) + 1), 0, 0, 0, _CHARS_UTF8, None, None
        )
        if status != 0 or not self._chunks:
            raise UserError(f"espeak-ng ({self.voice}) cannot speak {text!r} (status {status})")
        return np.concatenate(self._chunks)

    def _receive(self, wav, num_samples: int, events) -> int:
        if wav and num_samples > 0:
            # Copied: the library reuses its buffer for the next piece.
            self._chunks.append(np.ctypeslib.as_array(wav, shape=(num_samples,)).copy())
        return 0  # 0: go on


def find_data() -> Path:
    """The folder with espeak-ng's voices. Raises UserError where it is missing or its path is too long."""
    path = Path(_loader().get_data_path())
    if not (path / "phontab").is_file():
        raise UserError(
            f"espeak-ng's data are missing in {path}; run: pip install --force-reinstall espeakng-loader"
        )
    if len(os.fsencode(path)) > _MAX_PATH:
        raise UserError(
            f"espeak-ng cannot use data under a path of more than {_MAX_PATH} bytes: {path}; "
            "make the environment in a folder with a shorter name"
        )
    return path


def check_voice(voice: str, data_path: Optional[Path] = None) -> None:
    """Raise UserError unless `voice` (`name` or `name+variant`) exists in espeak-ng's data folder."""
    data_path = data_path or find_data()
    name, plus, variant = voice.partition("+")
    # The names come from the file names, whose case differs from the usual spelling (en-US, en-GB-x-rp).
    names = sorted(p.name.lower() for p in (data_path / "lang").rglob("*") if p.is_file())
    if name not in names:
        english = ", ".join(n for n in names if n.startswith("en"))
        raise UserError(f"espeak-ng has no voice {name!r}; its English ones are {english}")
    if plus and variant not in {p.name for p in (data_path / "voices" / "!v").iterdir()}:
        raise UserError(
            f"espeak-ng has no variant {variant!r} (asked for as {voice}); see {data_path}/voices/!v"
        )


def _loader():
    try:
        import espeakng_loader
    except ImportError:
        raise UserError("the synthetic corpus needs espeak-ng; run: pip install espeakng-loader") from None
    return espeakng_loader
