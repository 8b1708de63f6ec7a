"""local/compress.py: weights that a phase can begin with, what it writes about them, what it refuses."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from transducer_kd import build
from transducer_kd.compress import select
from transducer_kd.config import load_config, to_dict
from transducer_kd.data.batch import Batch
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.log import UserError
from transducer_kd.train import checkpoint as ckpt
from transducer_kd.train import experiment

PROGRAM = Path(__file__).resolve().parents[2] / "local" / "compress.py"
TEXTS = ["TURN ON THE LIGHTS", "PLAY MUSIC", "SET A TIMER FOR TEN MINUTES"]
CONFIG = """
model:
  encoder: {num_layers: 2, encoder_dim: 16, num_heads: 2, head_dim: 8, feedforward_dim: 24,
            cnn_module_kernel: 5, dropout: 0.0, subsampling_channels: 2}
  decoder: {decoder_dim: 12}
  joiner_dim: 10
loss: {backend: torch, s_range: 3, warm_step: 0, ctc_weight: 0.3}
spec_augment: {enabled: false}
train: {average_period: 5}
"""
SMALLER = ["model.encoder.num_heads=1", "model.encoder.feedforward_dim=16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with conf.yaml, lang/, and exp/, the teacher: trained until it knows TEXTS, epochs 1 and 2."""
    folder = tmp_path_factory.mktemp("compress")
    tokenizer = train_bpe(TEXTS * 3, folder / "lang", 30)
    (folder / "conf.yaml").write_text(CONFIG)
    config = configure(folder)
    objective, _ = build.build_objective(config, tokenizer)
    model = objective.model
    average = ckpt.start_running_average(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(1, 101):
        objective.train()
        loss = objective(make_batch(tokenizer), step).loss_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ckpt.update_running_average(average, model, step, config.train.average_period)
        if step in (80, 100):
            content = {
                "model": model.state_dict(),
                "model_avg": average,
                "progress": {"step": step},
                "config": to_dict(config),
                "bpe_sha256": tokenizer.sha256,
            }
            ckpt.save_checkpoint(folder / f"exp/epoch-{step // 20 - 3}.pt", content)
    return folder


def configure(folder, *overrides):
    return load_config(folder / "conf.yaml", [f"data.lang_dir={folder / 'lang'}", *overrides])


def make_batch(tokenizer):
    tokens = tokenizer.encode(TEXTS)
    y = torch.zeros(3, max(map(len, tokens)), dtype=torch.int64)
    for row, own in zip(y, tokens):
        row[: len(own)] = torch.tensor(own)
    features = torch.randn(3, 160, 80, generator=torch.Generator().manual_seed(1)) * 3 - 8
    y_lens = torch.tensor([len(own) for own in tokens])
    return Batch(features, torch.tensor([160, 130, 155]), y, y_lens, ["a", "b", "c"], TEXTS)


@pytest.fixture
def compress(place, tmp_path, monkeypatch):
    """Function: run the program with --set options -> its output folder."""
    spec = importlib.util.spec_from_file_location("compress_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def run(*overrides, exp_dir=place / "exp", lang_dir=place / "lang"):
        monkeypatch.setattr(program, "setup_logging", lambda: None)
        words = ["--config", str(place / "conf.yaml"), "--output-dir", str(tmp_path / "init")]
        for item in (f"data.lang_dir={lang_dir}", *overrides):
            words += ["--set", item]
        monkeypatch.setattr(sys, "argv", ["compress.py", "--exp-dir", str(exp_dir), *words])
        assert program.main() == 0
        return tmp_path / "init"

    return run


def begun(place, init, *overrides):
    """The objective of a phase that begins with `init`, or fresh, and where its weights are from."""
    config = configure(place, *overrides, f"init.exp_dir={init}", "init.use_averaged_model=false")
    return build.build_objective(config, build.build_tokenizer(config.data))


def valid_loss(objective, tokenizer):
    objective.eval()
    with torch.no_grad():
        return float(objective(make_batch(tokenizer), 0).loss_sum)


def test_a_phase_begins_with_what_was_selected_from_the_averaged_teacher(place, compress):
    objective, origins = begun(place, compress(*SMALLER), *SMALLER)
    teacher = build.load_model(place / "exp", use_averaged_model=True)
    selections = select.choose(teacher.model.state_dict(), teacher.config.model, objective.model.config)
    expected = select.apply(teacher.model.state_dict(), selections, teacher.config.model)
    found = objective.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert Path(origins["init"]["path"]).name == "init"


def test_it_selects_from_the_weights_that_teach(place, compress):
    """selected_from is what a phase that learns from the same teacher says of it."""
    found, last = [], "teacher.use_averaged_model=false"
    for choice in ([], [last], ["teacher.epoch=1", last]):
        content = ckpt.load_checkpoint(compress(*SMALLER, *choice) / "epoch-1.pt")
        config = configure(place, f"teacher.exp_dir={place / 'exp'}", *choice)
        config.teacher.kind = "exp_dir"
        _, origin = build.build_teacher(config.teacher, build.build_tokenizer(config.data))
        assert content["selected_from"] == origin
        found.append(origin["sha256"])
    assert len(set(found)) == 3


def test_selecting_again_gives_the_same_weights(place, compress):
    _, first = begun(place, compress(*SMALLER), *SMALLER)
    torch.manual_seed(77)
    _, again = begun(place, compress(*SMALLER), *SMALLER)
    assert first == again


def test_what_was_kept_is_written_and_printed(place, compress, capsys):
    init = compress("model.encoder.num_layers=1", *SMALLER)
    written = json.loads((init / "selection.json").read_text())
    (layer,) = written["layers"]
    assert layer["layer"] == 1 and len(layer["heads"]) == 1 and len(layer["ff1"]) == len(layer["ff2"]) == 16
    config = configure(place, "model.encoder.num_layers=1", *SMALLER)
    sizes = [build.build_model(c, 30).deployed_parameters() for c in (configure(place), config)]
    assert written["parameters"] == {"before": sizes[0], "after": sizes[1]}
    assert written["selected_from"]["path"] == str(place / "exp")
    shown = capsys.readouterr().out
    assert f"0  1 of 2  {layer['heads'][0]} of 2  16 of 24  16 of 24".split() == shown.splitlines()[1].split()
    smaller = 100 * (1 - sizes[1] / sizes[0])
    assert f"{sizes[0]:,} -> {sizes[1]:,} ({smaller:.1f} % smaller)" in shown


def test_what_was_selected_starts_better_than_fresh_weights(place, compress):
    tokenizer = build.build_tokenizer(configure(place).data)
    selected = valid_loss(begun(place, compress(*SMALLER), *SMALLER)[0], tokenizer)
    teacher = valid_loss(begun(place, place / "exp")[0], tokenizer)
    fresh = [valid_loss(begun(place, "", *SMALLER, f"train.seed={seed}")[0], tokenizer) for seed in range(3)]
    assert teacher < selected < 0.8 * min(fresh), (teacher, selected, fresh)


def test_a_ctc_head_is_left_behind_or_begins_fresh(place, compress, tmp_path, caplog):
    without = [*SMALLER, "loss.ctc_weight=0"]
    init = compress(*without)
    assert not any(name.startswith("ctc") for name in ckpt.load_checkpoint(init / "epoch-1.pt")["model"])
    assert begun(place, init, *without)[0].model.ctc_output is None
    with caplog.at_level(logging.INFO):
        assert begun(place, init, *SMALLER)[0].model.ctc_output is not None
    assert "fresh: ctc_output" in caplog.text


def test_what_was_selected_is_no_training_that_goes_on(place, compress):
    init = compress(*SMALLER)
    assert not {"model_avg", "progress"} & ckpt.load_checkpoint(init / "epoch-1.pt").keys()
    with pytest.raises(UserError, match="init holds weights and no config.json.*local/compress.py made it"):
        experiment.prepare_exp_dir(init, configure(place, *SMALLER), 1)
    assert sorted(path.name for path in init.iterdir()) == ["epoch-1.pt", "selection.json"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["model.encoder.feedforward_dim=25"], "feedforward_dim is 25 in the student and only 24"),
        (["model.joiner_dim=8"], "joiner_dim is 10 in the teacher and 8"),
        (["teacher.epoch=7"], r"epoch-7.pt does not exist.*epoch-1.pt, epoch-2.pt"),
    ],
)
def test_what_cannot_be_selected_is_refused(compress, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        compress(*overrides)
    assert not (tmp_path / "init").exists()


def test_other_tokens_and_an_untrained_phase_are_refused(place, compress, tmp_path):
    other = train_bpe([text[::-1] for text in TEXTS], tmp_path / "other", 30)
    with pytest.raises(UserError, match="another BPE model"):
        compress(*SMALLER, lang_dir=other.path.parent)
    with pytest.raises(UserError, match="there is no experiment folder .*gone; train the phase first"):
        compress(*SMALLER, exp_dir=place / "gone")
