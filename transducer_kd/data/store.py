"""From manifests to a CutSet with stored features: one cut an utterance, features in shards, resumable.

    fbank/feats_<part>/<n>.f16        features of a few hundred cuts (data/features.py has the format)
    fbank/feats_<part>/<n>.jsonl.gz   their cuts, written after the features: the shard is complete
    fbank/cuts_<part>.jsonl.gz        all cuts of the part, written last

A killed run keeps its finished shards. `.input` beside them is a hash of everything they depend on: when that
changes, they are made again.
"""

import hashlib
import logging
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
from lhotse.cut import Cut, MonoCut

from transducer_kd.data.dataset import load_audio
from transducer_kd.data.features import BYTES_PER_AUDIO_S, FeatureExtractor, FeatureFileWriter
from transducer_kd.data.manifests import read_manifest, read_prepared
from transducer_kd.data.validate import save_manifest
from transducer_kd.log import UserError, atomic_write, check_disk_space, progress

_FORMAT = "2"  # raise it when what a shard holds changes


@dataclass
class StoreOptions:
    """backend: of FeatureExtractor.  with_features: False stores cuts alone, for features on the fly."""

    backend: str = "auto"
    with_features: bool = True
    speed: float = 1.0
    num_jobs: int = 1
    cuts_per_shard: int = 200
    skip_bad: bool = False


def read_part(manifests_dir: Path, part: str) -> List[MonoCut]:
    """One cut for each supervision of `<manifests_dir>/{recordings,supervisions}_<part>.jsonl.gz`."""
    recordings = {r.id: r for r in read_prepared("recordings", manifests_dir, part)}
    cuts = []
    for s in read_prepared("supervisions", manifests_dir, part):
        recording = recordings.get(s.recording_id)
        if recording is None:
            raise UserError(
                f"{manifests_dir}/supervisions_{part}.jsonl.gz: supervision {s.id} names recording "
                f"{s.recording_id}, which {manifests_dir}/recordings_{part}.jsonl.gz lacks"
            )
        channel = s.channel if isinstance(s.channel, int) else s.channel[0]
        cuts.append(MonoCut(s.id, s.start, s.duration, channel, [s.with_offset(-s.start)], None, recording))
    return cuts


def store_part(manifests_dir: Path, fbank_dir: Path, part: str, options: StoreOptions) -> Optional[int]:
    """Make `<fbank_dir>/cuts_<part>.jsonl.gz` -> its number of cuts, or None when it was up to date.

    With options.speed other than 1 the result is called `<part>_sp<speed>`. Raises UserError naming the cut
    whose audio cannot be read, unless options.skip_bad: then it is left out, counted and named in the log.
    Finished shards serve both; delete feats_<part> once the audio is mended.
    """
    fbank_dir = Path(fbank_dir)
    name = part if options.speed == 1.0 else f"{part}_sp{options.speed}"
    target, shards_dir = fbank_dir / f"cuts_{name}.jsonl.gz", fbank_dir / f"feats_{name}"
    state = _input_hash(manifests_dir, part, options)
    mark = shards_dir / ".input"
    found = mark.read_text() if mark.exists() else ""
    # Cuts with features serve on the fly as well; never throw away what took hours.
    enough = {state, _input_hash(manifests_dir, part, replace(options, with_features=True))}
    if target.exists() and found in enough:
        logging.info("%s: features are up to date", name)
        return None
    if found != state:
        target.unlink(missing_ok=True)
        shutil.rmtree(shards_dir, ignore_errors=True)
    shards_dir.mkdir(parents=True, exist_ok=True)
    for leftover in shards_dir.glob(".*.tmp"):  # of a killed process
        leftover.unlink()
    cuts: Sequence[Cut] = read_part(manifests_dir, part)
    if options.speed != 1.0:
        cuts = [cut.perturb_speed(options.speed) for cut in cuts]
    if not options.with_features:
        save_manifest(cuts, target)
        with atomic_write(mark) as f:
            f.write(state)
        return len(cuts)
    with atomic_write(mark) as f:
        f.write(state)
    size = options.cuts_per_shard
    shards = [(n, list(cuts[i : i + size])) for n, i in enumerate(range(0, len(cuts), size))]
    todo = [(n, shard) for n, shard in shards if not (shards_dir / f"{n:05d}.jsonl.gz").exists()]
    seconds = sum(cut.duration for _, shard in todo for cut in shard)
    check_disk_space(fbank_dir, seconds * BYTES_PER_AUDIO_S * 1.1, f"storing the features of {name}")
    if len(todo) < len(shards):
        logging.info("%s: %d of %d shards are there already", name, len(shards) - len(todo), len(shards))
    for n, bad in progress(
        _run(todo, shards_dir, options), total=len(todo), desc=f"features of {name}, shards"
    ):
        for message in bad:
            logging.warning("%s, shard %d, left out: %s", name, n, message)
    stored = [c for n, _ in shards for c in read_manifest("cuts", shards_dir / f"{n:05d}.jsonl.gz")]
    if len(stored) < len(cuts):
        logging.warning(
            "%s: left out %d of %d cuts whose audio cannot be read", name, len(cuts) - len(stored), len(cuts)
        )
    save_manifest(stored, target)
    return len(stored)


def _run(
    todo: Sequence[Tuple[int, List[Cut]]], shards_dir: Path, options: StoreOptions
) -> Iterator[Tuple[int, List[str]]]:
    jobs = min(options.num_jobs, len(todo))
    if jobs <= 1:
        for n, cuts in todo:
            yield n, _store_shard(n, cuts, shards_dir, options)
        return
    # fork: starting Python and torch anew for every process would take longer than most corpora.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures = [(n, pool.submit(_store_shard, n, cuts, shards_dir, options)) for n, cuts in todo]
        try:
            for n, future in futures:
                yield n, future.result()
        except BaseException:
            for _, future in futures:
                future.cancel()
            raise


def _store_shard(number: int, cuts: Sequence[Cut], shards_dir: Path, options: StoreOptions) -> List[str]:
    """Compute and write one shard -> messages about cuts left out."""
    extractor = FeatureExtractor(options.backend)
    features_path = shards_dir / f"{number:05d}.f16"
    stored, bad = [], []
    with atomic_write(features_path, "wb") as f:
        writer = FeatureFileWriter(f, f"{shards_dir.name}/{features_path.name}")
        for cut in cuts:
            try:
                samples = load_audio(cut)
            except UserError as e:
                if not options.skip_bad:
                    raise
                bad.append(str(e))
                continue
            cut.features = writer.write(extractor.extract(samples), cut.recording_id, cut.start, cut.duration)
            stored.append(cut)
    save_manifest(stored, shards_dir / f"{number:05d}.jsonl.gz")
    return bad


def _input_hash(manifests_dir: Path, part: str, options: StoreOptions) -> str:
    digest = hashlib.sha256(repr((_FORMAT, options.backend, options.with_features, options.speed)).encode())
    digest.update(repr(options.cuts_per_shard).encode())
    for kind in ("recordings", "supervisions"):
        path = Path(manifests_dir) / f"{kind}_{part}.jsonl.gz"
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()
