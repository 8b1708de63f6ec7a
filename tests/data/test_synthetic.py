"""The synthetic corpus: what is said, how it sounds, and that it is the same however it was made."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from transducer_kd.data import synthetic, synthetic_acoustics, synthetic_espeak, synthetic_grammar
from transducer_kd.log import UserError

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "local" / "make_synthetic_corpus.py"
SMOKE = synthetic.SCALES["smoke"]


def files_of(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def mini_tasks():
    return synthetic.plan(synthetic.SCALES["mini"], seed=1)


@pytest.fixture(scope="module")
def smoke_corpus(tmp_path_factory):
    pytest.importorskip("espeakng_loader", reason="speaks with espeak-ng")
    root = tmp_path_factory.mktemp("corpus") / "LibriSpeech"
    synthetic.make_corpus(root, "smoke", seed=1, num_jobs=2)
    return root


# What is said


def test_vocabulary_has_a_few_hundred_words_in_plain_letters():
    words = synthetic_grammar.vocabulary()
    assert 250 <= len(words) <= 350
    assert all(word.replace("'", "").isalpha() and word.islower() for word in words)
    assert {"fifteen", "fifty", "anne", "jan", "dan", "o'clock"} <= set(words)


def test_sentences_are_unique_and_disjoint_between_parts_also_across_scales_and_seeds(mini_tasks):
    owner = {}
    for tasks in (mini_tasks, synthetic.plan(SMOKE, 1), synthetic.plan(SMOKE, 2)):
        said = set()
        for task in tasks:
            for text in task.texts:
                assert text not in said, "a sentence comes twice in one corpus"
                said.add(text)
                assert owner.setdefault(text, task.part.name) == task.part.name
    assert len(owner) > 4000
    fewest, most = synthetic.SCALES["mini"].words
    assert all(fewest <= len(text.split()) <= most for task in mini_tasks for text in task.texts)


def test_part_shares_follow_their_weights():
    rng = np.random.default_rng(0)
    shares = (("a", 3), ("b", 1))
    sentences = [synthetic_grammar.random_sentence(rng) for _ in range(2000)]
    fraction = np.mean([synthetic_grammar.part_of(s, shares) == "a" for s in sentences])
    assert abs(fraction - 0.75) < 0.04  # four standard deviations


def test_a_grammar_without_enough_sentences_says_so():
    with pytest.raises(ValueError, match="only 0 of 1 sentences"):
        synthetic_grammar.draw_sentences(np.random.default_rng(0), "a", (("a", 1),), 1, (90, 91))


# Who says it


def test_speakers_and_variants_are_disjoint_and_test_other_has_unseen_accents():
    spec = synthetic.SCALES["mini"]
    speakers = {part.name: dict(synthetic.speakers_of(spec, part)) for part in spec.parts}
    for part in spec.parts:
        voices = list(speakers[part.name].values())
        assert len(set(voices)) == len(voices) == part.num_speakers + part.num_shared_speakers
    trained = {**speakers["train"], **speakers["unlabelled"]}
    heldout = [set(speakers[name]) for name in ("dev", "test-clean", "test-other")]
    assert not set(trained) & set.union(*heldout)
    assert sum(len(s) for s in heldout) == len(set.union(*heldout))
    variants = {voice.split("+")[1] for voice in trained.values()}
    for name in ("dev", "test-clean", "test-other"):
        assert not variants & {v.split("+")[1] for v in speakers[name].values()}
    accents = {name: {voice.split("+")[0] for voice in speakers[name].values()} for name in speakers}
    assert not accents["train"] & accents["test-other"]
    assert len(accents["unlabelled"] & accents["test-other"]) == 2 and len(accents["test-other"]) == 3
    assert len(set(speakers["train"]) & set(speakers["unlabelled"])) == 12


def test_mini_has_the_promised_sizes(mini_tasks):
    counts = {}
    for task in mini_tasks:
        counts[task.part.name] = counts.get(task.part.name, 0) + len(task.texts)
        assert len(task.texts) == task.part.utterances_per_speaker
        assert len(task.texts) <= len(task.chapters) * task.chapter_size
    assert counts["dev"] >= 200 and counts["test-clean"] >= 400 and counts["test-other"] >= 400
    chapters = [c for task in mini_tasks for c in task.chapters]
    assert len(set(chapters)) == len(chapters)


def test_voices_are_checked_because_espeak_accepts_unknown_variants():
    pytest.importorskip("espeakng_loader", reason="reads espeak-ng's data")
    synthetic_espeak.check_voice("en-gb-scotland+f2")
    with pytest.raises(UserError, match="no variant 'f77'"):
        synthetic_espeak.check_voice("en-us+f77")
    with pytest.raises(UserError, match="no voice 'en-xx'.*en-gb-scotland"):
        synthetic_espeak.check_voice("en-xx+f2")


# How it sounds


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_noise_spectrum_falls_as_asked(exponent):
    noise = synthetic_acoustics.coloured_noise(np.random.default_rng(0), 1 << 17, exponent)
    assert np.mean(noise**2) == pytest.approx(1.0)
    power = np.abs(np.fft.rfft(noise)) ** 2
    hertz = np.fft.rfftfreq(len(noise), 1 / 16000)
    low, high = (power[(hertz > f / 1.1) & (hertz < f * 1.1)].mean() for f in (200, 3200))
    assert np.log2(low / high) / 4 == pytest.approx(exponent, abs=0.1)  # 200 to 3200 Hz are 4 octaves


def test_room_decays_by_60_db_in_its_rt60():
    rt60_s = 0.4
    response = synthetic_acoustics.room_response(np.random.default_rng(0), rt60_s)
    assert response[0] == 1.0 and len(response) == int(rt60_s * 16000)
    energy = np.cumsum(response[::-1] ** 2)[::-1]  # Schroeder's backward integral
    decibels = 10 * np.log10(energy / energy[0])
    early, late = (np.argmax(decibels < level) for level in (-15, -35))
    assert 3 * (late - early) / 16000 == pytest.approx(rt60_s, rel=0.15)


@pytest.mark.parametrize("snr_db", [0.0, 10.0, 20.0])
def test_snr_is_the_one_asked_for(snr_db):
    rng = np.random.default_rng(3)
    dry = 1000.0 * np.sin(2 * np.pi * 440 * np.arange(64000) / 16000)
    heard = synthetic_acoustics.recorded(rng, dry, np.ones(1), 0.0, snr_db).astype(float)
    assert 4.1 * 16000 <= len(heard) <= 4.6 * 16000 and np.abs(heard).max() < 32767
    # The tone sits in one place of the spectrum; what remains of the middle second is noise.
    middle = heard[24000:40000]
    spectrum = np.abs(np.fft.rfft(middle)) ** 2
    tone = spectrum[435:446].sum()
    noise = (spectrum.sum() - tone) * len(spectrum) / (len(spectrum) - 11)
    assert 10 * np.log10(tone / noise) == pytest.approx(snr_db, abs=0.4)


def test_one_process_has_one_synthesiser_and_no_clock_in_its_voice():
    pytest.importorskip("espeakng_loader", reason="speaks with espeak-ng")
    # f2 breathes: espeak makes breath from random numbers that it seeds from the clock unless told otherwise.
    code = (
        "import hashlib; from transducer_kd.data.synthetic_espeak import Espeak\n"
        "e = Espeak('en-us+f2'); x = e.speak('turn off the radio', 160, 50)\n"
        "print(hashlib.sha256(x.tobytes()).hexdigest(), len(x))\n"
        "try: Espeak('en-us+f2')\n"
        "except RuntimeError as e: print('refused')\n"
    )
    answers = []
    for _ in range(2):
        answers.append(
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
        )
        time.sleep(1.1)  # so that the clock shows another second
    _, samples, refused = answers[0].split()
    assert answers[0] == answers[1] and refused == "refused" and 11025 < int(samples) < 44100


# The folder


def test_layout_is_librispeech(smoke_corpus):
    summary = json.loads((smoke_corpus / "corpus.json").read_text())
    assert summary["complete"] and summary["seed"] == 1 and summary["scale"] == "smoke"
    listed = [line.split(" | ") for line in (smoke_corpus / "SPEAKERS.TXT").read_text().splitlines()[1:]]
    for part in SMOKE.parts:
        folder = smoke_corpus / part.name
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            row[0] for row in listed if row[2] == part.name
        )
        seconds = 0.0
        for transcript in sorted(folder.glob("*/*/*.trans.txt")):
            speaker, chapter = transcript.parent.parent.name, transcript.parent.name
            assert transcript.name == f"{speaker}-{chapter}.trans.txt"
            lines = transcript.read_text().splitlines()
            assert len(lines) == len(list(transcript.parent.glob("*.flac"))) == 6
            for i, line in enumerate(lines):
                utterance, text = line.split(" ", 1)
                assert utterance == f"{speaker}-{chapter}-{i:04d}" and text == text.upper()
                info = soundfile.info(str(transcript.parent / f"{utterance}.flac"))
                assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
                assert 0.8 < info.duration < 6.0
                seconds += info.duration
        assert summary["parts"][part.name]["hours"] == pytest.approx(seconds / 3600, abs=1e-4)


def test_number_of_jobs_does_not_matter_and_a_missing_speaker_is_made_again(smoke_corpus, tmp_path):
    root = tmp_path / "one"
    synthetic.make_corpus(root, "smoke", seed=1, num_jobs=1)
    expected = files_of(smoke_corpus)
    assert files_of(root) == expected
    shutil.rmtree(root / "dev" / "301")
    untouched = root / "dev" / "302" / "30002" / "302-30002-0000.flac"
    stamp = untouched.stat().st_mtime_ns
    synthetic.make_corpus(root, "smoke", seed=1, num_jobs=2)
    assert files_of(root) == expected and untouched.stat().st_mtime_ns == stamp


def test_killed_run_leaves_no_half_file_and_goes_on(smoke_corpus, tmp_path):
    root = tmp_path / "killed"
    command = [sys.executable, str(PROGRAM), "--output-dir", str(root), "--scale", "smoke", "--num-jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(root.glob("train/1*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    expected = files_of(smoke_corpus)
    time.sleep(1)  # workers that were speaking may finish their speaker
    finished = {p: b for p, b in files_of(root).items() if not any(x.startswith(".") for x in p.parts)}
    assert any(p.suffix == ".flac" for p in finished) and Path("SPEAKERS.TXT") not in finished
    for path, data in finished.items():
        assert path.name == "corpus.json" or data == expected[path], path
    (root / "train" / ".999.1.tmp").mkdir()  # as a worker killed in the middle would leave it
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert files_of(root) == expected


def test_folder_of_another_corpus_is_refused(smoke_corpus, tmp_path):
    with pytest.raises(UserError, match="seed 1 instead of 2"):
        synthetic.make_corpus(smoke_corpus, "smoke", seed=2, num_jobs=1)
    with pytest.raises(UserError, match="scale 'smoke' instead of 'mini'"):
        synthetic.make_corpus(smoke_corpus, "mini", seed=1, num_jobs=1)
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        synthetic.make_corpus(tmp_path, "smoke", seed=1, num_jobs=1)
    with pytest.raises(UserError, match="no synthetic corpus of scale 'huge'"):
        synthetic.make_corpus(tmp_path, "huge", seed=1, num_jobs=1)


def test_too_small_a_disk_is_told_before_anything_is_made(tmp_path, monkeypatch):
    pytest.importorskip("espeakng_loader", reason="reads espeak-ng's data")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="the synthetic corpus .smoke. needs about"):
        synthetic.make_corpus(tmp_path / "new", "smoke", seed=1, num_jobs=1)


def test_program_reports_an_unusable_folder_in_one_line(tmp_path):
    (tmp_path / "corpus.json").write_text("{")
    command = [sys.executable, str(PROGRAM), "--output-dir", str(tmp_path), "--scale", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "corpus.json" in done.stderr
