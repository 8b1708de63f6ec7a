"""A room and a noise for the synthetic corpus: what lies between a dry voice and a microphone.

Deliberately simple, because the corpus only has to be hard in the way real recordings are (reverberation
smears, noise masks), not to sound like a particular place: sparse early reflections and an exponentially
decaying diffuse tail (Polack's statistical model of a room), and Gaussian noise with a spectrum of
1/f^exponent.

Shapes: S samples, K taps, both at `SAMPLE_RATE`.
"""

import numpy as np
from scipy import fft, signal

SAMPLE_RATE = 16000

_EARLY_REFLECTIONS = 6
_EARLY_MS = (2.0, 40.0)
_DIRECT_TO_TAIL_DB = (4.0, 14.0)
_MIN_NOISE_HZ = 40.0  # below it 1/f noise would hold nearly all its energy where no speech is
_LEVEL_DBFS = (-30.0, -18.0)
_SILENCE_S = (0.05, 0.3)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """(S,) samples at `rate` Hz -> (S',) float64 at SAMPLE_RATE."""
    divisor = int(np.gcd(rate, SAMPLE_RATE))
    return signal.resample_poly(samples.astype(np.float64), SAMPLE_RATE // divisor, rate // divisor)


def room_response(rng: np.random.Generator, rt60_s: float) -> np.ndarray:
    """Impulse response (K,) of a room whose sound decays by 60 dB in `rt60_s`; the direct sound is 1 at 0."""
    num_taps = max(2, int(rt60_s * SAMPLE_RATE))
    seconds = np.arange(num_taps) / SAMPLE_RATE
    decay = 10.0 ** (-3.0 * seconds / rt60_s)
    tail = rng.standard_normal(num_taps) * decay
    tail[: int(_EARLY_MS[0] * SAMPLE_RATE / 1000)] = 0.0
    tail *= np.sqrt(10.0 ** (-rng.uniform(*_DIRECT_TO_TAIL_DB) / 10) / max(float(np.sum(tail**2)), 1e-12))
    response = tail
    for delay_ms in rng.uniform(*_EARLY_MS, size=_EARLY_REFLECTIONS):
        tap = int(delay_ms * SAMPLE_RATE / 1000)
        if tap < num_taps:
            response[tap] += rng.choice((-1.0, 1.0)) * rng.uniform(0.05, 0.25) * decay[tap]
    response[0] = 1.0
    return response


def coloured_noise(rng: np.random.Generator, num_samples: int, exponent: float) -> np.ndarray:
    """(S,) Gaussian noise of unit power, its spectrum falling as 1/f^exponent (0 white, 1 pink, 2 brown)."""
    length = fft.next_fast_len(max(num_samples, 2), real=True)
    spectrum = fft.rfft(rng.standard_normal(length))
    hertz = fft.rfftfreq(length, 1.0 / SAMPLE_RATE)
    spectrum *= np.maximum(hertz, _MIN_NOISE_HZ) ** (-exponent / 2)
    spectrum[hertz < _MIN_NOISE_HZ] = 0.0
    noise = fft.irfft(spectrum, length)[:num_samples]
    return noise / max(float(np.sqrt(np.mean(noise**2))), 1e-12)


def recorded(
    rng: np.random.Generator, dry: np.ndarray, response: np.ndarray, noise_exponent: float, snr_db: float
) -> np.ndarray:
    """The dry voice (S,) as a microphone in a noisy room hears it: (S',) int16, silence around it."""
    before, after = (int(s * SAMPLE_RATE) for s in rng.uniform(*_SILENCE_S, size=2))
    wet = signal.fftconvolve(np.pad(dry, (before, after)), response)[: before + len(dry) + after]
    # The power of the voice is measured where it speaks, so that padding does not change the SNR.
    voice_power = float(np.mean(wet[before : before + len(dry)] ** 2))
    wet *= 1.0 / np.sqrt(max(voice_power, 1e-12))
    noise = coloured_noise(rng, len(wet), noise_exponent)
    heard = wet + noise * 10.0 ** (-snr_db / 20)
    heard *= 10.0 ** (rng.uniform(*_LEVEL_DBFS) / 20)
    heard *= min(1.0, 0.98 / max(float(np.max(np.abs(heard))), 1e-12))
    return np.round(heard * 32767.0).astype(np.int16)
