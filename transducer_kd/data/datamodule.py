"""Training, validation and test batches of one phase, from the CutSets in `fbank_dir`.

Training batches are a function of (data.seed, epoch) alone: the number of workers changes nothing, and a run
that resumes in the middle of an epoch asks for `start_batch` and gets exactly what it would have got.
Skipping draws cuts without reading audio or features.

T feature frames, T' encoder frames, U tokens.
"""

import contextlib
import hashlib
import itertools
import logging
import random
import re
import signal
import warnings
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from lhotse.cut import Cut
from lhotse.dataset import DynamicBucketingSampler

from transducer_kd.config import DataConfig
from transducer_kd.data.batch import Batch
from transducer_kd.data.dataset import CutDataset, NoiseMixer, batches_by_duration, cut_frames, cut_text
from transducer_kd.data.features import SAMPLING_RATE, FeatureExtractor
from transducer_kd.data.joining import PairJoiner
from transducer_kd.data.manifests import read_manifest
from transducer_kd.data.pseudo_labels import load_pseudo_labels, read_soft_targets
from transducer_kd.data.silence import SilenceMixer
from transducer_kd.data.tokenizer import UNK_ID, Tokenizer
from transducer_kd.log import UserError

SPEED_FACTORS = (0.9, 1.1)
PSEUDO_LABELS = "pseudo-labels"  # what the log and `dropped` call the part of data.pseudo_labels
_BUFFER_CUTS = 20000  # cuts among which the sampler chooses; the whole of most corpora
_UNK_WARNING_SHARE = 0.01


