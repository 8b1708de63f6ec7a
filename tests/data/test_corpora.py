"""Every way into the project ends in the same manifests."""

import json
import shutil

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio import AudioSource

from transducer_kd.data import corpora
from transducer_kd.data.store import read_part
from transducer_kd.data.validate import CheckOptions, build_manifests, normalize_text
from transducer_kd.log import UserError


def rows_of(manifests, part):
    """(id, text, speaker, samples) of a part, sorted."""
    return sorted(
        (c.id, c.supervisions[0].text, c.supervisions[0].speaker, c.num_samples)
        for c in read_part(manifests, part)
    )


def test_librispeech_layout(prepared):
    rows = rows_of(prepared.manifests, "train")
    assert len(rows) == 48 and {speaker for _, _, speaker, _ in rows} == {"100", "101", "102", "103"}
    lines = (prepared.corpus / "train/101/1/101-1.trans.txt").read_text().splitlines()
    name, _, text = lines[3].partition(" ")
    audio = soundfile.info(prepared.corpus / f"train/101/1/{name}.flac")
    assert (name, text, "101", audio.frames) in rows
    parts = json.loads((prepared.manifests / "parts.json").read_text())
    assert parts == {"train": ["train"], "dev": ["dev"], "test": ["test"], "unlabelled": []}


def test_roles_by_option_and_by_name(prepared, tmp_path, run_program):
    outcome = run_program(
        "prepare_manifests", "--corpus-dir", prepared.corpus, "--output-dir", tmp_path,
        "--train-parts", "dev", "--dev-parts", "test", "--test-parts", "test",
    )  # fmt: skip
    assert outcome.status == 0, outcome.lines
    parts = json.loads((tmp_path / "parts.json").read_text())
    assert parts["train"] == ["dev"] and parts["dev"] == parts["test"] == ["test"]
    assert not (tmp_path / "supervisions_train.jsonl.gz").exists()
    roles = corpora.guess_roles(["train-clean-5", "unlabelled", "dev-mini", "valid", "test-mini", "other"])
    assert roles == corpora.PartNames(["train-clean-5"], ["dev-mini", "valid"], ["test-mini"], ["unlabelled"])


def test_csv(prepared, tmp_path, run_program):
    expected = rows_of(prepared.manifests, "dev")
    lines = ["path,text,speaker,id"]
    for cut in read_part(prepared.manifests, "dev"):
        shutil.copy(cut.recording.sources[0].source, tmp_path / f"{cut.id}.flac")
        supervision = cut.supervisions[0]
        lines.append(f'{cut.id}.flac,"{supervision.text.lower()}, ",{supervision.speaker},{cut.id}')
    (tmp_path / "dev.csv").write_text(
        "\ufeff" + "\n".join(lines) + "\n", encoding="utf-8"
    )  # as Excel writes it
    outcome = run_program(
        "prepare_manifests", "--csv", f"dev={tmp_path / 'dev.csv'}", "--output-dir", tmp_path / "m"
    )
    assert outcome.status == 0, outcome.lines
    assert rows_of(tmp_path / "m", "dev") == expected


def test_kaldi_data_dir_with_and_without_segments(prepared, tmp_path, run_program):
    expected = rows_of(prepared.manifests, "dev")
    cuts = read_part(prepared.manifests, "dev")
    for folder in (tmp_path / "whole", tmp_path / "cut"):
        folder.mkdir()
        texts = [f"{c.id} {c.supervisions[0].text}\n" for c in cuts]
        (folder / "text").write_text("".join(texts))
        (folder / "utt2spk").write_text("".join(f"{c.id} {c.supervisions[0].speaker}\n" for c in cuts))
    scp = "".join(f"{c.id} {c.recording.sources[0].source}\n" for c in cuts)
    (tmp_path / "whole" / "wav.scp").write_text(scp)
    # The same utterances as stretches of one long recording.
    audio = np.concatenate([c.load_audio()[0] for c in cuts])
    soundfile.write(tmp_path / "long.flac", audio, 16000)
    (tmp_path / "cut" / "wav.scp").write_text(f"long {tmp_path / 'long.flac'}\n")
    ends = np.cumsum([c.duration for c in cuts])
    segments = [f"{c.id} long {end - c.duration:.6f} {end:.6f}\n" for c, end in zip(cuts, ends)]
    (tmp_path / "cut" / "segments").write_text(
        "".join(segments[:-1]) + segments[-1].rsplit(" ", 1)[0] + " -1\n"
    )
    for name in ("whole", "cut"):
        arguments = ("--kaldi-dir", f"dev={tmp_path / name}", "--output-dir", tmp_path / "m")
        outcome = run_program("prepare_manifests", *arguments)
        assert outcome.status == 0, outcome.lines
        assert rows_of(tmp_path / "m", "dev") == expected
    samples = [c.load_audio()[0] for c in read_part(tmp_path / "m", "dev")]
    assert all(np.array_equal(a, c.load_audio()[0]) for a, c in zip(samples, cuts))


