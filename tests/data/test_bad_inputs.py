"""Faulty input of every kind: one clear line that names the thing and the remedy, and a status that is not
zero; or, where the user said so, a counted skip."""

import gzip
import os
import shutil
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transducer_kd.config import DataConfig
from transducer_kd.data.datamodule import DataModule, load_cuts
from transducer_kd.data.store import read_part
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.data.validate import save_manifest
from transducer_kd.log import UserError

GOOD = 3  # utterances besides the bad one


def tone(seconds=1.0, rate=16000, channels=1):
    wave = 0.1 * np.sin(np.arange(int(seconds * rate)) / 20).astype(np.float32)
    return wave if channels == 1 else np.stack([wave] * channels, axis=1)


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


@pytest.fixture
def part(tmp_path):
    """corpus/train with three good utterances and an entry for s-1-bad, whose audio a test makes (or not)."""
    chapter = tmp_path / "corpus" / "train" / "s" / "1"
    chapter.mkdir(parents=True)
    names = [f"s-1-{n:04d}" for n in range(GOOD)]
    for name in names:
        soundfile.write(chapter / f"{name}.flac", tone(), 16000)
    transcripts = chapter / "s-1.trans.txt"
    transcripts.write_text("".join(f"{name} HELLO THERE\n" for name in names) + "s-1-bad HELLO AGAIN\n")
    return chapter


def prepare(run_program, tmp_path, *options):
    folders = ("--corpus-dir", tmp_path / "corpus", "--output-dir", tmp_path / "manifests")
    return run_program("prepare_manifests", *folders, *options)


def assert_one_line(outcome, *words):
    """The program ended with status 1 and one ERROR line that holds all of `words`; no traceback."""
    assert outcome.status == 1, outcome.lines
    assert len(outcome.errors) == 1 and outcome.lines[-1] == outcome.errors[0], outcome.lines
    assert not any("Traceback" in line for line in outcome.lines)
    for word in words:
        assert str(word) in outcome.errors[0], outcome.errors[0]


def missing(chapter):
    pass


def empty(chapter):
    (chapter / "s-1-bad.flac").touch()


def truncated_flac(chapter):
    soundfile.write(chapter / "s-1-bad.flac", tone(), 16000)
    truncate(chapter / "s-1-bad.flac", 0.5)


def truncated_wav(chapter):
    soundfile.write(chapter / "s-1-bad.wav", tone(), 16000)
    truncate(chapter / "s-1-bad.wav", 0.5)


def not_audio(chapter):
    (chapter / "s-1-bad.flac").write_text("<html>404 not found</html>")


def no_samples(chapter):
    soundfile.write(chapter / "s-1-bad.wav", tone(0.0), 16000)


def too_short(chapter):
    soundfile.write(chapter / "s-1-bad.flac", tone(0.05), 16000)


def eight_khz(chapter):
    soundfile.write(chapter / "s-1-bad.flac", tone(rate=8000), 8000)


def stereo(chapter):
    soundfile.write(chapter / "s-1-bad.flac", tone(channels=2), 16000)


def not_finite(chapter):
    wave = tone()
    wave[100] = np.nan
    soundfile.write(chapter / "s-1-bad.wav", wave, 16000, subtype="FLOAT")


AUDIO_FAULTS = {
    missing: ("does not exist", "restore"),
    empty: ("is empty", "copy it again"),
    truncated_flac: ("truncated or damaged", "copy it again"),
    truncated_wav: ("truncated", "copy it again"),
    not_audio: ("not audio", "convert"),
    no_samples: ("no samples", "copy it again"),
    too_short: ("0.050 s", "leave it out"),
    eight_khz: ("8000 Hz", "--resample"),
    stereo: ("2 channels", "--channel 0"),
    not_finite: ("not finite", "convert it again"),
}