class DataModule:
    """Batches for one rank.

    encoder_lens: T -> T', the encoder's exact length formula. Training and validation cuts with T' < U have
    no transducer loss and are dropped; so are cuts outside [min_cut_s, max_cut_s] (training only) and those
    without text. `dropped` maps part -> reason -> cut ids; the log has the counts and the first ids.
    Where needs_text is false, cuts without text, or with more tokens than frames, are trained on as well.
    soft_targets: batches bring the encoder output that was stored with the pseudo-labels. It belongs to the
    audio as it is, so that of pseudo-labelled cuts no speed-perturbed copies are made; nor are they where
    none is read, because training on soft and on hard targets is to be training on the same audio.
    """

    def __init__(
        self,
        cfg: DataConfig,
        tokenizer: Tokenizer,
        encoder_lens: Callable[[int], int],
        world_size: int = 1,
        rank: int = 0,
        soft_targets: bool = False,
        needs_text: bool = True,
    ):
        self.needs_text = needs_text
        self.cfg, self.tokenizer, self.encoder_lens = cfg, tokenizer, encoder_lens
        self.world_size, self.rank, self.soft_targets = world_size, rank, soft_targets
        self.dropped: Dict[str, Dict[str, List[str]]] = {}
        self._train_cuts: Optional[List[Cut]] = None
        self._pseudo_cuts: List[Cut] = []
        self._valid_cuts: Optional[List[Cut]] = None
        self._bins: List[float] = []
        if cfg.musan_cuts and not cfg.on_the_fly_feats:
            raise UserError("data.musan_cuts mixes noise into audio: it needs data.on_the_fly_feats=true")
        self._extractor = FeatureExtractor() if cfg.on_the_fly_feats else None
        self._mixer: Optional[NoiseMixer] = None  # read when training begins: decoding needs no noise
        self._joiner: Optional[PairJoiner] = None
        self._silence: Optional[SilenceMixer] = None
        if cfg.join_prob > 0 or cfg.silence_prob > 0:
            extractor = self._extractor or FeatureExtractor()
            if cfg.join_prob > 0:
                self._joiner = PairJoiner(cfg.join_prob, extractor, cfg.max_cut_s)
            if cfg.silence_prob > 0:
                self._silence = SilenceMixer(cfg.silence_prob, extractor, cfg.max_duration_s)

    # ---------------------------------------------------------------- batches

    def train_batches(self, epoch: int, start_batch: int = 0) -> Iterator[Batch]:
        """This rank's batches of `epoch` from number `start_batch` on; every rank gets equally many.

        An epoch holds every usable cut, of the pseudo-labelled ones what data.pseudo_share asks for; with
        several ranks a few of its last ones may come twice, so that no rank runs dry. Raises UserError when a
        cut cannot be read.
        """
        if self.cfg.musan_cuts and self._mixer is None:
            self._mixer = self._build_mixer()
        drawn = enumerate(self._draw(epoch))
        rank_text = f"/{self.rank}" if self.world_size > 1 else ""
        dataset = CutDataset(
            self.tokenizer,
            self._extractor,
            self._mixer,
            f"{self.cfg.seed}/{epoch}{rank_text}",
            self._read_soft if self.soft_targets else None,
            self._silence,
            self._joiner,
        )
        yield from _load(dataset, itertools.islice(drawn, start_batch, None), self.cfg.num_workers)

    def valid_batches(self) -> Iterator[Batch]:
        """The whole validation part, on whichever rank asks: each usable cut once, always in one order."""
        if self._valid_cuts is None:
            part = self.cfg.valid_part
            self._valid_cuts = self._usable(part, self._load_part(part), 0.0, float("inf"))
        batches = batches_by_duration(self._valid_cuts, self.cfg.max_duration_s, self.cfg.valid_part)
        yield from _load(self._plain_dataset(), enumerate(batches), self.cfg.num_workers)

    def test_batches(self, part: str, max_duration_s: float) -> Iterator[Batch]:
        """Every cut of `part` exactly once, nothing dropped, in an order that never changes.

        Raises UserError naming a cut that is too short for the encoder to give one frame.
        """
        cuts = self._load_part(part)
        for cut in cuts:
            if self.encoder_lens(cut_frames(cut)) < 1:
                raise UserError(
                    f"part {part}: cut {cut.id} has {cut.duration:.3f} s, too little for one encoder frame; "
                    "leave it out of the manifest"
                )
        batches = batches_by_duration(cuts, max_duration_s, part)
        yield from _load(self._plain_dataset(), enumerate(batches), self.cfg.num_workers)

    # ---------------------------------------------------------------- sampling

    def _draw(self, epoch: int) -> Iterator[List[Cut]]:
        """The cuts of this rank's batches, in order."""
        self.load_training()
        cuts = self._cuts_of_epoch(epoch)
        if not cuts:
            return
        # The sampler only shuffles what fits into its buffer; this makes epochs of large corpora differ as
        # well.
        random.Random(f"{self.cfg.seed}/{epoch}").shuffle(cuts)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*buffer_size.*")
            sampler = DynamicBucketingSampler(
                cuts,
                max_duration=self.cfg.max_duration_s,
                duration_bins=self._bins,
                buffer_size=_BUFFER_CUTS,
                shuffle=True,
                drop_last=False,
                seed=self.cfg.seed,
                world_size=self.world_size,
                rank=self.rank,
                # Ranks then train on equal lengths at a time. Needed with one rank as well: without it lhotse
                # (1.32 and 1.33) may pick an empty bucket near an epoch's end and stop, leaving cuts out.
                sync_buckets=True,
            )
            sampler.set_epoch(epoch)
            iterator = iter(sampler)
        for cuts_of_batch in iterator:
            yield list(cuts_of_batch)

    def _cuts_of_epoch(self, epoch: int) -> List[Cut]:
        """All labelled cuts, and as much pseudo-labelled audio as makes data.pseudo_share of the whole."""
        share = self.cfg.pseudo_share
        if not share:
            return self._train_cuts + self._pseudo_cuts
        wanted_s = share / (1 - share) * sum(cut.duration for cut in self._train_cuts)
        return self._train_cuts + piece_of_epoch(self._pseudo_cuts, wanted_s, epoch, self.cfg.seed)

    # ---------------------------------------------------------------- cuts

    def load_training(self) -> None:
        """Read the manifests of what is trained on, once. UserError for whatever is wrong with them."""
        if self._train_cuts is not None:
            return
        train = self._load_train()
        pseudo = self._load_pseudo() if self.cfg.pseudo_labels else []
        twice = {cut.id for cut in train} & {cut.id for cut in pseudo}
        if twice:
            raise UserError(
                f"cut {min(twice)} is in data.train_parts={','.join(self.cfg.train_parts)} and in "
                f"data.pseudo_labels={self.cfg.pseudo_labels}: a part cannot be both; leave it out of "
                "data.train_parts, or label other parts"
            )
        self._train_cuts, self._pseudo_cuts = train, pseudo
        # The same in every epoch. A bucket should hold a few batches; else most of them are left half full
        # at the end of an epoch.
        first = self._cuts_of_epoch(1)
        fitting = sum(c.duration for c in first) / (4 * self.cfg.max_duration_s * self.world_size)
        self._bins = duration_bins(first, min(self.cfg.num_buckets, int(fitting)))

    def _load_train(self) -> List[Cut]:
        kept: List[Cut] = []
        for part in self.cfg.train_parts:
            cuts = self._load_part(part)
            if self.cfg.speed_perturb:
                cuts = cuts + self._speed_copies(part, cuts)
            if self.cfg.train_share < 1:
                cuts = share_of(cuts, self.cfg.train_share)
            kept += self._usable(part, cuts, self.cfg.min_cut_s, self.cfg.max_cut_s)
        return kept

    def _load_pseudo(self) -> List[Cut]:
        folder = self.cfg.pseudo_labels
        cuts = self._checked(PSEUDO_LABELS, load_pseudo_labels(Path(folder), Path(self.cfg.fbank_dir)))
        kept = self._usable(PSEUDO_LABELS, cuts, self.cfg.min_cut_s, self.cfg.max_cut_s)
        if not kept:
            raise UserError(
                f"data.pseudo_labels={folder} has no usable cut (see the counts above); label more audio, or "
                "filter less with local/pseudo_label.py --refilter"
            )
        return kept

    def _read_soft(self, cut: Cut) -> np.ndarray:
        """The teacher's encoder output (T',D) of a pseudo-labelled cut."""
        return read_soft_targets(Path(self.cfg.pseudo_labels), cut.custom["soft"])

    def _speed_copies(self, part: str, cuts: Sequence[Cut]) -> List[Cut]:
        if self.cfg.on_the_fly_feats:
            return [cut.drop_features().perturb_speed(factor) for factor in SPEED_FACTORS for cut in cuts]
        return [cut for factor in SPEED_FACTORS for cut in self._load_part(f"{part}_sp{factor}")]

    def _load_part(self, part: str) -> List[Cut]:
        return self._checked(part, load_cuts(Path(self.cfg.fbank_dir), part))

    def _checked(self, part: str, cuts: List[Cut]) -> List[Cut]:
        for cut in cuts:
            if len(cut.supervisions) != 1:
                raise UserError(
                    f"part {part}: cut {cut.id} has {len(cut.supervisions)} supervisions, 1 is needed; "
                    "local/compute_fbank.py cuts recordings into utterances"
                )
            if not cut.has_features and not self.cfg.on_the_fly_feats:
                raise UserError(
                    f"part {part}: cut {cut.id} has no features; run local/compute_fbank.py without "
                    "--on-the-fly-feats, or set data.on_the_fly_feats=true"
                )
        return cuts

    def _usable(self, part: str, cuts: Sequence[Cut], min_s: float, max_s: float) -> List[Cut]:
        """Cuts that can be trained on; the others are counted, named in the log and kept in `dropped`."""
        tokens = self.tokenizer.encode([cut_text(cut) for cut in cuts])
        kept, dropped = [], {}
        for cut, ids in zip(cuts, tokens):
            encoder_frames = self.encoder_lens(cut_frames(cut))
            if not ids and self.needs_text:
                reason = "no text"
            elif cut.duration < min_s:
                reason = f"shorter than min_cut_s={min_s:g}"
            elif cut.duration > max_s:
                reason = f"longer than max_cut_s={max_s:g}"
            elif encoder_frames < max(1, len(ids) if self.needs_text else 0):
                reason = "fewer encoder frames than tokens (T' < U)"
            else:
                kept.append(cut)
                continue
            dropped.setdefault(reason, []).append(cut.id)
        self.dropped[part] = dropped
        hours = sum(c.duration for c in kept) / 3600
        logging.info("%s: %d of %d cuts, %.2f h", part, len(kept), len(cuts), hours)
        for reason, ids in dropped.items():
            more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
            logging.warning(
                "%s: dropped %d cuts, %s: %s%s", part, len(ids), reason, ", ".join(ids[:10]), more
            )
        self._warn_of_unknown(part, cuts, tokens)
        return kept

    def _warn_of_unknown(self, part: str, cuts: Sequence[Cut], tokens: Sequence[Sequence[int]]) -> None:
        total = sum(len(ids) for ids in tokens)
        unknown = sum(ids.count(UNK_ID) for ids in tokens)
        if total and unknown / total > _UNK_WARNING_SHARE:
            example = next(cut for cut, ids in zip(cuts, tokens) if UNK_ID in ids)
            logging.warning(
                "%s: %.1f%% of the tokens are <unk>, e.g. in %s: %r; is %s made from such text?",
                part, 100 * unknown / total, example.id, cut_text(example), self.tokenizer.path,
            )  # fmt: skip

    def _plain_dataset(self) -> CutDataset:
        return CutDataset(self.tokenizer, self._extractor)

    def _build_mixer(self) -> NoiseMixer:
        noises = [cut.resample(SAMPLING_RATE) for cut in read_cuts(Path(self.cfg.musan_cuts))]
        if not noises:
            raise UserError(f"data.musan_cuts={self.cfg.musan_cuts} holds no cut")
        return NoiseMixer(noises, self.cfg.musan_prob, self.cfg.musan_snr_db)