def test_lhotse_manifests_and_cuts(prepared, tmp_path, run_program):
    expected = rows_of(prepared.manifests, "dev")
    recordings = RecordingSet.from_file(prepared.manifests / "recordings_dev.jsonl.gz")
    supervisions = SupervisionSet.from_file(prepared.manifests / "supervisions_dev.jsonl.gz")
    recordings.to_file(tmp_path / "corpus_recordings_a.jsonl.gz")
    supervisions.to_file(tmp_path / "corpus_supervisions_a.jsonl.gz")
    CutSet.from_file(prepared.fbank / "cuts_dev.jsonl.gz").to_file(tmp_path / "cuts_b.jsonl.gz")
    outcome = run_program(
        "prepare_manifests", "--manifest-dir", tmp_path, "--train-parts", "a", "--dev-parts", "b",
        "--output-dir", tmp_path / "m",
    )  # fmt: skip
    assert outcome.status == 0, outcome.lines
    assert rows_of(tmp_path / "m", "a") == rows_of(tmp_path / "m", "b") == expected


def test_relative_paths_of_ready_manifests_do_not_depend_on_the_folder(tmp_path, run_program, monkeypatch):
    soundfile.write(tmp_path / "a.wav", np.full(16000, 0.1, np.float32), 16000)
    recording = Recording("a", [AudioSource("file", [0], "a.wav")], 16000, 16000, 1.0)
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "recordings_x.jsonl.gz")
    segment = SupervisionSegment("a", "a", 0.0, 1.0, text="HI", speaker="s")
    SupervisionSet.from_segments([segment]).to_file(tmp_path / "supervisions_x.jsonl.gz")
    monkeypatch.chdir(tmp_path)
    options = ("--manifest-dir", ".", "--train-parts", "x", "--output-dir", "m")
    outcome = run_program("prepare_manifests", *options)
    assert outcome.status == 0, outcome.lines
    monkeypatch.chdir("/")
    assert read_part(tmp_path / "m", "x")[0].load_audio().shape == (1, 16000)


def test_unchanged_parts_are_left_alone_and_changed_ones_are_not(prepared, tmp_path, run_program):
    shutil.copytree(prepared.corpus / "dev", tmp_path / "c" / "dev")
    options = ("prepare_manifests", "--corpus-dir", tmp_path / "c", "--output-dir", tmp_path / "m")
    assert run_program(*options).status == 0
    before = (tmp_path / "m" / "supervisions_dev.jsonl.gz").read_bytes()
    again = run_program(*options)
    assert any("up to date" in line for line in again.lines)
    (transcripts, *_) = sorted((tmp_path / "c").rglob("*.trans.txt"))
    transcripts.write_text(transcripts.read_text().replace(" ", " AND ", 1))
    changed = run_program(*options)
    assert not any("up to date" in line for line in changed.lines)
    assert (tmp_path / "m" / "supervisions_dev.jsonl.gz").read_bytes() != before


