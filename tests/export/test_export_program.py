"""local/export.py end to end on tiny untrained phases: what it writes, when it fails, what it refuses."""

import copy
import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

from transducer_kd.config import PhaseConfig, to_dict
from transducer_kd.data.tokenizer import Tokenizer
from transducer_kd.export import parity
from transducer_kd.export.card import write_card
from transducer_kd.export.dev_speech import DevSpeech, Loss
from transducer_kd.export.folder import ModelFolder, open_folder
from transducer_kd.log import UserError
from transducer_kd.models.supernet import Supernet
from transducer_kd.train.checkpoint import save_checkpoint

PROGRAM = Path(__file__).resolve().parents[2] / "local" / "export.py"
TEXTS = ["turn on the light", "play the song", "stop", "what time is it", "turn off the radio"]


def write_part(folder, part, num_cuts):
    """Noise that rises and falls, 0.4 s and more, with features of the cuts."""
    rng = np.random.default_rng(len(part))
    cuts = []
    for i in range(num_cuts):
        num_samples = 6400 + 3200 * i
        noise = 0.1 * rng.standard_normal(num_samples) * np.sin(np.arange(num_samples) / 900)
        path = folder / f"{part}-{i}.wav"
        soundfile.write(path, noise, 16000, subtype="FLOAT")
        recording = Recording.from_file(path, recording_id=path.stem)
        said = SupervisionSegment(path.stem, path.stem, 0.0, recording.duration, text=TEXTS[i % len(TEXTS)])
        cuts.append(MonoCut(path.stem, 0.0, recording.duration, 0, [said], recording=recording))
    CutSet.from_cuts(cuts).to_file(folder / f"cuts_{part}.jsonl.gz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, lang_dir, streaming_model, offline_model, las_model):
    """A folder with fbank/ and the phases streaming/, offline/, las/ and dual/."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fbank").mkdir()
    for part, num_cuts in (("test-clean", 3), ("test-other", 2), ("dev", 5), ("train", 1)):
        write_part(folder / "fbank", part, num_cuts)
    tokenizer = Tokenizer(lang_dir)
    config = PhaseConfig()
    config.data.fbank_dir, config.data.lang_dir = str(folder / "fbank"), str(lang_dir)
    config.data.on_the_fly_feats, config.data.train_parts = True, ["train"]
    dual = Supernet(dataclasses.replace(streaming_model.config, pruned_groups="unit"), tokenizer.vocab_size)
    dual.load_state_dict({**dual.state_dict(), **streaming_model.state_dict()})
    kept = {name: mask.clone() for name, mask in dual.masks.kept().items()}
    for mask in kept.values():
        mask[..., ::2] = False
    dual.masks.assign(kept)
    models = {"streaming": streaming_model, "offline": offline_model, "las": las_model, "dual": dual}
    for name, model in models.items():
        model = copy.deepcopy(model)
        with torch.no_grad():  # no trained model says <sos/eos>, which sherpa-onnx prints
            model.joiner.output_linear.bias[1] = -1e4
        objective = {"dual": "dual_mode", "las": "las"}.get(name, "transducer")
        own = dataclasses.replace(config, phase=name, model=model.config, objective=objective)
        content = {"model": model.state_dict(), "config": to_dict(own), "bpe_sha256": tokenizer.sha256}
        save_checkpoint(folder / name / "epoch-1.pt", content)
    return folder


@pytest.fixture
def export(trained, tmp_path, monkeypatch):
    """Function: exports a phase into a folder of the test; returns exit status and where the export is, which
    is set aside where random weights do not pass the gate.
    """
    spec = importlib.util.spec_from_file_location("export_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "setup_logging", lambda: None)
    # What int8 loses on random weights would be searched for long, and says nothing: test_quantise.py.
    monkeypatch.setattr(DevSpeech, "loss", lambda speech, folder, only: Loss(0.0, ()))

    def run(phase, *arguments):
        given = ["--exp-dir", trained / phase, "--output-dir", tmp_path / phase, *arguments]
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, given)])
        status = program.main()
        return status, tmp_path / (f"{phase}.failed" if status else phase)

    return run


def words_of(gate):
    return {(r["mode"], r["two_pass"], r["implementation"], r["test_set"]) for r in gate["words"]}


def test_a_streaming_phase_with_a_second_pass(export, capsys):
    status, folder = export("las")
    gate = json.loads((folder / "gate.json").read_text())
    assert status == (0 if gate["passed"] else 1)
    opened = open_folder(folder)
    assert opened.modes == ("streaming", "offline") and opened.precisions == ("float", "int8")
    info = opened.info
    assert (info["phase"], info["checkpoint"], info["rescore"]["tuned_on"]) == ("las", "epoch-1-avg-1", "dev")
    assert (info["recipe"], info["join_prob"]) == ("two_pass", 0.0)
    assert info["rescore"]["beam_size"] == 16 and 0 <= info["rescore"]["mu"] <= 1
    files = {path.name for path in folder.iterdir()}
    assert files == {*info["files"], "model.json", "gate.json", "README.md"}, "nothing is left of the search"
    # What is exact has to be equal; how much int8 loses on random weights is no matter here.
    assert all(row["passed"] for row in gate["words"] if row["implementation"] != "int8")
    assert all(row["passed"] for row in gate["tensors"])
    parts = ("test-clean", "test-other")
    one_pass = {
        ("streaming", False, name, p) for p in parts for name in ("pytorch", "chunks", "onnx", "int8")
    }
    one_pass |= {("offline", False, name, p) for p in parts for name in ("pytorch", "onnx", "int8")}
    two_pass = {(m, True, name, p) for m, _, name, p in one_pass if name != "chunks"}
    assert words_of(gate) == one_pass | two_pass
    assert all(len(set(list(row["words"].values())[:-1])) == 1 for row in gate["odd"]), "all but int8"
    table = capsys.readouterr().out
    assert table.count("\n") > 30 and "test-other" in table and "the gate is" in table
    card = (folder / "README.md").read_text()
    assert info["files"]["model.safetensors"]["sha256"] in card and "two passes" in card
    assert f"{info['params_deployed']:,} in all" in card


def test_a_phase_of_two_modes_has_its_own_of_each(export):
    _, folder = export("dual", "--test-parts", "test-clean")
    gate = json.loads((folder / "gate.json").read_text())
    assert all(row["passed"] for row in gate["words"] if row["implementation"] != "int8")
    assert all(row["passed"] for row in gate["tensors"])
    assert {row["mode"] for row in gate["words"]} == {"streaming", "offline"}
    said = {row["mode"]: row["wer"] for row in gate["words"] if row["implementation"] == "pytorch"}
    odd = {
        row["mode"]: [r["words"]["pytorch"] for r in gate["odd"] if r["mode"] == row["mode"]]
        for row in gate["odd"]
    }
    assert odd["streaming"] != odd["offline"], said


def test_an_offline_phase(export):
    _, folder = export("offline", "--test-parts", "test-clean")
    gate = json.loads((folder / "gate.json").read_text())
    assert open_folder(folder).modes == ("offline",)
    assert {row["implementation"] for row in gate["words"]} == {"pytorch", "onnx", "int8"}


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_gate_that_is_not_passed_fails_the_program_and_leaves_the_old_export(
    export, monkeypatch, capsys, caplog
):
    real = parity.word_rows

    def made_up(comparison, test_set, said):
        wrong = [(name, ref, [*hyp, "NOISE"]) for name, ref, hyp in said["onnx"]]
        return real(comparison, test_set, {**said, "onnx": wrong})

    _, folder = export("streaming", "--skip-gate")
    (folder / "bench.json").write_text("of the old files")
    before, failed = content(folder), folder.with_name("streaming.failed")
    with monkeypatch.context() as patched:
        patched.setattr(parity, "word_rows", made_up)
        assert export("streaming", "--test-parts", "test-clean") == (1, failed)
    assert content(folder) == before
    gate = json.loads((failed / "gate.json").read_text())
    assert not gate["passed"] and not (failed / "bench.json").exists()
    lines = capsys.readouterr().out.splitlines()
    assert any("onnx" in line and "0 of 3" in line and line.endswith("NOT PASSED") for line in lines)
    assert lines[-1] == "the gate is NOT PASSED" and f"look at {failed}" in caplog.text
    assert "**The parity gate is NOT passed.**" in (failed / "README.md").read_text()
    open_folder(failed)
    export("streaming", "--skip-gate")
    assert not failed.exists() and not (folder / "bench.json").exists()


def test_an_export_that_is_killed_leaves_the_old_one_with_its_gate_and_its_mark(export, trained, monkeypatch):
    path = trained / "offline" / "export"
    arguments = ("offline", "--output-dir", str(path), "--test-parts", "test-clean")
    export(*arguments, "--skip-gate")
    (path / "gate.json").write_text("{}")
    mark = trained / "offline" / ".done-export"
    mark.touch()
    before = content(path)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(parity, "check", killed)
        export(*arguments)
    assert content(path) == before and mark.exists()
    export(*arguments, "--skip-gate")
    assert not mark.exists() and not list(path.parent.glob(".export.*"))
    shutil.rmtree(path)


def test_the_gate_can_be_left_out(export):
    status, folder = export("streaming", "--skip-gate")
    assert status == 0 and not (folder / "gate.json").exists()
    assert "Not measured" in (folder / "README.md").read_text()


@pytest.mark.parametrize("corpus, is_told", [("synthetic", True), ("librispeech", False)])
def test_the_card_tells_synthetic_speech(export, corpus, is_told):
    _, folder = export("streaming", "--skip-gate")
    write_card(ModelFolder(folder, {**open_folder(folder).info, "corpus": corpus}), None)
    assert ("Synthetic speech" in (folder / "README.md").read_text()) is is_told


def test_an_earlier_gate_does_not_outlive_the_folder_that_it_was_of(export, tmp_path):
    (tmp_path / "streaming").mkdir()
    (tmp_path / "streaming/gate.json").write_text("{}")
    _, folder = export("streaming", "--skip-gate")
    assert not (folder / "gate.json").exists()


def test_an_export_by_hand_takes_the_mark_of_run_sh_away(export, trained):
    mark = trained / "streaming" / ".done-export"
    mark.touch()
    export("streaming", "--skip-gate")
    assert mark.exists(), "that was another folder"
    export("streaming", "--skip-gate", "--output-dir", str(trained / "streaming" / "export"))
    assert not mark.exists()
    shutil.rmtree(trained / "streaming" / "export")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--dev-part", "train"], "was trained on it"),
        (["--dev-part", "nowhere"], "cuts_nowhere.jsonl.gz does not exist"),
        (["--test-parts", "nowhere"], "cuts_nowhere.jsonl.gz does not exist"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_written(export, tmp_path, arguments, words):
    with pytest.raises(UserError, match=words):
        export("streaming", *arguments)
    assert not (tmp_path / "streaming").exists()


def test_nothing_is_chosen_on_what_is_tested(export, capsys):
    with pytest.raises(SystemExit):
        export("streaming", "--dev-part", "test-clean")
    assert "nothing may be chosen on what is tested" in capsys.readouterr().err