@pytest.mark.parametrize("fault", AUDIO_FAULTS, ids=lambda f: f.__name__)
def test_bad_audio_is_an_error_that_names_the_file_or_a_counted_skip(fault, part, tmp_path, run_program):
    fault(part)
    outcome = prepare(run_program, tmp_path)
    assert_one_line(outcome, "s-1-bad", part, "--bad-audio skip", *AUDIO_FAULTS[fault])
    assert not (tmp_path / "manifests" / "supervisions_train.jsonl.gz").exists()
    skipped = prepare(run_program, tmp_path, "--bad-audio", "skip")
    assert skipped.status == 0 and any("left out 1 faulty" in line for line in skipped.lines), skipped.lines
    assert len(read_part(tmp_path / "manifests", "train")) == GOOD
    assert "s-1-bad" in (tmp_path / "manifests" / "problems_train.txt").read_text()


@pytest.mark.parametrize("fault, option", [(eight_khz, ["--resample"]), (stereo, ["--channel", "0"])])
def test_the_remedy_that_the_error_names_works(fault, option, part, tmp_path, run_program):
    fault(part)
    outcome = prepare(run_program, tmp_path, *option)
    assert outcome.status == 0, outcome.lines
    cuts = read_part(tmp_path / "manifests", "train")
    assert len(cuts) == GOOD + 1 and all(c.load_audio().shape == (1, 16000) for c in cuts)


TEXT_FAULTS = {
    "empty transcript": ("s-1-bad\n", "transcript is empty"),
    "punctuation alone": ("s-1-bad ...!\n", "transcript is empty"),
    "duplicate id": ("s-1-0000 HELLO TWICE\n", "s-1-0000: the id appears twice"),
    "replacement character": ("s-1-bad CAF\ufffd\n", "mend its encoding"),
    "control character": ("s-1-bad HEL\x07LO\n", "mend its encoding"),
}


@pytest.mark.parametrize("name", TEXT_FAULTS)
def test_bad_transcripts(name, part, tmp_path, run_program):
    line, message = TEXT_FAULTS[name]
    soundfile.write(part / "s-1-bad.flac", tone(), 16000)
    transcripts = part / "s-1.trans.txt"
    transcripts.write_text(transcripts.read_text().replace("s-1-bad HELLO AGAIN\n", line))
    assert_one_line(prepare(run_program, tmp_path), message)
    assert prepare(run_program, tmp_path, "--bad-audio", "skip").status == 0
    assert len(read_part(tmp_path / "manifests", "train")) == GOOD


def test_an_unlabelled_part_needs_no_transcripts(part, tmp_path, run_program):
    soundfile.write(part / "s-1-bad.flac", tone(), 16000)
    transcripts = part / "s-1.trans.txt"
    transcripts.write_text(transcripts.read_text().replace("s-1-bad HELLO AGAIN\n", "s-1-bad\n"))
    assert prepare(run_program, tmp_path, "--train-parts", "train", "--unlabelled-parts", "train").status == 0
    assert len(read_part(tmp_path / "manifests", "train")) == GOOD + 1


def test_transcripts_that_are_not_utf8(part, tmp_path, run_program):
    (part / "s-1.trans.txt").write_bytes("s-1-0000 CAFÉ\n".encode("latin-1"))
    assert_one_line(prepare(run_program, tmp_path), part / "s-1.trans.txt", "not UTF-8", "iconv")


def test_nothing_usable_at_all(part, tmp_path, run_program):
    for audio in part.glob("*.flac"):
        audio.unlink()
    outcome = prepare(run_program, tmp_path, "--bad-audio", "skip")
    assert_one_line(outcome, "part train", "none of its 4 utterances")


def test_folders_and_parts_that_are_not_there(part, tmp_path, run_program):
    outcome = prepare(run_program, tmp_path, "--train-parts", "trian")
    assert_one_line(outcome, "no part trian", "parts there: train")
    options = ("--output-dir", tmp_path / "m")
    outcome = run_program("prepare_manifests", *options, "--corpus-dir", "/nowhere")
    assert_one_line(outcome, "no folder /nowhere")
    (tmp_path / "bare").mkdir()
    outcome = run_program("prepare_manifests", *options, "--corpus-dir", tmp_path / "bare")
    assert_one_line(outcome, tmp_path / "bare", "LibriSpeech layout")
    assert_one_line(run_program("prepare_manifests", *options), "name one source", "--csv")
    outcome = run_program("prepare_manifests", *options, "--corpus", "librispeech")
    assert_one_line(outcome, "--download-dir")