def test_downloads_skip_what_is_there_and_finish_what_was_cut_short(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "lhotse.recipes.download_librispeech", lambda folder, dataset_parts: asked.extend(dataset_parts)
    )
    (tmp_path / "LibriSpeech" / "train-clean-5").mkdir(parents=True)  # the user's own copy
    corpora.download("mini_librispeech", corpora.NAMED_PARTS["mini_librispeech"].all(), tmp_path)
    assert asked == ["dev-clean-2"]
    (tmp_path / "train-clean-5.tar.gz").touch()  # a download of ours, killed while unpacking
    corpora.download("mini_librispeech", ["train-clean-5"], tmp_path)
    assert asked == ["dev-clean-2", "train-clean-5"]
    (tmp_path / "LibriSpeech" / "train-clean-5" / ".completed").touch()
    corpora.download("mini_librispeech", ["train-clean-5"], tmp_path)
    assert asked == ["dev-clean-2", "train-clean-5"]


def test_mini_librispeech_is_tested_on_other_speakers_than_it_is_tuned_on(tmp_path):
    for speaker in ("10", "11", "12", "9"):
        chapter = tmp_path / "dev-clean-2" / speaker / "1"
        chapter.mkdir(parents=True)
        (chapter / f"{speaker}-1.trans.txt").write_text(f"{speaker}-1-0000 SOME WORDS\n")
    parts = corpora.NAMED_PARTS["mini_librispeech"]
    read = [corpora.read_librispeech_part(tmp_path, part) for part in parts.dev + parts.test]
    dev, test = ([utterance.speaker for utterance in half] for half in read)
    assert (dev, test) == (["10", "12"], ["11", "9"])


def test_a_download_without_room_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("lhotse.recipes.download_librispeech", lambda *a, **k: pytest.fail("began"))
    monkeypatch.setitem(corpora._DOWNLOAD_GB, "train-clean-100", 1e9)
    with pytest.raises(UserError, match="train-clean-100.*GB"):
        corpora.download("librispeech", ["train-clean-100"], tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It’s twenty-one, please!", "IT'S TWENTY ONE PLEASE"),
        ("  a \t b\u00a0c ", "A B C"),
        ("'quoted' words ' alone", "'QUOTED' WORDS ALONE"),
        ("Straße 7", "STRASSE 7"),
        ("नमस्ते", "नमस्ते"),
    ],
)
def test_text_is_normalised_as_in_librispeech(text, expected):
    assert normalize_text(text, "upper") == expected
    assert normalize_text(text, "none") == " ".join(text.split())


def test_small_overhang_is_shortened_and_other_rates_are_resampled(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1, np.float32), 8000)
    row = corpora.Utterance("a", "a", tmp_path / "a.wav", "hi", "s", 0.0, 1.05)
    recordings, segments, problems = build_manifests([row], CheckOptions(resample=True))
    assert not problems and segments[0].duration == pytest.approx(1.0) and recordings[0].num_samples == 16000
    assert recordings[0].load_audio().shape == (1, 16000)


def test_one_channel_of_two(tmp_path):
    left, right = np.full(16000, 0.1, np.float32), np.full(16000, -0.2, np.float32)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000)
    (tmp_path / "x.csv").write_text("path,text,speaker\na.wav,hi,s\n")
    recordings, segments, problems = build_manifests(
        corpora.read_csv(tmp_path / "x.csv"), CheckOptions(channel=1)
    )
    assert not problems and segments[0].channel == 1
    samples = recordings[0].load_audio(channels=1)
    assert samples.mean() == pytest.approx(-0.2, abs=1e-3)


def test_full_libri_means_the_same_for_an_unpacked_copy_and_a_download(
    tmp_path, run_program, local_program, monkeypatch
):
    program = local_program("prepare_manifests")
    monkeypatch.setattr(corpora, "download", lambda corpus, parts, folder: folder)
    trained = []
    for place in ("--corpus-dir", "--download-dir"):
        for full in ("0", "1"):
            options = ["--output-dir", "m", "--corpus", "librispeech", "--full-libri", full, place, "x"]
            trained.append(program.choose_source(program.parse_arguments(options))[1].train)
    assert trained[0] == trained[2] == ["train-clean-100"]
    assert trained[1] == trained[3] == ["train-clean-100", "train-clean-360", "train-other-500"]
    for options in (("--corpus", "synthetic"), ()):
        outcome = run_program(
            "prepare_manifests", "--output-dir", tmp_path, "--full-libri", 1, "--corpus-dir", "x", *options
        )
        assert outcome.status == 1 and "--full-libri 1" in outcome.errors[0]
