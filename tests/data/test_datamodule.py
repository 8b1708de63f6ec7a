"""What a training run relies on: every cut once an epoch, the same batches whatever happens, nothing lost
silently.
"""

import collections
import itertools
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from transducer_kd.data import dataset as dataset_module
from transducer_kd.data.datamodule import duration_bins, load_cuts, piece_of_epoch, share_of
from transducer_kd.data.dataset import mix_at_snr
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.data.validate import save_manifest
from transducer_kd.log import UserError

sys.path.insert(0, str(Path(__file__).parent))
from batches import assert_same, encoder_lens, ids_of  # noqa: E402


def test_an_epoch_holds_every_cut_once_and_epochs_differ(build):
    data = build()
    epochs = [list(data.train_batches(epoch)) for epoch in (1, 2, 3)]
    for batches in epochs:
        assert len(set(ids_of(batches))) == len(ids_of(batches)) == 48
    compositions = [{frozenset(batch.cut_ids) for batch in batches} for batches in epochs]
    assert len(compositions[0] & compositions[1]) <= len(epochs[0]) // 3
    assert compositions[1] != compositions[2]


@pytest.mark.parametrize("max_duration_s, num_buckets", [(3.5, 15), (12.0, 1), (12.0, 4), (500.0, 30)])
def test_no_cut_is_lost_whatever_the_batch_size(build, max_duration_s, num_buckets):
    data = build(max_duration_s=max_duration_s, num_buckets=num_buckets)
    for epoch in range(1, 6):
        batches = list(data.train_batches(epoch))
        assert sorted(ids_of(batches)) == sorted(c.id for c in load_cuts_of(data))
        # lhotse closes a batch when one more of the longest so far would not fit; the last may be a little
        # longer.
        assert all(batch.audio_s <= 1.25 * max_duration_s for batch in batches)


def load_cuts_of(data):
    return data._load_train()


def test_batches_carry_the_stored_features_and_the_tokens(build, prepared):
    cuts = {cut.id: cut for cut in load_cuts(prepared.fbank, "train")}
    tokenizer = Tokenizer(prepared.lang)
    for batch in build().train_batches(1):
        for i, cut_id in enumerate(batch.cut_ids):
            length = int(batch.feature_lens[i])
            np.testing.assert_array_equal(batch.features[i, :length].numpy(), cuts[cut_id].load_features())
            assert batch.texts[i] == cuts[cut_id].supervisions[0].text
            assert batch.y[i, : batch.y_lens[i]].tolist() == tokenizer.encode([batch.texts[i]])[0]


def test_a_run_that_resumes_gets_the_rest_of_the_epoch_exactly(build):
    expected = list(build().train_batches(4))
    for start in (0, 1, len(expected) // 2, len(expected) - 1, len(expected)):
        assert_same(list(build().train_batches(4, start)), expected[start:])


def test_skipping_reads_no_features(build, monkeypatch):
    reads = []
    original = dataset_module.load_features
    monkeypatch.setattr(dataset_module, "load_features", lambda cut: reads.append(cut.id) or original(cut))
    batch = next(build().train_batches(1, 5))
    assert reads == batch.cut_ids


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_workers_change_nothing(build, prepared, on_the_fly, one_thread):
    settings = {}
    if on_the_fly:
        noises = str(prepared.fbank / "cuts_dev.jsonl.gz")
        settings = dict(on_the_fly_feats=True, musan_cuts=noises, musan_prob=0.7, speed_perturb=True)
    expected = list(itertools.islice(build(**settings).train_batches(2), 6))
    for workers in (1, 2):
        found = list(itertools.islice(build(num_workers=workers, **settings).train_batches(2), 6))
        assert_same(found, expected)


def test_a_signal_to_stop_leaves_the_workers_alone(build, monkeypatch):
    expected = list(build().train_batches(1))
    stopped = []
    start = multiprocessing.Process.start

    def start_and_stop(process):
        """The signals come as early as they can: a worker has no time to ask for being left alone."""
        start(process)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.pid, number)
        stopped.append(process.pid)

    monkeypatch.setattr(multiprocessing.Process, "start", start_and_stop)
    assert_same(list(build(num_workers=2).train_batches(1)), expected)
    assert len(stopped) == 2