def load_cuts(fbank_dir: Path, part: str) -> List[Cut]:
    """The cuts of `<fbank_dir>/cuts_<part>.jsonl.gz`; feature paths in it are relative to fbank_dir."""
    path = fbank_dir / f"cuts_{part}.jsonl.gz"
    if not path.is_file():
        there = sorted(p.name[len("cuts_") : -len(".jsonl.gz")] for p in fbank_dir.glob("cuts_*.jsonl.gz"))
        raise UserError(
            f"{path} does not exist; make it with local/compute_fbank.py --parts {part} "
            f"(parts there: {', '.join(there) or 'none'})"
        )
    cuts = read_cuts(path)
    for cut in cuts:
        if cut.has_features and not Path(cut.features.storage_path).is_absolute():
            cut.features.storage_path = str(fbank_dir / cut.features.storage_path)
    return cuts


def read_cuts(path: Path) -> List[Cut]:
    """All cuts of a lhotse CutSet file. UserError when it is missing or damaged, or names a cut twice."""
    cuts = read_manifest("cuts", path)
    seen = set()
    for cut in cuts:
        if cut.id in seen:
            raise UserError(f"{path}: cut id {cut.id} appears twice; every utterance needs its own id")
        seen.add(cut.id)
    return cuts


def share_of(cuts: Sequence[Cut], share: float) -> List[Cut]:
    """About `share` of the cuts, in their order: always the same, a smaller share a part of a larger one.

    A cut and its speed-perturbed copies are in it together.
    """

    def place(cut: Cut) -> float:
        name = re.sub(r"_sp[\d.]+$", "", cut.id)
        return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12

    return [cut for cut in cuts if place(cut) < share]


