"""local/emission_delay.py end to end on tiny untrained models: what it writes, what it refuses."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, SupervisionSegment

from transducer_kd import build
from transducer_kd.config import PhaseConfig, TeacherConfig, to_dict
from transducer_kd.data.features import FeatureFileWriter
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.decode import alignment
from transducer_kd.log import UserError
from transducer_kd.models.transducer import Transducer
from transducer_kd.train.checkpoint import save_checkpoint

PROGRAM = Path(__file__).resolve().parents[2] / "local" / "emission_delay.py"
TEXTS = ["turn on the light", "play the song", "stop", "what time is it", "turn off the radio"]


def write_part(fbank_dir, part, texts):
    """One cut of 0.5 s, 0.7 s, ... for each text."""
    rng = np.random.default_rng(len(part))
    cuts = []
    with open(fbank_dir / f"feats_{part}.bin", "wb") as f:
        writer = FeatureFileWriter(f, f"feats_{part}.bin")
        for i, text in enumerate(texts):
            cut_id, duration = f"{part}-{i}", 0.5 + 0.2 * i
            matrix = rng.normal(-8, 4, size=(round(100 * duration), 80)).astype(np.float32)
            supervision = SupervisionSegment(cut_id, cut_id, 0.0, duration, text=text)
            features = writer.write(matrix, cut_id, 0.0, duration)
            cuts.append(MonoCut(cut_id, 0.0, duration, 0, [supervision], features))
    CutSet.from_cuts(cuts).to_file(fbank_dir / f"cuts_{part}.jsonl.gz")


def write_phase(folder, tokenizer, fbank_dir, chunk_size=0):
    config = PhaseConfig(phase=folder.name)
    config.data.fbank_dir, config.data.lang_dir = str(fbank_dir), str(tokenizer.path.parent)
    encoder = config.model.encoder
    encoder.num_layers, encoder.encoder_dim, encoder.feedforward_dim, encoder.num_heads = 1, 8, 16, 2
    encoder.subsampling_channels, encoder.chunk_size, encoder.left_context = 2, chunk_size, 8
    config.model.decoder.decoder_dim = config.model.joiner_dim = 8
    for epoch in (1, 2):
        torch.manual_seed(epoch + chunk_size)
        model = Transducer(config.model, tokenizer.vocab_size)
        content = {"model": model.state_dict(), "config": to_dict(config), "bpe_sha256": tokenizer.sha256}
        save_checkpoint(folder / f"epoch-{epoch}.pt", content)


@pytest.fixture
def folder(tmp_path):
    """fbank/, lang/, other_lang/ and the phases offline/, streaming/ and other/, of another BPE model."""
    (tmp_path / "fbank").mkdir()
    write_part(tmp_path / "fbank", "test-clean", TEXTS[1:])
    write_part(tmp_path / "fbank", "test-other", [" ".join(TEXTS), "stop", "", "play"])  # the first: T' < U
    write_part(tmp_path / "fbank", "empty", [])
    write_part(tmp_path / "fbank", "silent", ["", ""])
    tokenizer, other = (
        train_bpe(texts, tmp_path / name, 40) for name, texts in (("lang", TEXTS), ("other_lang", TEXTS[1:]))
    )
    write_phase(tmp_path / "offline", tokenizer, tmp_path / "fbank")
    write_phase(tmp_path / "streaming", tokenizer, tmp_path / "fbank", 4)
    write_phase(tmp_path / "other", other, tmp_path / "fbank")
    return tmp_path


@pytest.fixture
def run(folder, monkeypatch):
    """Function: runs the program on a phase and a reference, returns what it wrote."""
    spec = importlib.util.spec_from_file_location("emission_delay_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def call(phase, reference, *arguments):
        folders = ["--exp-dir", str(folder / phase), "--reference-exp-dir", str(folder / reference)]
        monkeypatch.setattr(program, "setup_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["emission_delay.py", *folders, *arguments])
        assert program.main() == 0
        return json.loads((folder / phase / "delay.json").read_text())

    return call


def frames_one_by_one(exp_dir, part):
    """Of each cut with text and T' >= U: the frames of its tokens, each cut without batch mates."""
    loaded = build.load_model(exp_dir)
    found = {}
    for batch in build.build_data(loaded.config.data, loaded.tokenizer).test_batches(part, 0.1):
        frames, lens = alignment.emission_frames(loaded.model, batch)
        if 0 < int(batch.y_lens) <= int(lens):
            found[batch.cut_ids[0]] = frames[0, : int(batch.y_lens)].numpy()
    return found


