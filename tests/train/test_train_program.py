"""local/train.py --restart: an earlier run makes room only for a training that can begin."""

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from transducer_kd import build
from transducer_kd.data.tokenizer import train_bpe
from transducer_kd.log import UserError
from transducer_kd.train import ddp, experiment
from transducer_kd.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "decode"))
from tiny_teacher import TEXTS, write_part  # noqa: E402

PROGRAM = Path(__file__).resolve().parents[2] / "local" / "train.py"
CONFIG = """
model:
  encoder: {num_layers: 1, encoder_dim: 8, num_heads: 2, feedforward_dim: 16, subsampling_channels: 2}
  decoder: {decoder_dim: 8}
  joiner_dim: 8
loss: {backend: torch, s_range: 3}
data: {train_parts: [train], valid_part: dev, num_workers: 0}
train: {max_steps: 1, num_threads: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """conf.yaml, lang/ and fbank/ with the parts train and dev. Read only."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "fbank").mkdir()
    for part in ("train", "dev"):
        write_part(folder / "fbank", part, [1.2] * len(TEXTS))
    train_bpe(TEXTS, folder / "lang", 40)
    (folder / "conf.yaml").write_text(CONFIG)
    return folder


@pytest.fixture
def train(place, tmp_path, monkeypatch):
    """Function: run the program in exp/ -> its exit status. An earlier run of one update is there already."""
    spec = importlib.util.spec_from_file_location("train_program", PROGRAM)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*options):
        data = [f"data.lang_dir={place / 'lang'}", f"data.fbank_dir={place / 'fbank'}"]
        given = ["--config", str(place / "conf.yaml"), "--exp-dir", str(tmp_path / "exp"), "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["train.py", *given, "--set", data[0], "--set", data[1], *options])
        return program.main()

    assert run() == 0
    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


def files_in(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_restart_keeps_the_earlier_run_and_begins_anew(train, tmp_path):
    (tmp_path / "exp" / "mark").write_text("of the earlier run")
    before = files_in(tmp_path / "exp")
    assert train("--restart", "--set", "train.seed=7") == 0
    exp_dir, aside = sorted(tmp_path.iterdir())
    assert aside.name.startswith("exp.old-") and files_in(aside) == before
    assert json.loads((exp_dir / "config.json").read_text())["train"]["seed"] == 7
    assert not (exp_dir / "mark").exists() and (exp_dir / "epoch-1.pt").exists()
    assert "1 updates" in (exp_dir / "log" / "log-train-0.txt").read_text()


@pytest.mark.parametrize(
    "settings, message",
    [
        (["init.exp_dir=nowhere"], "nowhere holds no epoch-N.pt"),
        (["objective=distill", "distill.weight=1", "teacher.kind=exp_dir", "teacher.exp_dir=gone"], "gone"),
        (["data.pseudo_labels=none"], "none has no summary.json"),
        (["data.train_parts=[other]"], "cuts_other.jsonl.gz does not exist"),
        (["train.precision=fp16"], "fp16 needs a CUDA device"),
    ],
)
def test_what_is_refused_moves_nothing(train, tmp_path, settings, message):
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=message):
        train("--restart", *(word for setting in settings for word in ("--set", setting)))
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_moves_the_run_while_the_others_wait(train, monkeypatch, rank):
    happened = []

    def note(owner, name, is_real=False):
        real = getattr(owner, name)

        def noting(*args, **options):
            happened.append(name)
            return real(*args, **options) if is_real else None

        monkeypatch.setattr(owner, name, noting)

    monkeypatch.setattr(ddp, "setup", lambda device: ddp.Processes(rank, 2, torch.device("cpu")))
    note(build, "build_objective", is_real=True)
    note(experiment, "prepare_exp_dir")
    note(experiment, "set_aside")
    note(ddp, "barrier")
    note(Trainer, "run")
    train("--restart")
    first = ["set_aside"] if rank == 0 else []
    then = ["prepare_exp_dir"] if rank == 0 else []
    assert happened == ["build_objective", "barrier", *first, "barrier", *then, "barrier", "run"]
