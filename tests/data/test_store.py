"""Stored features: complete or absent, never half; a killed run keeps what it finished."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from transducer_kd.data import store
from transducer_kd.data.datamodule import load_cuts
from transducer_kd.data.features import FeatureExtractor
from transducer_kd.data.store import StoreOptions, store_part
from transducer_kd.log import UserError

LOCAL = Path(__file__).resolve().parents[2] / "local"


def content(folder, part):
    return [(c.id, c.num_frames, c.load_features().tobytes()) for c in load_cuts(folder, part)]


def test_stored_features_are_those_of_the_audio(prepared):
    extractor = FeatureExtractor()
    for cut in load_cuts(prepared.fbank, "dev"):
        expected = extractor.extract(cut.load_audio())
        assert np.abs(cut.load_features() - expected).max() <= 0.004
        assert cut.num_frames == len(expected) and len(cut.supervisions) == 1
        assert cut.id == cut.supervisions[0].id


def test_shards_and_processes_change_nothing(prepared, tmp_path):
    expected = content(prepared.fbank, "train")
    for name, options in {
        "shards": StoreOptions(cuts_per_shard=7),
        "processes": StoreOptions(cuts_per_shard=7, num_jobs=2),
    }.items():
        assert store_part(prepared.manifests, tmp_path / name, "train", options) == 48
        assert content(tmp_path / name, "train") == expected


def test_up_to_date_and_changed_input(prepared, tmp_path):
    options = StoreOptions()
    assert store_part(prepared.manifests, tmp_path, "dev", options) == 10
    assert store_part(prepared.manifests, tmp_path, "dev", options) is None
    assert store_part(prepared.manifests, tmp_path, "dev", StoreOptions(backend="lhotse")) == 10
    # Cuts with features also serve on the fly: hours of work are not thrown away for an option.
    on_the_fly = StoreOptions(backend="lhotse", with_features=False)
    assert store_part(prepared.manifests, tmp_path, "dev", on_the_fly) is None
    assert store_part(prepared.manifests, tmp_path / "new", "dev", on_the_fly) == 10
    assert not any(c.has_features for c in CutSet.from_file(tmp_path / "new" / "cuts_dev.jsonl.gz"))


def test_an_interrupted_run_goes_on_from_its_last_shard(prepared, tmp_path, monkeypatch):
    options = StoreOptions(cuts_per_shard=10)
    original, begun = store._store_shard, []

    def dies_in_the_third(number, *rest):
        begun.append(number)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(number, *rest)

    monkeypatch.setattr(store, "_store_shard", dies_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        store_part(prepared.manifests, tmp_path, "train", options)
    assert not (tmp_path / "cuts_train.jsonl.gz").exists()
    assert store_part(prepared.manifests, tmp_path, "train", options) == 48
    assert begun == [0, 1, 2, 2, 3, 4]
    assert content(tmp_path, "train") == content(prepared.fbank, "train")


def test_kill_9_leaves_nothing_half(prepared, tmp_path):
    """A writer that is killed in the middle of a shard: no manifest, and the next run is as if nothing had
    happened.
    """
    code = (
        "import sys, time; from pathlib import Path; from transducer_kd.data import store\n"
        "write = store.FeatureFileWriter.write\n"
        "def slow(self, *rest):\n"
        "    if self.position > 900: print('now', flush=True); time.sleep(60)\n"
        "    return write(self, *rest)\n"
        "store.FeatureFileWriter.write = slow\n"
        f"store.store_part(Path({str(prepared.manifests)!r}), Path({str(tmp_path)!r}), 'dev', "
        f"store.StoreOptions())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(LOCAL.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout.readline().strip() == "now"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cuts_dev.jsonl.gz").exists()
    assert list((tmp_path / "feats_dev").glob(".*.tmp")) and not list((tmp_path / "feats_dev").glob("*.f16"))
    assert store_part(prepared.manifests, tmp_path, "dev", StoreOptions()) == 10
    assert not list((tmp_path / "feats_dev").glob(".*.tmp"))
    assert content(tmp_path, "dev") == content(prepared.fbank, "dev")


def test_speed_copies(prepared, tmp_path):
    assert store_part(prepared.manifests, tmp_path, "dev", StoreOptions(speed=0.9)) == 10
    slow = {c.id: c for c in load_cuts(tmp_path, "dev_sp0.9")}
    for cut in load_cuts(prepared.fbank, "dev"):
        assert slow[f"{cut.id}_sp0.9"].duration == pytest.approx(cut.duration / 0.9, abs=1e-3)
        assert abs(slow[f"{cut.id}_sp0.9"].load_features().shape[0] - cut.num_frames / 0.9) <= 1


def test_a_full_disk_is_seen_before_the_work(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BYTES_PER_AUDIO_S", 1e15)
    with pytest.raises(UserError, match="storing the features of dev needs about"):
        store_part(prepared.manifests, tmp_path, "dev", StoreOptions())


def test_reading_takes_less_work_than_computing(prepared):
    """Else there would be no point in storing them. Processor time of one run: other load does not count."""
    cuts, extractor = load_cuts(prepared.fbank, "train"), FeatureExtractor()
    audio = [cut.load_audio() for cut in cuts]
    for _ in range(2):  # the first round opens the file
        start = time.process_time()
        for cut in cuts:
            cut.load_features()
        reading = time.process_time() - start
    start = time.process_time()
    for samples in audio:
        extractor.extract(samples)
    assert reading < time.process_time() - start