def test_the_training_hears_a_signal_to_stop_all_the_same(build, monkeypatch):
    heard = []
    start = multiprocessing.Process.start

    def be_stopped_and_start(process):
        os.kill(os.getpid(), signal.SIGTERM)
        start(process)

    monkeypatch.setattr(multiprocessing.Process, "start", be_stopped_and_start)
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        next(build(num_workers=1).train_batches(1))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_noise_is_only_read_for_training(build):
    data = build(on_the_fly_feats=True, musan_cuts="nowhere.jsonl.gz")
    assert len(ids_of(data.test_batches("test", 8.0))) == 10
    with pytest.raises(UserError, match="nowhere.jsonl.gz"):
        next(data.train_batches(1))


def test_features_on_the_fly_equal_the_stored_ones(build):
    stored, computed = list(build().train_batches(1)), list(build(on_the_fly_feats=True).train_batches(1))
    for a, b in zip(stored, computed):
        assert a.cut_ids == b.cut_ids
        assert (a.features - b.features).abs().max() <= 0.005  # half precision


def test_noise_is_a_function_of_seed_epoch_and_batch(build, prepared):
    settings = dict(
        on_the_fly_feats=True, musan_cuts=str(prepared.fbank / "cuts_dev.jsonl.gz"), musan_prob=1.0
    )
    first = list(build(**settings).train_batches(3))
    assert_same(list(build(**settings).train_batches(3, 2)), first[2:])
    clean = list(build(on_the_fly_feats=True).train_batches(3))
    assert all((a.features - b.features).abs().max() > 0.1 for a, b in zip(first, clean))


def test_mixing_gives_the_asked_for_ratio():
    rng = np.random.default_rng(0)
    speech, noise = rng.standard_normal(16000), 7 * rng.standard_normal(16000)
    added = mix_at_snr(speech, noise, 13.0) - speech
    assert 10 * np.log10(np.mean(speech**2) / np.mean(added**2)) == pytest.approx(13.0, abs=1e-3)
    silence = np.zeros(100)
    np.testing.assert_array_equal(mix_at_snr(silence, noise[:100], 10.0), silence)


def test_speed_copies_triple_the_epoch(build):
    ids = ids_of(build(on_the_fly_feats=True, speed_perturb=True).train_batches(1))
    assert len(ids) == len(set(ids)) == 3 * 48
    assert collections.Counter(i.partition("_sp")[2] for i in ids) == {"": 48, "0.9": 48, "1.1": 48}


