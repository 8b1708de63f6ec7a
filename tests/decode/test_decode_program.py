"""local/decode.py end to end on a tiny untrained model: what it writes, how it refuses what cannot work."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lhotse import CutSet, MonoCut, SupervisionSegment

from transducer_kd.config import PhaseConfig, to_dict
from transducer_kd.data.features import FeatureFileWriter
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.decode import evaluate
from transducer_kd.log import UserError
from transducer_kd.models.transducer import Transducer
from transducer_kd.train.checkpoint import save_checkpoint

PROGRAM = Path(__file__).resolve().parents[2] / "local" / "decode.py"
SUFFIX = "test-clean-epoch-2-avg-1-streaming-chunk-size-4-max-sym-per-frame-1.txt"
BEAM, BEAM_RESCORE = "modified_beam_search", "modified_beam_search_las_rescore"
TEXTS = ["turn on the light", "play the song", "stop", "what time is it", "turn off the radio"]


def write_part(fbank_dir, part, num_cuts, texts=TEXTS):
    rng = np.random.default_rng(len(part))
    cuts = []
    with open(fbank_dir / f"feats_{part}.bin", "wb") as f:
        writer = FeatureFileWriter(f, f"feats_{part}.bin")
        for i in range(num_cuts):
            cut_id, duration = f"{part}-{i}", 0.5 + 0.1 * i
            matrix = rng.normal(-8, 4, size=(round(100 * duration), 80)).astype(np.float32)
            supervision = SupervisionSegment(cut_id, cut_id, 0.0, duration, text=texts[i % len(texts)])
            features = writer.write(matrix, cut_id, 0.0, duration)
            cuts.append(MonoCut(cut_id, 0.0, duration, 0, [supervision], features))
    CutSet.from_cuts(cuts).to_file(fbank_dir / f"cuts_{part}.jsonl.gz")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with fbank/, lang/ and two phases, exp/ and, with a LAS, exp_las/ (epochs 1 and 2)."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "fbank").mkdir()
    tokenizer = train_bpe(TEXTS, folder / "lang", 40)
    write_part(folder / "fbank", "test-clean", 5)
    write_part(folder / "fbank", "test-other", 3)
    write_part(folder / "fbank", "dev", 6)
    config = PhaseConfig()
    config.data.fbank_dir, config.data.lang_dir = str(folder / "fbank"), str(folder / "lang")
    encoder = config.model.encoder
    encoder.num_layers, encoder.encoder_dim, encoder.feedforward_dim, encoder.num_heads = 1, 8, 16, 2
    encoder.subsampling_channels, encoder.chunk_size, encoder.left_context = 2, 4, 8
    config.model.decoder.decoder_dim = config.model.joiner_dim = 8
    las = config.model.las
    las.decoder_dim, las.attention_dim, las.num_heads = 12, 8, 2
    for name, las.enabled in (("exp", False), ("exp_las", True)):
        torch.manual_seed(0)
        model = Transducer(config.model, tokenizer.vocab_size)
        for epoch in (1, 2):
            content = {"model": model.state_dict(), "config": to_dict(config), "bpe_sha256": tokenizer.sha256}
            save_checkpoint(folder / name / f"epoch-{epoch}.pt", content)
    return folder


@pytest.fixture
def decode(trained, tmp_path, monkeypatch):
    return program_on(trained / "exp", tmp_path, monkeypatch)


@pytest.fixture
def decode_las(trained, tmp_path, monkeypatch):
    return program_on(trained / "exp_las", tmp_path, monkeypatch)


def program_on(phase, tmp_path, monkeypatch):
    """Runs the program's main with arguments on a copy of the phase's folder, which it returns."""
    spec = importlib.util.spec_from_file_location("decode_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    exp_dir = tmp_path / "exp"
    exp_dir.mkdir()
    for path in phase.iterdir():
        (exp_dir / path.name).symlink_to(path)

    def run(*arguments):
        monkeypatch.setattr(program, "setup_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["decode.py", "--exp-dir", str(exp_dir), *arguments])
        assert program.main() == 0
        return exp_dir

    run.exp_dir = exp_dir
    return run


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_results_records_and_table(decode, capsys):
    methods = [
        "--decoding-method",
        "greedy_search,streaming_greedy_search",
        "--decoding-method",
        "greedy_search",
    ]
    exp_dir = decode(*methods)
    records = json.loads((exp_dir / "metrics.json").read_text())
    found = {(r["test_set"], r["method"]): r for r in records}
    assert len(records) == len(found) == 4
    clean = found["test-clean", "greedy_search"]
    assert (clean["phase"], clean["mode"], clean["chunk_size"]) == ("teacher", "streaming", 4)
    assert (clean["checkpoint"], clean["num_utts"], clean["ref_words"]) == ("epoch-2-avg-1", 5, 16)
    assert clean["audio_s"] == pytest.approx(3.5)
    assert clean["bytes"] == 4 * clean["params_deployed"] > 0
    assert clean["second_pass_s"] is None
    assert clean["recogs"] == f"greedy_search/recogs-{SUFFIX}"
    assert clean["wer_low"] <= clean["wer"] <= clean["wer_high"]
    assert clean["errors"] == clean["insertions"] + clean["deletions"] + clean["substitutions"]
    assert clean["wer"] == pytest.approx(100 * clean["errors"] / 16)
    assert "--decoding-method" in clean["command"]
    assert clean["wer"] == found["test-clean", "streaming_greedy_search"]["wer"]
    for kind in ("recogs", "errs", "wer-summary"):
        assert f"{kind}-{SUFFIX}" in names(exp_dir / "greedy_search")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5
    assert table[1].split()[:2] == ["test-clean", "greedy_search"]


def test_decoding_again_replaces_records_and_other_modes_stay(decode):
    decode("--test-parts", "test-clean")
    decode("--test-parts", "test-clean", "--epoch", "1")
    exp_dir = decode("--test-parts", "test-clean", "--chunk-size", "0")
    records = json.loads((exp_dir / "metrics.json").read_text())
    assert [(r["mode"], r["checkpoint"]) for r in records] == [
        ("streaming", "epoch-1-avg-1"),
        ("offline", "epoch-2-avg-1"),
    ]


def test_a_stopped_decoding_keeps_what_was_finished(decode, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "modified_beam_search", stopped)
    with pytest.raises(KeyboardInterrupt):
        decode("--decoding-method", "modified_beam_search,greedy_search", "--test-parts", "test-other")
    assert [r["method"] for r in json.loads((decode.exp_dir / "metrics.json").read_text())] == [
        "greedy_search"
    ]
    assert names(decode.exp_dir) == ["epoch-1.pt", "epoch-2.pt", "greedy_search", "metrics.json"]
    assert len(names(decode.exp_dir / "greedy_search")) == 3


def test_a_quick_look_writes_no_record(decode):
    exp_dir = decode("--num-utts", "1", "--max-duration", "1", "--test-parts", "test-clean")
    assert not (exp_dir / "metrics.json").exists()
    assert all("-first-1.txt" in name for name in names(exp_dir / "greedy_search"))


def test_lattices_are_saved_per_part(decode, tmp_path):
    pytest.importorskip("k2", reason="lattices need k2")
    decode("--decoding-method", "fast_beam_search", "--save-lattices", str(tmp_path / "lattices"))
    assert names(tmp_path / "lattices") == ["test-clean", "test-other"]
    assert names(tmp_path / "lattices" / "test-clean") == ["lattices-00000.pt"]


def metrics(exp_dir):
    records = json.loads((exp_dir / "metrics.json").read_text())
    return {(r["test_set"], r["method"]): r for r in records}


@pytest.mark.parametrize("first_pass", [BEAM, "fast_beam_search_nbest"])
def test_a_second_pass_is_tuned_kept_and_used(decode_las, first_pass, caplog, capsys):
    if first_pass != BEAM:
        pytest.importorskip("k2", reason="lattices need k2")
    method = first_pass + "_las_rescore"
    caplog.set_level(logging.INFO)
    exp_dir = decode_las("--decoding-method", f"{first_pass},{method}", "--tune-part", "dev")
    (kept,) = json.loads((exp_dir / "rescore.json").read_text()).values()
    assert (kept["part"], kept["method"], kept["num_utts"]) == ("dev", method, 6)
    assert (kept["checkpoint"], kept["settings"]["chunk_size"]) == ("epoch-2-avg-1", 4)
    assert kept["wer_oracle"] <= kept["wer_after"] <= kept["wer_before"]
    tuned = f"mu {kept['mu']:g} and length_weight {kept['length_weight']:g}, tuned on dev (6 utterances)"
    assert f"{method}: {tuned}: WER {kept['wer_before']:.2f}% -> {kept['wer_after']:.2f}%" in caplog.text

    found = metrics(exp_dir)
    assert len(found) == 4
    first, rescored = found["test-clean", first_pass], found["test-clean", method]
    weights = {"mu": kept["mu"], "length_weight": kept["length_weight"], "tuned_on": "dev"}
    assert rescored["parameters"] == {**first["parameters"], "rescore_nbest": 16, **weights}
    assert 0 < rescored["second_pass_s"] < rescored["decode_s"]
    assert first["second_pass_s"] is None
    las_parameters = rescored["params_deployed"] - first["params_deployed"]
    assert las_parameters == sum(p.numel() for p in weights_of_las(exp_dir))
    assert [r["bytes"] for r in (first, rescored)] == [4 * r["params_deployed"] for r in (first, rescored)]
    for record in found.values():
        assert (exp_dir / record["recogs"]).read_text().startswith(f"{record['test_set']}-0:\tref=")
    header, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header[-1] == "2nd/1st"
    assert {row[1]: row[-1] for row in rows} == {first_pass: "-", method: "%"}

    decode_las("--decoding-method", method, "--test-parts", "test-clean")
    again = metrics(exp_dir)["test-clean", method]
    assert (again["parameters"], again["errors"]) == (rescored["parameters"], rescored["errors"])
    for arguments, message in (
        (["--epoch", "1"], "tuned with the weights epoch-2-avg-1, not epoch-1-avg-1"),
        (["--chunk-size", "0"], "tuned with search options"),
        (["--rescore-nbest", "2"], "tuned with search options"),
        (["--test-parts", "test-clean,dev"], "tuned on dev, which is to be decoded"),
    ):
        with pytest.raises(UserError, match=message):
            decode_las("--decoding-method", method, *arguments)


def weights_of_las(exp_dir):
    state = torch.load(exp_dir / "epoch-2.pt", map_location="cpu")["model"]
    return [value for name, value in state.items() if name.startswith("las.")]


def test_a_second_pass_without_weights_is_refused_before_any_work(decode_las):
    with pytest.raises(UserError, match="rescore.json has no weights of the two passes.*--tune-part dev"):
        decode_las("--decoding-method", f"greedy_search,{BEAM_RESCORE}")
    (decode_las.exp_dir / "rescore.json").write_text("{")
    with pytest.raises(UserError, match="rescore.json is damaged"):
        decode_las("--decoding-method", f"greedy_search,{BEAM_RESCORE}")
    with pytest.raises(UserError, match="cuts_dev-2.*does not exist"):
        decode_las("--decoding-method", BEAM_RESCORE, "--tune-part", "dev-2")
    assert names(decode_las.exp_dir) == ["epoch-1.pt", "epoch-2.pt", "rescore.json"]
    decode_las("--decoding-method", BEAM_RESCORE, "--tune-part", "dev")  # replaces it
    assert list(json.loads((decode_las.exp_dir / "rescore.json").read_text())) == [BEAM_RESCORE]


def test_a_part_of_the_training_cannot_tune(decode_las, tmp_path):
    for part in ("train", "test-clean"):
        write_part(tmp_path, part, 1)
    arguments = ["--fbank-dir", str(tmp_path), "--test-parts", "test-clean", "--tune-part", "train"]
    with pytest.raises(UserError, match="--tune-part train: .*exp was trained on it.*name a dev part"):
        decode_las("--decoding-method", BEAM_RESCORE, *arguments)
    assert names(decode_las.exp_dir) == ["epoch-1.pt", "epoch-2.pt"]


def test_weights_by_hand_and_a_quick_look_leave_no_tuning(decode_las):
    by_hand = ["--las-mu", "0.0", "--las-length-weight", "0"]
    exp_dir = decode_las("--decoding-method", f"{BEAM},{BEAM_RESCORE}", *by_hand)
    found = metrics(exp_dir)
    first, rescored = found["test-other", BEAM], found["test-other", BEAM_RESCORE]
    assert rescored["errors"] == first["errors"]
    assert rescored["parameters"] == {**first["parameters"], "rescore_nbest": 16, "mu": 0.0,
                                      "length_weight": 0.0, "tuned_on": None}  # fmt: skip
    decode_las("--decoding-method", BEAM_RESCORE, "--tune-part", "dev", "--num-utts", "2")
    assert not (exp_dir / "rescore.json").exists()


def test_references_of_test_parts_have_no_influence_on_the_weights(decode_las, trained, tmp_path):
    kept = []
    for number, texts in enumerate((TEXTS, ["LIGHT", "SONG RADIO"])):
        folder = tmp_path / f"fbank-{number}"
        folder.mkdir()
        for part, count, said in (("dev", 6, TEXTS), ("test-clean", 5, texts)):
            write_part(folder, part, count, said)
        exp_dir = decode_las(
            "--decoding-method", BEAM_RESCORE, "--tune-part", "dev", "--test-parts", "test-clean",
            "--fbank-dir", str(folder),
        )  # fmt: skip
        kept.append((json.loads((exp_dir / "rescore.json").read_text()), metrics(exp_dir)))
    assert kept[0][0] == kept[1][0]
    a, b = (found["test-clean", BEAM_RESCORE] for _, found in kept)
    assert a["parameters"] == b["parameters"] and a["ref_words"] != b["ref_words"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epoch", "7"], "epoch-7.pt does not exist.*epoch-1.pt, epoch-2.pt"),
        (["--epoch", "-1"], "best-valid.pt does not exist"),
        (["--avg", "3"], "--avg 3"),
        (
            ["--test-parts", "test-clean,test-third"],
            "cuts_test-third.*parts there: dev, test-clean, test-other",
        ),
        (["--decoding-method", "greedy"], "--decoding-method greedy is not known; known: greedy_search"),
        (["--decoding-method", "streaming_greedy_search", "--chunk-size", "0"], "needs a chunk size"),
        (["--decoding-method", BEAM_RESCORE, "--tune-part", "dev"], f"{BEAM_RESCORE} needs a LAS"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--exp-dir", "/nonexistent/exp"], "no experiment folder /nonexistent/exp"),
        (["--fbank-dir", "/nonexistent"], "/nonexistent/cuts_test-clean.jsonl.gz does not exist"),
    ],
)
def test_what_cannot_work_is_one_clear_error_before_any_work(decode, arguments, message):
    with pytest.raises(UserError, match=message):
        decode(*arguments)
    assert names(decode.exp_dir) == ["epoch-1.pt", "epoch-2.pt"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--beam-size", "0"],
        ["--beam", "nan"],
        ["--avg", "0"],
        ["--save-lattices", "x"],
        ["--epoch", "two"],
        ["--epoch", "-3"],
        ["--epoch", "-1", "--avg", "2"],
        ["--epoch", "-1", "--use-averaged-model"],
        ["--num-threads", "-2"],
        ["--num-utts", "-1"],
        ["--chunk-size", "-2"],
        ["--tune-part", "dev"],  # without a method that needs it
        ["--tune-part", "test-clean", "--decoding-method", BEAM_RESCORE],
        [
            "--tune-part",
            "dev",
            "--decoding-method",
            BEAM_RESCORE,
            "--las-mu",
            "0",
            "--las-length-weight",
            "0",
        ],
        ["--las-mu", "0.5", "--decoding-method", BEAM_RESCORE],
        ["--las-length-weight", "0.5", "--decoding-method", BEAM_RESCORE],
        ["--las-mu", "1.5", "--las-length-weight", "0", "--decoding-method", BEAM_RESCORE],
        ["--las-mu", "0.5", "--las-length-weight", "nan", "--decoding-method", BEAM_RESCORE],
        ["--rescore-nbest", "-1"],
        ["--test-parts", ""],
        ["--decoding-method", ","],
    ],
)
def test_senseless_options_are_refused(decode, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        decode(*arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]
    assert names(decode.exp_dir) == ["epoch-1.pt", "epoch-2.pt"]