@pytest.mark.parametrize(
    "content, words",
    [
        ("path,text\na.flac,HI\n", ("column speaker is missing",)),
        ("path,text,speaker\na.flac,HI, THERE,s\n", ("row 2", "quote texts")),
        ("path,text,speaker\n", ("no rows",)),
        ("path,text,speaker\nnone.flac,HI,s\n", ("none.flac", "does not exist")),
    ],
)
def test_bad_csv(content, words, tmp_path, run_program):
    (tmp_path / "t.csv").write_text(content)
    options = ("--csv", f"train={tmp_path / 't.csv'}", "--output-dir", tmp_path / "m")
    outcome = run_program("prepare_manifests", *options)
    assert_one_line(outcome, tmp_path, *words)


@pytest.mark.parametrize(
    "scp, segments, words",
    [
        ("r sph2pipe r.sph |\n", None, ("recording r is a command",)),
        ("r {wav}\n", "u r 0.2 3.5\n", ("utterance u", "ends at 3.500 s", "only 1.000 s")),
        ("r {wav}\n", "u r 0.8 0.2\n", ("utterance u", "ends before it starts")),
        ("r {wav}\n", "u q 0.2 0.8\n", ("u q 0.2 0.8", "wav.scp")),
        ("r {wav}\n", "u r 0.2\n", ("bad line 'u r 0.2'",)),
        ("r {wav}\nr {wav}\n", None, ("id r appears twice",)),
    ],
)
def test_bad_kaldi_data(scp, segments, words, tmp_path, run_program):
    soundfile.write(tmp_path / "r.wav", tone(), 16000)
    (tmp_path / "wav.scp").write_text(scp.format(wav=tmp_path / "r.wav"))
    (tmp_path / "text").write_text("u HELLO\nr HELLO\n")
    if segments:
        (tmp_path / "segments").write_text(segments)
    options = ("--kaldi-dir", f"train={tmp_path}", "--output-dir", tmp_path / "m")
    outcome = run_program("prepare_manifests", *options)
    assert_one_line(outcome, *words)


def test_bad_lhotse_manifests(prepared, tmp_path, run_program):
    options = ("prepare_manifests", "--manifest-dir", tmp_path, "--train-parts", "dev")
    options += ("--output-dir", tmp_path / "m")
    assert_one_line(run_program(*options), tmp_path, "neither recordings_dev")
    for kind in ("recordings", "supervisions"):
        shutil.copy(prepared.manifests / f"{kind}_dev.jsonl.gz", tmp_path)
    truncate(tmp_path / "recordings_dev.jsonl.gz", 0.5)
    assert_one_line(run_program(*options), tmp_path / "recordings_dev.jsonl.gz", "cannot be read")
    with gzip.open(tmp_path / "recordings_dev.jsonl.gz", "wt") as f:
        f.writelines(gzip.open(prepared.manifests / "recordings_dev.jsonl.gz", "rt").readlines()[1:])
    assert_one_line(run_program(*options), "names recording", "do not have")


def test_damaged_files_of_the_earlier_stages(prepared, tmp_path, run_program):
    manifests, lang = tmp_path / "manifests", tmp_path / "lang"
    shutil.copytree(prepared.manifests, manifests)
    shutil.copytree(prepared.lang, lang)
    learn = ("prepare_lang", "--manifests-dir", manifests, "--parts", "train", "--lang-dir", lang)
    learn += ("--vocab-size", 40)
    (lang / "lang.json").write_text('{"vocab_size": 4')
    assert_one_line(run_program(*learn), lang / "lang.json", "delete it and run this again")
    truncate(manifests / "supervisions_train.jsonl.gz", 0.5)
    for options in (learn, ("compute_fbank", "--manifests-dir", manifests, "--fbank-dir", tmp_path / "f")):
        assert_one_line(run_program(*options), "supervisions_train.jsonl.gz", "prepare_manifests.py")
    for content in ('{"train": ["train"]}', '["train"]', "{"):
        (manifests / "parts.json").write_text(content)
        assert_one_line(run_program(*options), manifests / "parts.json", "--parts")