def test_ranks_share_an_epoch_and_finish_together(build):
    shares = [list(build(world_size=2, rank=rank).train_batches(1)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    ids = [{i.partition("_dup")[0] for i in ids_of(share)} for share in shares]
    assert ids[0] | ids[1] == {c.id for c in load_cuts_of(build())}
    assert len(ids[0] & ids[1]) <= 1  # a last batch may have to be shared out
    resumed = list(build(world_size=2, rank=1).train_batches(1, 3))
    assert_same(resumed, shares[1][3:])


def test_validation_and_test_hold_every_cut_once_in_a_fixed_order(build):
    for draw in (lambda d: d.valid_batches(), lambda d: d.test_batches("test", 8.0)):
        first, again = list(draw(build())), list(draw(build(num_workers=1)))
        assert_same(again, first)
        assert len(ids_of(first)) == len(set(ids_of(first))) == 10
    for batch in build().test_batches("test", 8.0):
        assert len(batch.cut_ids) * int(batch.feature_lens.max()) * 0.01 <= 8.01
    # The first utterances of a validation are looked at: they should not all be of one length.
    lengths = [int(n) for batch in build(max_duration_s=4.0).valid_batches() for n in batch.feature_lens]
    assert lengths != sorted(lengths) and lengths != sorted(lengths, reverse=True)


def test_every_rank_validates_on_the_whole_part(build):
    assert len(ids_of(build(world_size=2, rank=0).valid_batches())) == 10


def test_what_cannot_be_trained_on_is_counted_and_named(build, prepared, caplog):
    cuts = load_cuts(prepared.fbank, "train")
    durations = sorted(c.duration for c in cuts)
    with caplog.at_level(logging.INFO):
        # A much coarser encoder: long transcripts no longer fit.
        data = build(lens=lambda frames: frames // 16, min_cut_s=durations[3], max_cut_s=durations[-3])
        kept = set(ids_of(data.train_batches(1)))
    tokenizer = data.tokenizer
    dropped = data.dropped["train"]
    assert sorted(len(ids) for reason, ids in dropped.items() if "cut_s" in reason) == [2, 3]
    (too_dense,) = [ids for reason, ids in dropped.items() if "T' < U" in reason]
    assert too_dense
    for cut in cuts:
        fits = cut.num_frames // 16 >= len(tokenizer.encode([cut.supervisions[0].text])[0])
        assert (cut.id in kept) == (fits and durations[3] <= cut.duration <= durations[-3])
    text = caplog.text
    assert (
        f"dropped {len(too_dense)} cuts" in text
        and too_dense[0] in text
        and f"{len(kept)} of 48 cuts" in text
    )


def test_text_that_the_tokens_do_not_cover_is_pointed_out(build, prepared, tmp_path, caplog):
    cuts = load_cuts(prepared.fbank, "train")
    for cut in cuts[:20]:
        cut.supervisions[0].text = "ÑÑÑ ŁŁ"
    save_manifest(cuts, tmp_path / "cuts_train.jsonl.gz")
    next(build(fbank_dir=str(tmp_path)).train_batches(1))
    assert "<unk>" in caplog.text and cuts[0].id in caplog.text


def test_without_need_of_text_nothing_is_dropped_for_it(build):
    with_text = ids_of(build(lens=lambda frames: 3).train_batches(1))
    without = ids_of(build(lens=lambda frames: 3, needs_text=False).train_batches(1))
    assert len(with_text) < len(without)
    assert sorted(without) == sorted(ids_of(build().train_batches(1)))


def test_a_share_of_the_labels_is_always_the_same_and_part_of_a_larger_one(build, prepared):
    whole = set(ids_of(build().train_batches(1)))
    shares = {}
    for share in (0.3, 0.7):
        shares[share] = set(ids_of(build(train_share=share).train_batches(1)))
        assert shares[share] == set(ids_of(build(train_share=share).train_batches(2)))
    assert shares[0.3] < shares[0.7] < whole
    cut = load_cuts(prepared.fbank, "train")[0]
    cuts = [cut.with_id(f"cut-{i}") for i in range(2000)]
    assert len(share_of(cuts, 0.25)) == pytest.approx(500, abs=60)
    copies = [cut.with_id(f"{cut.id}_sp0.9") for cut in cuts]
    assert [c.id for c in share_of(copies, 0.25)] == [f"{c.id}_sp0.9" for c in share_of(cuts, 0.25)]


def test_several_training_parts_are_one_epoch(build):
    ids = ids_of(build(train_parts=["train", "dev"]).train_batches(1))
    assert len(ids) == len(set(ids)) == 58


def test_one_cut_and_none(build, prepared, tmp_path):
    cuts = load_cuts(prepared.fbank, "train")
    save_manifest(cuts[:1], tmp_path / "cuts_train.jsonl.gz")
    assert ids_of(build(fbank_dir=str(tmp_path)).train_batches(1)) == [cuts[0].id]
    assert list(build(max_cut_s=0.5).train_batches(1)) == []


def test_bins_split_the_total_duration_evenly(prepared):
    cuts = load_cuts(prepared.fbank, "train")
    limits = duration_bins(cuts, 4)
    assert len(limits) == 3 and limits == sorted(set(limits))
    edges = [0.0, *limits, 100.0]
    sums = [sum(c.duration for c in cuts if a <= c.duration < b) for a, b in zip(edges, edges[1:])]
    assert max(sums) < 1.3 * min(sums)


def test_cuts_of_a_moved_folder_still_find_their_features(prepared, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.symlink_to(prepared.fbank)
    cut = load_cuts(moved, "dev")[0]
    assert cut.features.storage_path.startswith(str(moved)) and cut.load_features().shape[1] == 80
    assert len(CutSet.from_file(prepared.fbank / "cuts_dev.jsonl.gz")) == 10


def test_noise_without_audio_to_mix_it_into_is_refused(build, prepared):
    with pytest.raises(UserError, match="on_the_fly_feats"):
        build(musan_cuts=str(prepared.fbank / "cuts_dev.jsonl.gz"))


# ---------------------------------------------------------------- pseudo-labels


def test_pseudo_labels_join_the_training_parts(build, prepared, label):
    folder, numbers = label()
    texts = {cut.id: cut.supervisions[0].text for cut in load_cuts(prepared.fbank, "train")}
    data = build(pseudo_labels=folder, max_cut_s=2.5)
    found = {}
    for batch in data.train_batches(1):
        assert batch.teacher_out is None
        rows = zip(batch.cut_ids, batch.texts, batch.is_pseudo.tolist())
        found.update({cut_id: (text, is_pseudo) for cut_id, text, is_pseudo in rows})
    assert set(found) == {cut.id for cut in data._train_cuts + data._pseudo_cuts}
    for cut_id, (text, is_pseudo) in found.items():
        assert is_pseudo == (cut_id in numbers) and text == texts.get(cut_id, "TURN ON THE MUSIC")
    (too_long,) = data.dropped["pseudo-labels"].values()
    kept = {cut_id for cut_id, (_, is_pseudo) in found.items() if is_pseudo}
    assert 0 < len(too_long) < 10 and kept == set(numbers) - set(too_long)
    assert not any(batch.is_pseudo.any() for batch in data.valid_batches())


def test_stored_teachers_come_with_their_utterances(build, label):
    folder, numbers = label()
    data = build(pseudo_labels=folder, soft_targets=True)
    seen = 0
    for batch in data.train_batches(1):
        for n, cut_id in enumerate(batch.cut_ids if batch.is_pseudo.any() else []):
            length = int(batch.teacher_out_lens[n])
            assert length == (encoder_lens(int(batch.feature_lens[n])) if batch.is_pseudo[n] else 0)
            assert (batch.teacher_out[n, :length] == numbers.get(cut_id, -1)).all()
            seen += int(batch.is_pseudo[n])
    assert seen == 10
    expected = list(data.train_batches(3))
    again = build(pseudo_labels=folder, soft_targets=True, num_workers=2)
    assert_same(list(again.train_batches(3, 2)), expected[2:])
    (Path(folder) / "units" / "00000.soft").write_bytes(b"too short")
    with pytest.raises(UserError, match=r"00000\.soft is missing or damaged"):
        list(data.train_batches(1))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_share_of_pseudo_labelled_audio(build, label, share):
    folder, numbers = label()
    data = build(pseudo_labels=folder, pseudo_share=share)
    counts, seconds = collections.Counter(), {True: 0.0, False: 0.0}
    for epoch in range(1, 4):
        ids = []
        for batch in data.train_batches(epoch):
            ids += batch.cut_ids
            for length, is_pseudo in zip(batch.feature_lens.tolist(), batch.is_pseudo.tolist()):
                seconds[is_pseudo] += 0.01 * length
        labelled = [i for i in ids if i not in numbers]
        assert len(labelled) == len(set(labelled)) == 48
        counts.update(i for i in ids if i in numbers)
    assert seconds[True] / sum(seconds.values()) == pytest.approx(share, abs=0.03)
    # Over epochs, none comes again before all have come.
    assert max(counts.values()) - min(counts[i] for i in numbers) <= 1
    # Whoever begins in the middle gets the same.
    expected = list(data.train_batches(3))
    resumed = build(pseudo_labels=folder, pseudo_share=share)
    assert_same(list(resumed.train_batches(3, 4)), expected[4:])


def test_ranks_share_the_pseudo_labelled_audio_of_an_epoch(build, label):
    settings = dict(pseudo_labels=label()[0], pseudo_share=0.3)
    alone = collections.Counter(ids_of(build(**settings).train_batches(2)))
    shares = [list(build(world_size=2, rank=rank, **settings).train_batches(2)) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    both = collections.Counter(i.partition("_dup")[0] for share in shares for i in ids_of(share))
    assert not alone - both and sum((both - alone).values()) <= 1


def test_pieces_of_epochs_are_cut_from_one_row(prepared):
    cuts = load_cuts(prepared.fbank, "train")
    for wanted_s in (0.001, 7.0, 100.0, 1000.0):
        pieces = [piece_of_epoch(cuts, wanted_s, epoch, seed=5) for epoch in range(1, 7)]
        row = [cut for piece in pieces for cut in piece]
        for i in range(0, len(row), 48):  # each stretch of the row is a permutation
            stretch = {cut.id for cut in row[i : i + 48]}
            assert len(stretch) == len(row[i : i + 48])
        total = 0.0
        for piece in pieces:
            total += sum(cut.duration for cut in piece)
        assert total == pytest.approx(6 * wanted_s, abs=3.0)
    orders = [[cut.id for cut in row[i : i + 48]] for i in (0, 48)]
    assert orders[0] != orders[1]
    assert piece_of_epoch(cuts, 50.0, 1, seed=6) != piece_of_epoch(cuts, 50.0, 1, seed=5)


def test_pseudo_labelled_audio_keeps_its_speed(build, label):
    folder, numbers = label()
    ids = ids_of(build(pseudo_labels=folder, on_the_fly_feats=True, speed_perturb=True).train_batches(1))
    assert len(ids) == 3 * 48 + 10 and set(numbers) < set(ids)


def test_labels_of_which_none_can_be_used_are_refused(build, label):
    folder, _ = label(text="")
    with pytest.raises(UserError, match="data.pseudo_labels=.* has no usable cut"):
        next(build(pseudo_labels=folder).train_batches(1))


def test_a_part_that_is_labelled_and_pseudo_labelled_is_refused(build, label):
    folder, numbers = label()
    data = build(pseudo_labels=folder, train_parts=["train", "test"])
    for _ in range(2):  # nothing of it is kept
        with pytest.raises(UserError) as error:
            next(data.train_batches(1))
        assert f"cut {min(numbers)} is in data.train_parts=train,test" in str(error.value)
        assert f"data.pseudo_labels={folder}: a part cannot be both" in str(error.value)


FAILING_LOADER = """
import os, signal, sys
from transducer_kd.data.datamodule import _load
from transducer_kd.log import UserError, run_main

class Dataset:
    def __getitem__(self, item):
        if item[0] == 2 and sys.argv[1] == "error":
            return UserError("cut x cannot be read")
        if item[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item[0]

def main():
    batches = _load(Dataset(), [(i, []) for i in range(9)], 2)
    for batch in batches:
        pass

run_main(main)
"""


@pytest.mark.parametrize("fault, said", [("error", "cut x cannot be read"), ("killed", "killed by signal")])
def test_a_failed_loader_ends_the_process(fault, said):
    """Its workers do not listen to SIGTERM, which is all that an exiting Python sends them."""
    command = [sys.executable, "-c", FAILING_LOADER, fault]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 1 and said in done.stderr