def piece_of_epoch(cuts: Sequence[Cut], wanted_s: float, epoch: int, seed: int) -> List[Cut]:
    """About `wanted_s` seconds of `cuts` for `epoch`, which counts from 1.

    The cuts are laid out in a row, shuffled, then all of them again in another order, and so on; epochs take
    one piece of it after the other. So no cut comes again before all have come, and an epoch can be drawn
    without those before it.
    """
    lengths = [round(1000 * cut.duration) for cut in cuts]  # whole milliseconds: sums are exact
    cycle_ms = sum(lengths)
    begin, end = (round(1000 * wanted_s) * n for n in (epoch - 1, epoch))
    piece = []
    for cycle in range(begin // cycle_ms, -(-end // cycle_ms)):
        order = list(range(len(cuts)))
        random.Random(f"{seed}/pseudo/{cycle}").shuffle(order)
        position = cycle * cycle_ms
        for i in order:
            if begin <= position < end:
                piece.append(cuts[i])
            position += lengths[i]
    return piece


def duration_bins(cuts: Sequence[Cut], num_buckets: int) -> List[float]:
    """Upper limits in seconds of all buckets but the last, which all have about the same total duration."""
    durations = sorted(cut.duration for cut in cuts)
    if not durations:
        return []
    limits: List[float] = []
    target = sum(durations) / max(2, num_buckets)  # the sampler wants one limit at least
    filled = 0.0
    for duration in durations:
        filled += duration
        if filled > target * (len(limits) + 1) and (not limits or duration > limits[-1]):
            limits.append(duration)
    return limits[: max(1, num_buckets - 1)]


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """Processes started in here never hear a signal to stop, from the first moment on: they inherit a mask.

    Such a signal often goes to the whole process group. The training answers it by saving, for which it may
    still need batches; a worker ends when the training has ended. A signal that comes meanwhile is not lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _load(dataset: CutDataset, items: Iterable[Tuple[int, List[Cut]]], num_workers: int) -> Iterator[Batch]:
    """Batches of `items` in order; a UserError met on the way is raised here."""
    if num_workers > 0:
        # A generator of its own: else asking for batches would move on the random state of the training.
        loader = torch.utils.data.DataLoader(
            dataset, sampler=items, batch_size=None, num_workers=num_workers, generator=torch.Generator()
        )
        with _stop_signals_blocked():
            results = iter(loader)
    else:
        results = (dataset[item] for item in items)
    try:
        for result in results:
            if isinstance(result, UserError):
                raise result
            yield result
    finally:
        # Not left to the garbage collector: an exception's traceback keeps the loader alive until the process
        # exits, which then waits for workers that do not listen to the signal it sends them.
        if num_workers > 0:
            results._shutdown_workers()
