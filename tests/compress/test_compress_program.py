"""local/compress.py: first weights for a phase, a supernet's streaming mode as a phase, what it writes
about them, what it refuses.
"""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from transducer_kd import build
from transducer_kd.compress import select, size
from transducer_kd.compress.pruning import choose_masks
from transducer_kd.config import load_config, to_dict
from transducer_kd.data.batch import Batch
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.log import UserError
from transducer_kd.report import phases
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
            path = folder / f"exp/epoch-{step // 20 - 3}.pt"
            save_epoch(path, model, average, step, config, tokenizer)
    return folder


def save_epoch(path, model, average, step, config, tokenizer):
    """A checkpoint as training writes it, without what only training reads."""
    content = {
        "model": model.state_dict(),
        "model_avg": average,
        "progress": {"step": step},
        "config": to_dict(config),
        "bpe_sha256": tokenizer.sha256,
    }
    ckpt.save_checkpoint(path, content)


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
def program(monkeypatch):
    """Function: run the program with these options."""
    spec = importlib.util.spec_from_file_location("compress_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)

    def run(*words):
        monkeypatch.setattr(program, "setup_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["compress.py", *map(str, words)])
        assert program.main() == 0

    return run


@pytest.fixture
def compress(place, tmp_path, program):
    """Function: select with --set options -> the output folder."""

    def run(*overrides, exp_dir=place / "exp", lang_dir=place / "lang"):
        words = ["--config", place / "conf.yaml", "--output-dir", tmp_path / "init"]
        for item in (f"data.lang_dir={lang_dir}", *overrides):
            words += ["--set", item]
        program("--exp-dir", exp_dir, *words)
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


# ---------------------------------------------------------------- --extract

EXTRACT = ["model.encoder.chunk_size=3", "model.encoder.left_context=6"]


@pytest.fixture(params=["unit", "block8x1"])
def supernet_dir(request, place, tmp_path):
    """A phase of three epochs: a supernet whose masks are chosen in the first and fixed from then on."""
    config = configure(place, *EXTRACT, f"model.pruned_groups={request.param}", "phase=supernet")
    tokenizer = build.build_tokenizer(config.data)
    model = build.build_model(config, tokenizer.vocab_size)
    average = ckpt.start_running_average(model)
    model.masks.assign(choose_masks(model, 0.5))
    for step in (5, 10, 15):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        ckpt.update_running_average(average, model, step, config.train.average_period)
        path = tmp_path / f"supernet/epoch-{step // 5}.pt"
        save_epoch(path, model, average, step, config, tokenizer)
    return tmp_path / "supernet"


@pytest.mark.parametrize("choice", [[], ["--epoch", 2], ["--avg", 2, "--use-averaged-model"]])
def test_an_extracted_phase_computes_what_the_supernet_does(program, supernet_dir, tmp_path, choice):
    output_dir = tmp_path / "streaming"
    program("--extract", "--exp-dir", supernet_dir, "--output-dir", output_dir, *choice)
    supernet = build.load_model(
        supernet_dir, 2 if "--epoch" in choice else 0, 2 if "--avg" in choice else 1, "--avg" in choice
    )
    loaded = build.load_model(output_dir)
    assert (loaded.config.phase, loaded.config.model.pruned_groups) == ("streaming", "none")
    batch = make_batch(loaded.tokenizer)
    with torch.no_grad():
        found, expected = (
            own.model.encode(batch.features, batch.feature_lens)[0] for own in (loaded, supernet)
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    selected_from = ckpt.load_checkpoint(output_dir / "epoch-1.pt")["selected_from"]
    path, state = str(supernet_dir), supernet.model.state_dict()
    assert selected_from == build.origin_of(path, supernet.checkpoint, state)


def test_an_extracted_phase_is_described_like_any_other(program, supernet_dir, tmp_path, capsys):
    output_dir = tmp_path / "streaming"
    for _ in range(2):  # again in the same place
        program("--extract", "--exp-dir", supernet_dir, "--output-dir", output_dir)
    names = ["config.json", "epoch-1.pt", "meta.json", "selection.json"]
    assert sorted(path.name for path in output_dir.iterdir()) == names
    config, meta, selection = (
        json.loads((output_dir / name).read_text()) for name in (names[0], names[2], names[3])
    )
    loaded, supernet = build.load_model(output_dir), build.load_model(supernet_dir)
    assert config == {**to_dict(loaded.config)}
    total = sum(p.numel() for p in loaded.model.parameters())
    assert meta["parameters"] == {"deployed": loaded.model.deployed_parameters(), "total": total}
    init = meta["origins"]["init"]
    assert init["selected_from"] == selection["selected_from"]
    assert init == {**build.origin_of(str(output_dir), "epoch-1", loaded.model.state_dict()), **init}
    found = [{"name": "supernet", "config": to_dict(supernet.config), "meta": {}, "params_deployed": 2}]
    found.append({"name": "streaming", "config": config, "meta": meta, "params_deployed": 1})
    of_report = {p["name"]: p for p in phases.arrange(found, tmp_path)}
    assert of_report["streaming"]["begins_with"] == "supernet" and of_report["streaming"]["is_selected"]

    whole, sparse = size.count(supernet.model, 0), size.count(supernet.model)
    assert selection["sizes"] == {"offline": vars(whole), "streaming": vars(sparse)}
    assert size.count(loaded.model).value_bytes == sparse.value_bytes < whole.value_bytes
    before = supernet.model.deployed_parameters()
    assert selection["parameters"] == {"before": before, "after": meta["parameters"]["deployed"]}
    shown = capsys.readouterr().out
    assert f"{sparse.nonzero_parameters:,}" in shown and f"{whole.value_bytes:,}" in shown
    first, layer = shown.splitlines()[1].split(), selection["layers"][0]
    if supernet.config.model.pruned_groups == "unit":
        heads = f"{layer['heads'][0]} of 2"
        assert first == f"0 0 of 2 {heads} 12 of 24 12 of 24".split()
    else:
        assert first[:3] == ["0", f"{100 * layer['ff1_hidden'] / (3 * 16):.0f}", "%"]


def test_what_cannot_be_extracted_is_refused(program, place, supernet_dir, tmp_path):
    with pytest.raises(UserError, match=r"exp has no masks \(model.pruned_groups=none\)"):
        program("--extract", "--exp-dir", place / "exp", "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="supernet holds a training, which would be lost"):
        program("--extract", "--exp-dir", supernet_dir, "--output-dir", supernet_dir)
    with pytest.raises(UserError, match="epoch-7.pt does not exist"):
        program("--extract", "--exp-dir", supernet_dir, "--output-dir", tmp_path / "out", "--epoch", 7)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "name the student's phase YAML with --config, or pass --extract"),
        (["--config", "x.yaml", "--avg", "2"], "go with --extract; to select, set teacher.epoch"),
        (["--extract", "--set", "a=b"], "leave --config and --set out"),
        (["--extract", "--epoch", "-1", "--avg", "2"], "--epoch -1 is best-valid.pt"),
        (["--extract", "--avg", "0"], "must be 1 or more, not 0"),
    ],
)
def test_options_that_make_no_sense_together_are_refused(program, tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        program("--exp-dir", tmp_path, "--output-dir", tmp_path / "out", *words)
    assert message in " ".join(capsys.readouterr().err.split())
