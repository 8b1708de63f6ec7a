"""From cuts to a Batch: features read from disk or computed on the fly, noise and silence mixed in, texts
tokenised.

T feature frames, C mel bins, S samples.
"""

import math
import random
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from lhotse.cut import Cut

from transducer_kd.data.batch import Batch, collate
from transducer_kd.data.features import SAMPLING_RATE, FeatureExtractor, num_frames
from transducer_kd.data.joining import PairJoiner, in_pairs
from transducer_kd.data.silence import SilenceMixer
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.log import UserError


def cut_frames(cut: Cut) -> int:
    """T of a cut, without reading it."""
    return cut.num_frames if cut.has_features else num_frames(cut.num_samples)


def cut_text(cut: Cut) -> str:
    """The transcript of a cut; empty where there is none."""
    return (cut.supervisions[0].text or "") if cut.supervisions else ""


def is_pseudo_labelled(cut: Cut) -> bool:
    """Whether the transcript of a cut is a teacher's: local/pseudo_label.py marks those it makes."""
    return bool(cut.custom) and "teacher_sha256" in cut.custom


class NoiseMixer:
    """Adds a piece of a random noise to a share of the utterances, at a random signal-to-noise ratio."""

    def __init__(self, noises: Sequence[Cut], prob: float, snr_db: Sequence[float]):
        self.noises, self.prob, self.snr_db = noises, prob, snr_db

    def __call__(self, speech: np.ndarray, rng: random.Random) -> np.ndarray:
        """speech (S,) -> (S,); `rng` alone decides what is added."""
        if rng.random() >= self.prob:
            return speech
        noise = self.noises[rng.randrange(len(self.noises))]
        length_s = len(speech) / SAMPLING_RATE
        if noise.duration > length_s:
            noise = noise.truncate(offset=rng.uniform(0.0, noise.duration - length_s), duration=length_s)
        samples = load_audio(noise)
        samples = np.resize(samples, len(speech))  # repeats a noise that is too short
        return mix_at_snr(speech, samples, rng.uniform(*self.snr_db))


def mix_at_snr(speech: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """speech + gain * noise, both (S,), in the power ratio `snr_db`. Silence is left alone."""
    speech_power, noise_power = float(np.mean(speech**2)), float(np.mean(noise**2))
    if speech_power <= 0.0 or noise_power <= 0.0:
        return speech
    gain = math.sqrt(speech_power / noise_power * 10.0 ** (-snr_db / 10.0))
    return (speech + gain * noise).astype(np.float32)


def load_audio(cut: Cut) -> np.ndarray:
    """Samples (S,) float32 of a cut. UserError naming the cut and its file when they cannot be read."""
    try:
        samples = cut.load_audio()
    except Exception as e:  # lhotse and libsndfile raise many kinds
        source = cut.recording.sources[0].source if cut.has_recording else "no recording"
        raise UserError(
            f"cut {cut.id}: cannot read its audio {source} ({_first_line(e)}); mend the file, or leave it "
            "out with local/prepare_manifests.py --bad-audio skip"
        ) from None
    return np.asarray(samples, dtype=np.float32).reshape(-1)


class CutDataset(torch.utils.data.Dataset):
    """Map-style: from (index of the batch, its cuts) to a Batch, or to the UserError that stopped it.

    The error travels as a value because DataLoader would wrap one raised in a worker into a page of
    traceback. Noise and silence depend on (seed_text, index) alone, so any number of workers gives the same
    batches.
    read_soft: from a pseudo-labelled cut to its teacher's encoder output (T',D), where that is asked for.
    joiner: joins the utterances of some batches in pairs, of none that has pseudo-labelled ones.
    silence: adds an utterance without words to some batches, and silence around the others' words, though not
    to those whose stored teacher output would no longer fit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        extractor: Optional[FeatureExtractor] = None,
        mixer: Optional[NoiseMixer] = None,
        seed_text: str = "",
        read_soft: Optional[Callable[[Cut], np.ndarray]] = None,
        silence: Optional[SilenceMixer] = None,
        joiner: Optional[PairJoiner] = None,
    ):
        self.tokenizer, self.extractor, self.mixer, self.seed_text = tokenizer, extractor, mixer, seed_text
        self.read_soft, self.silence, self.joiner = read_soft, silence, joiner

    def __getitem__(self, item: Tuple[int, Sequence[Cut]]) -> Union[Batch, UserError]:
        index, cuts = item
        rng = random.Random(f"{self.seed_text}/{index}")
        is_pseudo = [is_pseudo_labelled(cut) for cut in cuts]
        teacher_out: List[Optional[np.ndarray]] = [None] * len(cuts)
        try:
            features = [self._features(cut, rng) for cut in cuts]
            if self.read_soft is not None:
                teacher_out = [
                    self.read_soft(cut) if pseudo else None for cut, pseudo in zip(cuts, is_pseudo)
                ]
        except UserError as e:
            return e
        texts, ids = [cut_text(cut) for cut in cuts], [cut.id for cut in cuts]
        if self.joiner is not None and not any(is_pseudo) and self.joiner.is_due(features, rng):
            features = self.joiner(features, rng)
            texts, ids = in_pairs(texts, " "), in_pairs(ids, "+")
            is_pseudo, teacher_out = is_pseudo[: len(ids)], teacher_out[: len(ids)]
        tokens = self.tokenizer.encode(texts)
        if self.silence is not None and self.silence.is_due(rng):
            features = self.silence(features, [stored is None for stored in teacher_out], rng)
            # The utterance without words is the last one.
            ids.append(f"silence-{index}")
            texts.append("")
            tokens.append([])
            is_pseudo.append(False)
            teacher_out.append(None)
        return collate(features, tokens, ids, texts, is_pseudo, teacher_out)

    def _features(self, cut: Cut, rng: random.Random) -> np.ndarray:
        if self.extractor is None:
            return load_features(cut)
        samples = load_audio(cut)
        if self.mixer is not None:
            samples = self.mixer(samples, rng)
        return self.extractor.extract(samples)


def load_features(cut: Cut) -> np.ndarray:
    """Stored features (T,C) float32 of a cut. UserError naming the cut when they cannot be read."""
    try:
        return cut.load_features()
    except Exception as e:  # other storage types of ready-made manifests have other ones
        where = cut.features.storage_path
        raise UserError(
            f"cut {cut.id}: cannot read its features in {where} ({_first_line(e)}); delete "
            f"{Path(where).parent} and run local/compute_fbank.py again"
        ) from None


def batches_by_duration(cuts: Sequence[Cut], max_duration_s: float, seed_text: str = "") -> List[List[Cut]]:
    """Every cut exactly once, in batches of similar length and at most `max_duration_s` with padding.

    The order of the batches is shuffled, always in the same way: the first ones are then a fair sample.
    """
    batches: List[List[Cut]] = []
    for cut in sorted(cuts, key=lambda c: (-c.duration, c.id)):  # the first of a batch is its longest
        if batches and batches[-1][0].duration * (len(batches[-1]) + 1) <= max_duration_s:
            batches[-1].append(cut)
        else:
            batches.append([cut])
    random.Random(f"batches/{seed_text}").shuffle(batches)
    return batches


def _first_line(error: Exception) -> str:
    # lhotse appends a dump of its objects to the message of what it catches.
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]