def test_a_folder_where_a_file_belongs_and_the_other_way_round(tmp_path, run_program):
    file = tmp_path / "file"
    file.write_text("")
    table = ("prepare_manifests", "--csv", f"train={tmp_path}", "--output-dir", tmp_path / "m")
    assert_one_line(run_program(*table), f"{tmp_path}: Is a directory; name a file")
    corpus = ("prepare_manifests", "--corpus-dir", tmp_path, "--output-dir", file / "m")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.trans.txt").write_text("a HELLO\n")
    assert_one_line(run_program(*corpus), f"{file / 'm'}: Not a directory; name a folder")
    assert_one_line(run_program(*corpus[:-1], file), f"{file}: File exists; move it away")


def test_no_network(tmp_path, run_program, monkeypatch):
    def fails(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("lhotse.recipes.download_librispeech", fails)
    options = ("--corpus", "mini_librispeech", "--download-dir", tmp_path, "--output-dir", tmp_path / "m")
    outcome = run_program("prepare_manifests", *options)
    assert_one_line(outcome, "cannot download train-clean-5", "network", "--corpus-dir")


def test_features_of_missing_manifests_and_of_audio_that_went_away(part, tmp_path, run_program):
    options = ("compute_fbank", "--manifests-dir", tmp_path / "manifests", "--fbank-dir", tmp_path / "fbank")
    assert_one_line(run_program(*options), tmp_path / "manifests", "prepare_manifests.py")
    assert prepare(run_program, tmp_path, "--bad-audio", "skip").status == 0
    truncate(part / "s-1-0001.flac", 0.5)
    for jobs in (1, 2):
        assert_one_line(run_program(*options, "--num-jobs", jobs), "s-1-0001", part, "cannot read its audio")
    assert not (tmp_path / "fbank" / "cuts_train.jsonl.gz").exists()
    skipped = run_program(*options, "--bad-audio", "skip")
    assert skipped.status == 0, skipped.lines
    assert any("left out 1 of 3 cuts" in line for line in skipped.lines), skipped.lines
    assert [c.id for c in load_cuts(tmp_path / "fbank", "train")] == ["s-1-0000", "s-1-0002"]


def test_vocabularies_that_the_text_cannot_give(prepared, tmp_path, run_program):
    def learn(size, *options):
        return run_program("prepare_lang", "--lang-dir", tmp_path, "--vocab-size", size, *options)

    part = ("--manifests-dir", prepared.manifests, "--parts", "train")
    assert_one_line(learn(5000, *part), "too few for a BPE vocabulary of 5000", "at most")
    assert_one_line(learn(4, *part), "vocabulary of 4 is too small", "at least")
    assert_one_line(learn(40, *part[:-1], "trian"), "supervisions_trian", "prepare_manifests")
    assert_one_line(learn(40), "nothing to learn from")
    (tmp_path / "t.xz").write_bytes(b"no xz")
    assert_one_line(learn(40, "--text", tmp_path / "t.xz"), tmp_path / "t.xz", "cannot be read")


def data_module(prepared, **settings):
    config = DataConfig(fbank_dir=str(prepared.fbank), lang_dir=str(prepared.lang), max_duration_s=10.0)
    for key, value in settings.items():
        setattr(config, key, value)
    return DataModule(config, Tokenizer(prepared.lang), lambda frames: ((frames - 1) // 2 - 1) // 2)


def test_training_on_parts_features_and_cuts_that_are_not_there(prepared, tmp_path):
    with pytest.raises(UserError, match="cuts_trian.*compute_fbank.*dev, test, train"):
        next(data_module(prepared, train_parts=["trian"]).train_batches(1))
    with pytest.raises(UserError, match="cuts_train_sp0.9"):
        next(data_module(prepared, speed_perturb=True).train_batches(1))
    cuts = load_cuts(prepared.fbank, "train")
    save_manifest([c.drop_features() for c in cuts], tmp_path / "cuts_train.jsonl.gz")
    with pytest.raises(UserError, match=f"{cuts[0].id} has no features.*on_the_fly_feats"):
        next(data_module(prepared, fbank_dir=str(tmp_path)).train_batches(1))
    save_manifest([*cuts, cuts[5]], tmp_path / "cuts_train.jsonl.gz")
    with pytest.raises(UserError, match=f"{cuts[5].id} appears twice"):
        next(data_module(prepared, fbank_dir=str(tmp_path)).train_batches(1))
    truncate(tmp_path / "cuts_train.jsonl.gz", 0.5)
    with pytest.raises(UserError, match="cannot be read as lhotse cuts"):
        next(data_module(prepared, fbank_dir=str(tmp_path)).train_batches(1))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_truncated_features_name_the_cut_and_the_file(prepared, tmp_path, num_workers):
    shutil.copytree(prepared.fbank, tmp_path / "fbank")
    path = tmp_path / "fbank" / "feats_train" / "00000.f16"
    path.write_bytes(path.read_bytes()[: 160 * 1000])
    data = data_module(prepared, fbank_dir=str(tmp_path / "fbank"), num_workers=num_workers)
    with pytest.raises(UserError) as error:
        list(data.train_batches(1))
    message = str(error.value)
    assert "\n" not in message and "cut 10" in message and str(path) in message and "compute_fbank" in message


def test_audio_that_went_away_is_named_on_the_fly(prepared, tmp_path):
    cuts = load_cuts(prepared.fbank, "train")
    cuts[7].recording.sources[0].source = "/nowhere/x.flac"
    save_manifest(cuts, tmp_path / "cuts_train.jsonl.gz")
    data = data_module(prepared, fbank_dir=str(tmp_path), on_the_fly_feats=True)
    with pytest.raises(UserError, match=f"cut {cuts[7].id}: cannot read its audio /nowhere/x.flac"):
        list(data.train_batches(1))


def test_a_test_cut_too_short_for_the_encoder(prepared, tmp_path):
    cuts = load_cuts(prepared.fbank, "test")
    save_manifest([cuts[0].truncate(duration=0.05)], tmp_path / "cuts_test.jsonl.gz")
    with pytest.raises(UserError, match="too little for one encoder frame"):
        list(data_module(prepared, fbank_dir=str(tmp_path)).test_batches("test", 10.0))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(prepared, small_disk, run_program):
    """Once seen before the work (features of 90 s need 1.4 MB), once in the middle of a write."""
    options = ("--manifests-dir", prepared.manifests, "--fbank-dir", small_disk, "--parts", "train")
    assert_one_line(
        run_program("compute_fbank", *options), "storing the features of train", small_disk, "free"
    )
    (small_disk / "filler").write_bytes(os.urandom(380_000))
    options = ("--corpus-dir", prepared.corpus, "--output-dir", small_disk / "m")
    outcome = run_program("prepare_manifests", *options)
    assert_one_line(outcome, "no space left on the disk", small_disk)
    assert not list(small_disk.rglob("*.tmp")) and not list(small_disk.rglob("parts.json"))
    for path in small_disk.rglob("*.jsonl.gz"):  # what is there is whole
        assert gzip.open(path).read().endswith(b"}\n")


@pytest.mark.parametrize("program", ["prepare_manifests", "compute_fbank", "prepare_lang"])
def test_help_and_a_bad_option_from_the_shell(program):
    path = Path(__file__).resolve().parents[2] / "local" / f"{program}.py"
    shown = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "usage:" in shown.stdout and not shown.stderr
    bad = subprocess.run([sys.executable, path, "--no-such-option"], capture_output=True, text=True)
    assert bad.returncode == 2 and "Traceback" not in bad.stderr