def test_delay_of_each_part(run, folder, caplog):
    caplog.set_level(logging.INFO)
    found = run("streaming", "offline")
    _, taught_by = build.build_teacher(
        TeacherConfig("exp_dir", str(folder / "offline"), use_averaged_model=False),
        build.load_model(folder / "offline").tokenizer,
    )
    expected = {"phase": "offline", "checkpoint": "epoch-2-avg-1", "sha256": taught_by["sha256"]}
    assert found["reference"] == expected  # the hash that meta.json has of a teacher
    assert (found["checkpoint"], found["mode"], found["frame_ms"]) == ("epoch-2-avg-1", "streaming", 40)
    assert "--reference-exp-dir" in found["command"] and found["commit"]
    assert list(found["parts"]) == ["test-clean", "test-other"]
    for part, (num_cuts, left_out) in {"test-clean": (4, 0), "test-other": (2, 2)}.items():
        own, other = (frames_one_by_one(folder / name, part) for name in ("streaming", "offline"))
        delays = np.concatenate([own[cut] - other[cut] for cut in own])
        got = found["parts"][part]
        assert got["mean_frames"] == pytest.approx(delays.mean()) != 0
        assert got["median_frames"] == np.median(delays)
        assert got["low"] <= got["mean_frames"] <= got["high"]
        assert (got["tokens"], got["utterances"], got["left_out"]) == (len(delays), num_cuts, left_out)
        assert f"{part}: delay {got['mean_frames']:.2f} frames" in caplog.text
    assert "test-other: left out 2 utterances" in caplog.text


def test_several_phases_at_once_are_as_each_alone(run, folder):
    def numbers(found):
        return {key: found[key] for key in ("reference", "checkpoint", "mode", "parts")}

    alone = numbers(run("streaming", "offline"))
    (folder / "streaming" / "delay.json").unlink()
    of_last = run("offline", "offline", "--exp-dir", str(folder / "streaming"), str(folder / "offline"))
    assert numbers(json.loads((folder / "streaming" / "delay.json").read_text())) == alone
    assert of_last["mode"] == "offline" and of_last["parts"]["test-clean"]["mean_frames"] == 0


def test_a_model_against_itself_has_no_delay(run, folder):
    for phase, mode in (("streaming", "streaming"), ("offline", "offline")):
        found = run(phase, phase, "--test-parts", "test-clean", "--max-duration", "1")
        assert found["mode"] == mode
        delay = found["parts"]["test-clean"]
        assert [delay[name] for name in ("mean_frames", "low", "high", "median_frames")] == [0, 0, 0, 0]


def test_epochs_and_folders_are_chosen(run, folder, tmp_path):
    chosen = ["--epoch", "1", "--reference-epoch", "2", "--test-parts", "test-clean"]
    found = run("offline", "offline", *chosen)
    assert (found["checkpoint"], found["reference"]["checkpoint"]) == ("epoch-1-avg-1", "epoch-2-avg-1")
    assert found["parts"]["test-clean"]["mean_frames"] != 0
    averaged = run("offline", "streaming", "--avg", "2", "--test-parts", "test-clean")
    assert averaged["checkpoint"] == averaged["reference"]["checkpoint"] == "epoch-2-avg-2"
    for name in ("fbank", "lang"):
        (folder / name).rename(folder / f"moved-{name}")
    moved = ["--fbank-dir", str(folder / "moved-fbank"), "--lang-dir", str(folder / "moved-lang")]
    assert run("offline", "offline", *chosen, *moved)["parts"] == found["parts"]


@pytest.mark.parametrize(
    "phase, reference, arguments, message",
    [
        (
            "streaming",
            "other",
            [],
            "streaming has the BPE model .*lang/bpe.model and .*other another.*tokens",
        ),
        ("streaming", "nothing", [], "no experiment folder .*nothing"),
        ("streaming", "offline", ["--reference-epoch", "7"], "epoch-7.pt does not exist.*epoch-1.pt"),
        (
            "streaming",
            "offline",
            ["--test-parts", "test-clean,x"],
            "cuts_x.*parts there: empty, silent, test",
        ),
        ("streaming", "offline", ["--test-parts", "test-clean,empty"], "cuts_empty.jsonl.gz cannot be read"),
        ("streaming", "offline", ["--test-parts", "silent"], "part silent has no utterance with text"),
        ("streaming", "offline", ["--fbank-dir", "/nonexistent"], "/nonexistent/cuts_test-clean.jsonl.gz"),
        ("streaming", "offline", ["--device", "cuda:99"], "cuda:99"),
    ],
)
def test_what_cannot_work_is_one_clear_error(run, folder, phase, reference, arguments, message):
    with pytest.raises(UserError, match=message):
        run(phase, reference, *arguments)
    assert not (folder / phase / "delay.json").exists()


@pytest.mark.parametrize(
    "arguments", [["--test-parts", ","], ["--max-duration", "0"], ["--num-threads", "-1"], ["--epoch", "x"]]
)
def test_options_that_make_no_sense_end_the_program(run, arguments):
    with pytest.raises(SystemExit):
        run("streaming", "offline", *arguments)
